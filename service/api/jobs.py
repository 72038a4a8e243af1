"""Searches: submitted, followed, cancelled."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import anyio
from anyio import to_thread
from fastapi import APIRouter, BackgroundTasks, Depends, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from service import broker
from service.api.auth import Reader, Submitter, Trust, require, trust
from service.api.pages import Cursor, Limit, Page, decode_cursor, page
from service.api.problems import responses
from service.fields import ID, Name
from service.specs import JobRequest
from service.store import datasets, idempotency, jobs, structures
from service.store.models import TERMINAL, Candidate, Job, JobState, Structure
from service.store.results import milliseconds
from service.store.session import snapshot, transaction
from service.store.structures import SortKey
from service.submission import prepare

router = APIRouter(prefix="/jobs", tags=["jobs"])
POLL_SECONDS = 0.5
READ = [Depends(require("read"))]
JobId = Annotated[str, Path(max_length=64, pattern=ID)]
SpaceKey = Annotated[str, Query(max_length=100, pattern=r"^[A-Za-z0-9._@/+-]+$", description="name or key of a space")]


class JobLinks(BaseModel):
    """Where to go on."""

    self: str
    events: str
    candidates: str
    cancel: str


class JobRead(BaseModel):
    """A job; times are seconds since 1970 by the database's clock."""

    id: str
    state: JobState
    space_key: str
    spec: dict[str, Any]
    """The request with every default filled in."""
    progress: dict[str, Any]
    seconds: dict[str, float]
    """How long it has been in each state."""
    warnings: list[Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    cancel_requested: bool
    reproducible: bool
    environment: dict[str, Any] | None
    """What the job began with: versions, threads, kernels, code and images; null until it has."""
    created_at: float
    updated_at: float
    finished_at: float | None
    links: JobLinks


class CandidateRead(BaseModel):
    """A structure judged during the job's search; `parents` are encodings."""

    id: int
    structure_id: str
    generation: int
    position: int
    encoding: list[int]
    channels: list[int]
    flops: int
    parameters: int
    predicted_ms: dict[str, float]
    proxy_accuracy: float
    proxy_loss: float
    birth: str
    parents: list[list[int]]
    pruned: dict[str, Any] | None
    """Of a pruning method: `method`, weights that are `kept` of those `prunable`, `sparse_flops`, and a `note`. Its
    accuracies are not proxies: the network as it is then, on images that it may have been trained on."""


@router.post("", status_code=202, responses=responses(409), response_model=JobRead)
def submit(
    spec: JobRequest,
    caller: Submitter,
    request: Request,
    response: Response,
    background: BackgroundTasks,
    idempotency_key: Annotated[str | None, Header(max_length=200, pattern=r"^[\x21-\x7e]+$")] = None,
) -> dict[str, Any]:
    """Submit a search; the same `Idempotency-Key` and body again give the first answer."""
    answer = _submit(spec, caller.id, idempotency_key)
    response.headers["Location"] = answer["links"]["self"]
    background.add_task(_ring, request)
    return answer


@router.get("", dependencies=READ, responses=responses(404))
def list_jobs(
    limit: Limit = 50,
    cursor: Cursor = None,
    state: JobState | None = None,
    space: SpaceKey | None = None,
    dataset: Annotated[Name | None, Query()] = None,
) -> Page[JobRead]:
    """Jobs, the newest first."""
    position = decode_cursor(cursor, float, str)
    before = (float(position[0]), str(position[1])) if position else None
    with snapshot() as session:
        dataset_id = datasets.get(session, dataset).id if dataset else None
        rows = jobs.newest(
            session, limit=limit + 1, before=before, state=state, space=space, dataset_id=dataset_id
        )  # fmt: skip
        seconds = {row.id: jobs.phase_seconds(session, row.id) for row in rows[:limit]}
    return page(rows, limit, lambda row: read(row, seconds[row.id]), lambda row: [row.created_at, row.id])


@router.get("/{job}", dependencies=READ, responses=responses(404))
def read_job(job: JobId) -> JobRead:
    """One job."""
    with snapshot() as session:
        return read(jobs.get(session, job, memory=False), jobs.phase_seconds(session, job))


@router.post("/{job}/cancel", responses=responses(404, 409))
def cancel(job: JobId, _caller: Submitter) -> JobRead:
    """Ask a job to stop; repeating it changes nothing."""
    with transaction() as session:
        row = jobs.request_cancel(session, job)
        return read(row, jobs.phase_seconds(session, job))


def existing_job(job: JobId, _caller: Reader) -> str:
    """The id of a job that exists, found out before an answer has begun."""
    with snapshot() as session:
        return jobs.get(session, job, memory=False).id


@router.get("/{job}/events", response_class=EventSourceResponse, responses=responses(404))
async def events(
    job_id: Annotated[str, Depends(existing_job)],
    request: Request,
    last_event_id: Annotated[int, Header(ge=0, lt=2**63, description="go on behind this event")] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """What happens in the job, as server-sent events, from the beginning until it has ended.

    Kinds: `state`; `progress`, of which only the newest is kept; `sounding` (by latency: the correction of its
    prices, and the margin that is kept);
    `generation`, a summary of each; `finalist`, what a short training has come to; `judged`, a mask or structure on a
    pruning method's way, with its accuracy; `warning`.
    """
    seen, ended = last_event_id, False
    while not ended:
        news, ended = await to_thread.run_sync(_news, job_id, seen, request.headers.get("authorization", ""))
        for event in news:
            yield event
            seen = int(event.id or seen)
        if not news and not ended:
            await anyio.sleep(POLL_SECONDS)


@router.get("/{job}/candidates", dependencies=READ, responses=responses(404))
def list_candidates(
    job: JobId,
    sort: SortKey = "proxy_accuracy",
    order: Literal["ascending", "descending"] | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[CandidateRead]:
    """Every structure that the search has judged; the order is the most interesting first where none is asked for."""
    descending = order == "descending" if order else sort in ("proxy_accuracy", "generation")
    by = f"{sort} {'descending' if descending else 'ascending'}"
    position = decode_cursor(cursor, by, float, int)
    behind = (position[1], position[2]) if position else None
    with snapshot() as session:
        jobs.get(session, job, memory=False)
        rows = structures.of_job(session, job, sort, descending, limit + 1, behind)
    return page(rows, limit, _candidate, lambda row: [by, getattr(row[0], sort), row[0].id])


def read(row: Job, seconds: dict[str, float]) -> JobRead:
    """A job as JSON."""
    where = f"/v1/jobs/{row.id}"
    links = JobLinks(
        self=where, events=f"{where}/events", candidates=f"{where}/candidates", cancel=f"{where}/cancel"
    )  # fmt: skip
    return JobRead(
        id=row.id, state=row.state, space_key=row.space_key, spec=row.spec, progress=row.progress, seconds=seconds,
        warnings=row.warnings, result=row.result, error=row.error, reproducible=row.reproducible,
        environment=row.environment,
        cancel_requested=row.cancel_requested_at is not None, created_at=row.created_at, updated_at=row.updated_at,
        finished_at=row.finished_at, links=links,
    )  # fmt: skip


def _submit(request: JobRequest, caller: str, key: str | None) -> dict[str, Any]:
    with transaction() as session:

        def work() -> dict[str, Any]:
            ready = prepare(session, request)
            job = jobs.submit(
                session, ready.spec, space_key=ready.space.key, dataset_id=ready.dataset_id, created_by=caller
            )  # fmt: skip
            return read(job, {}).model_dump(mode="json")

        if key is None:
            return work()
        sha256 = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        return idempotency.once(session, caller, "POST /v1/jobs", key, sha256, work)


def _ring(request: Request) -> None:
    request.app.state.rang = broker.ring()


def _news(job_id: str, seen: int, authorization: str) -> tuple[Sequence[ServerSentEvent], bool]:
    """The next events, and whether they are the last: the job has ended, or the key is not valid any more."""
    if trust(authorization) is Trust.STRANGER:
        return [], True
    with snapshot() as session:
        ended = jobs.get(session, job_id, memory=False).state in TERMINAL
        rows = jobs.events_after(session, job_id, seen)
    return [ServerSentEvent(id=str(row.id), event=row.kind, data=row.data) for row in rows], ended and len(rows) < 200


def _candidate(row: tuple[Candidate, Structure]) -> CandidateRead:
    one, structure = row
    parents = [[int(gene) for gene in parent.split(",")] for parent in one.parents]
    return CandidateRead(
        id=one.id, structure_id=one.structure_id, generation=one.generation, position=one.position,
        encoding=one.encoding, channels=structure.channels, flops=one.flops, parameters=one.parameters,
        predicted_ms=milliseconds(one.latencies), proxy_accuracy=one.proxy_accuracy, proxy_loss=one.proxy_loss,
        birth=one.birth, parents=parents, pruned=one.pruned,
    )  # fmt: skip
