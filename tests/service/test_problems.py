"""Whatever goes wrong is answered by a problem document, also where the framework or the database fails."""

import base64
import json
from typing import Any

import anyio
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.api import spaces, traffic
from service.api.problems import Problem
from service.api.traffic import FREE_BODY, MAX_BODY
from service.store import jobs, keys
from service.store.session import transaction


def check(answer: Any, status: int, kind: str | None = None) -> Problem:
    assert answer.status_code == status, answer.text[:300]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["X-Request-ID"]
    problem = Problem.model_validate(answer.json())
    assert problem.status == status
    assert kind is None or problem.type == f"urn:secateurs:{kind}"
    return problem


def test_of_the_framework(client: TestClient) -> None:
    check(client.get("/nothing"), 404, "not-found")
    check(client.get("/v1/nothing"), 404, "not-found")
    answer = client.put("/v1/jobs")
    check(answer, 405, "method-not-allowed")
    assert set(answer.headers["Allow"].split(", ")) <= {"GET", "POST"}
    check(client.post("/v1/jobs", content="a=1", headers={"Content-Type": "text/plain"}), 415)
    check(client.post("/v1/jobs", content="a=1"), 415)
    check(client.post("/v1/jobs", content="{", headers={"Content-Type": "application/json"}), 422, "invalid-request")


def test_a_long_body_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=b" " * (MAX_BODY + 1), headers={"Content-Type": "application/json"})
    check(answer, 413, "content-too-large")


@pytest.mark.parametrize(("path", "key", "status"), [
    ("/v1/jobs", True, 413), ("/v1/devices/d/lookup-table", True, 422),
    ("/v1/devices/d/lookup-table", False, 401), ("/v1/jobs", False, 401),
])  # fmt: skip
def test_a_large_body_is_parsed_for_those_who_may_send_it_only(
    client: TestClient, path: str, key: bool, status: int
) -> None:
    taken, eighth = 0, MAX_BODY // 8

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b" " * eighth + b"{}" * (taken == 12), "more_body": taken < 12}

    answer = send(client, "PUT" if "table" in path else "POST", path, receive, key)
    assert answer["status"] == status
    assert taken == (9 if status == 413 else 12)
    assert ("of this size needs an API key" in answer["detail"]) is (status == 401), "parsed before it was refused"


@pytest.mark.parametrize(("size", "scope", "status", "said"), [
    (FREE_BODY, None, 401, "send your API key"), (FREE_BODY + 1, None, 401, "of this size needs an API key"),
    (MAX_BODY, "read", 403, "this needs an API key"), (MAX_BODY + 1, "read", 403, "of this size needs an API key"),
    (MAX_BODY + 1, "submit", 422, ""),
])  # fmt: skip
def test_larger_bodies_are_parsed_for_those_alone_who_may_write(
    client: TestClient, size: int, scope: str | None, status: int, said: str
) -> None:
    headers = {"Content-Type": "application/json"}
    if scope:
        with transaction() as session:
            headers["Authorization"] = f"Bearer {keys.create_key(session, 'k', [scope])[1]}"
    else:
        del client.headers["Authorization"]
    answer = client.put("/v1/devices/d/lookup-table", content=b"{}" + b" " * (size - 2), headers=headers)
    assert answer.status_code == status
    assert said in answer.json()["detail"]


def test_a_body_that_comes_too_slowly_is_not_waited_for(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "BODY_SECONDS", 0.2)
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        await anyio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": taken < 40}

    assert send(client, "POST", "/v1/jobs", receive)["status"] == 408


def send(client: TestClient, method: str, path: str, receive: Any, key: bool = True) -> dict[str, Any]:
    """The problem document that answers a request whose body comes in parts."""
    sent: list[dict[str, Any]] = []

    async def take(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = {"content-type": "application/json"} | ({"authorization": client.headers["Authorization"]} if key else {})
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    anyio.run(client.app, scope, receive, take)
    answer: dict[str, Any] = json.loads(sent[1]["body"])
    assert sent[0]["status"] == answer["status"]
    return answer


def test_what_was_sent_is_not_echoed(client: TestClient) -> None:
    secret = "hunter2-hunter2"
    body = {"space": secret, "dataset": [secret], "constraints": [{"metric": secret}], "seed": secret, "effort": secret}
    answer = client.post("/v1/jobs", json=body)
    problem = check(answer, 422, "invalid-request")
    assert {error.field for error in problem.errors} == {
        "body.dataset", "body.constraints.0", "body.seed", "body.effort",
    }  # fmt: skip
    assert secret not in answer.text


def test_a_request_id_is_kept_if_it_is_one(client: TestClient) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    assert client.get("/healthz", headers={"X-Request-ID": "a b\tc"}).headers["X-Request-ID"] != "a b\tc"


READ_ONLY = InternalError("INSERT secret", {}, Exception("cannot execute INSERT in a read-only transaction"))


@pytest.mark.parametrize(
    "error", [OperationalError("SELECT secret", {}, Exception("gone")), PoolTimeout("none left"), READ_ONLY]
)
def test_a_database_that_is_away_is_503(client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "newest", fail)
    answer = client.get("/v1/jobs")
    check(answer, 503, "database-unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert "secret" not in answer.text


def test_a_bug_is_500_without_details(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("detail that nobody must see")

    monkeypatch.setattr(spaces, "get_space", fail)
    answer = client.get("/v1/spaces/vgg16")
    problem = check(answer, 500, "internal-server-error")
    assert "nobody" not in answer.text
    assert answer.headers["X-Request-ID"] in problem.detail


def test_a_bad_cursor_is_422(client: TestClient) -> None:
    for position in ("[]", "[1]", '["a", 1]', "null", '[NaN, "a"]', '[1e400, "a"]', "[" * 300, '[1, "\\u0000"]'):
        cursor = base64.urlsafe_b64encode(position.encode()).decode()
        for where in ("/v1/jobs", "/v1/datasets"):
            check(client.get(where, params={"cursor": cursor}), 422, "invalid-input")
    for cursor in ("x", "é", "=", "a b"):
        check(client.get("/v1/jobs", params={"cursor": cursor}), 422, "invalid-input")
