"""Every error leaves as an RFC 9457 problem document, whoever raised it.

Nothing that a client sent is echoed but names it may have misspelt, so a document can always be encoded.
"""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException

from latency_profiler.errors import (
    AlreadyExists,
    InfeasibleConstraint,
    InvalidInput,
    MissingLatencies,
    NotCalibrated,
    NotFound,
    SecateursError,
    UnknownSpace,
)  # fmt: skip
from service.fields import ALLOWED
from service.store.agents import FingerprintMismatch, UploadConflict
from service.store.devices import DeviceInUse
from service.store.idempotency import KeyReused, RequestInFlight
from service.store.jobs import JobStateConflict
from service.store.session import DATABASE_AWAY

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 2
LONGEST_TEXT = 500
RENAMED = {413: "Content Too Large", 422: "Unprocessable Content"}
"""RFC 9110's names, which older versions of Python lack: the documents must not depend on the version."""
log = logging.getLogger(__name__)


class FieldError(BaseModel):
    """One field that was refused."""

    field: str = Field(description="where it is, e.g. `body.constraints.0.max`")
    message: str
    type: str


class Problem(BaseModel):
    """RFC 9457 problem document; further members depend on the type."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="what kind of problem: `urn:secateurs:…`")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    errors: list[FieldError] = []


class ProblemResponse(JSONResponse):
    """A problem document."""

    media_type = MEDIA_TYPE


Facts = Callable[[Any], dict[str, Any]]
PROBLEMS: dict[type[Exception], tuple[int, str, Facts]] = {
    UnknownSpace: (422, "unknown-space", lambda e: {"known": list(e.known)}),
    InvalidInput: (422, "invalid-input", lambda e: {}),
    InfeasibleConstraint: (422, "infeasible-constraint", lambda e: _facts(e, "metric asked smallest largest device")),
    NotFound: (404, "not-found", lambda e: _facts(e, "kind name")),
    AlreadyExists: (409, "already-exists", lambda e: _facts(e, "kind name")),
    NotCalibrated: (409, "not-calibrated", lambda e: {"device": e.device, "statistic": e.statistic}),
    MissingLatencies: (409, "missing-latencies", lambda e: {"keys": list(e.keys[:100]), "missing": len(e.keys)}),
    JobStateConflict: (409, "job-state-conflict", lambda e: _facts(e, "job_id state")),
    DeviceInUse: (409, "device-in-use", lambda e: {"name": e.name, "job_ids": list(e.job_ids[:100])}),
    FingerprintMismatch: (409, "fingerprint-mismatch", lambda e: {"current": e.current}),
    UploadConflict: (409, "upload-conflict", lambda e: _facts(e, "upload_id")),
    KeyReused: (422, "idempotency-key-reused", lambda e: {}),
    RequestInFlight: (409, "request-in-flight", lambda e: {}),
}
"""Status, type and further members of each error that a caller can decide about; subclasses follow their parent."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route declares for these statuses, and for those that every route under /v1 may answer."""
    everywhere = {401, 403, 422, 500, 503}
    return {status: declared(status) for status in sorted(everywhere.union(statuses))}


def describe(document: dict[str, Any]) -> None:
    """Complete an OpenAPI document: the one schema of all errors, and what every route that takes a body may answer."""
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= schema.pop("$defs") | {"Problem": schema}
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        if "requestBody" in operation:
            answers = operation["responses"] | {str(status): declared(status) for status in (400, 413, 415)}
            operation["responses"] = dict(sorted(answers.items()))


def declared(status: int) -> dict[str, Any]:
    """One declared error."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": _phrase(status), "content": content}


def problem(
    status: int, kind: str | None, detail: str, headers: Mapping[str, str] | None = None, /, **members: Any
) -> ProblemResponse:
    """A problem document; `kind` None is the status's own name."""
    phrase = _phrase(status)
    name = kind or phrase.lower().replace(" ", "-").replace("'", "")
    title = name.replace("-", " ").capitalize() if kind else phrase
    body = {"type": f"urn:secateurs:{name}", "title": title, "status": status, "detail": _text(detail), **members}
    return ProblemResponse(_encodable(body), status, dict(headers or {}))


def json_body(request: Request) -> None:
    """A dependency of every route: a body of another content type is answered by 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
    if not (empty or kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise HTTPException(415, "send JSON, with the header `Content-Type: application/json`")


def install(app: FastAPI) -> None:
    """Make the app answer every error with a problem document."""
    for error in PROBLEMS:
        app.add_exception_handler(error, _expected)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(DataError, _unstorable)
    for unavailable in DATABASE_AWAY:
        app.add_exception_handler(unavailable, _unavailable)


def _expected(_request: Request, error: Exception) -> ProblemResponse:
    status, kind, facts = next(PROBLEMS[base] for base in type(error).__mro__ if base in PROBLEMS)
    return problem(status, kind, str(error), **facts(error))


def _http(_request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, None, str(error.detail), error.headers)


def _validation(_request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)
    errors = [_field_error(entry) for entry in error.errors()[:50]]
    detail = "; ".join(f"{entry['field']}: {entry['message']}" for entry in errors[:3])
    return problem(422, "invalid-request", detail, errors=errors)


def _field_error(entry: dict[str, Any]) -> dict[str, str]:
    """A field's error without its value: some of Pydantic's own messages quote what was sent."""
    message = str(entry["msg"])
    match entry["type"]:
        case "union_tag_invalid":
            message = f"must be one of {entry['ctx']['expected_tags']}"
        case "string_pattern_mismatch":
            message = ALLOWED.get(entry["ctx"]["pattern"], message)
    return {"field": _text(".".join(map(str, entry["loc"]))), "message": _text(message), "type": str(entry["type"])}


def _unstorable(_request: Request, error: Exception) -> ProblemResponse:
    log.warning("the database refused a value: %s", type(error).__name__)
    return problem(422, "invalid-input", "a value cannot be stored")


def _unavailable(_request: Request, error: Exception) -> ProblemResponse:
    log.warning("the database is unavailable: %s", _text(str(error)))
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return problem(503, "database-unavailable", "the database does not answer; try again", headers)


def _phrase(status: int) -> str:
    return RENAMED.get(status) or HTTPStatus(status).phrase


def _facts(error: SecateursError, names: str) -> dict[str, Any]:
    found = {name: getattr(error, name) for name in names.split()}
    return {name: value for name, value in found.items() if value is not None}


def _text(text: str) -> str:
    """Without lone surrogates, and not without end."""
    short = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return short.encode("utf-8", "backslashreplace").decode()


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return _text(value)
        case dict():
            return {key: _encodable(item) for key, item in value.items()}
        case list():
            return [_encodable(item) for item in value]
        case _:
            return value
