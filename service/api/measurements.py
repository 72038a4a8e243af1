"""The agents' side: take work, hand in what was measured."""

import logging
from typing import Annotated, Any, Self

from fastapi import APIRouter, BackgroundTasks
from pydantic import BaseModel, Field, model_validator

from service import broker
from service.api.auth import Agent
from service.api.devices import DevicePath, Facts, Seconds, Spread
from service.api.problems import responses
from service.fields import Model, Text
from service.settings import get_settings
from service.store import agents, devices
from service.store.agents import Batch, Outcome
from service.store.models import WorkKind
from service.store.session import transaction

POLL_SECONDS = 1.0
"""How long an agent without work waits before it asks again."""
LARGEST_UPLOAD = 16 << 20
log = logging.getLogger(__name__)
router = APIRouter(prefix="/devices", tags=["agents"])


Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class LeaseRequest(Model):
    """An agent asks for work; with `limit` 0 it only beats, and keeps the lease that it names in `renew`."""

    fingerprint: Annotated[Facts, Field(min_length=1, description="what the agent runs on")]
    agent: Annotated[Text, Field(max_length=100, description="the agent's version")]
    limit: Annotated[int, Field(ge=0, le=500)] = 32
    connection: Annotated[Id | None, Field(description="the agent's process; a new one has the table checked")] = None
    host: Annotated[Id | None, Field(description="its machine: one device of a host measures at a time")] = None
    renew: Annotated[Id | None, Field(description="a lease that is still worked on")] = None


class WorkItem(BaseModel):
    """One thing to measure: `payload` has a `layer`, or the `nodes` of a whole network."""

    work_id: int
    kind: WorkKind
    key: str
    payload: dict[str, Any]


class LeaseView(BaseModel):
    """Work that belongs to the agent for `lease_seconds`; no items: ask again after `poll_seconds`."""

    lease_id: str
    lease_seconds: float
    table_id: str
    poll_seconds: float
    items: list[WorkItem]


class ResultBody(Model):
    """What became of one item: `seconds` and all that belongs to it, or an `error`."""

    work_id: Annotated[int, Field(ge=0, lt=2**63)]
    kind: WorkKind
    key: Annotated[Text, Field(min_length=1, max_length=200)]
    seconds: Seconds | None = None
    iqr: Spread = 0.0
    steady: bool = True
    values: Annotated[list[Seconds], Field(max_length=1000, default_factory=list)]
    conditions: Annotated[Facts, Field(default_factory=dict)]
    error: Annotated[Text, Field(min_length=1, max_length=2000)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.seconds is None) == (self.error is None):
            raise ValueError("give either seconds or an error")
        if self.seconds is not None and not self.values:
            raise ValueError("give the raw values that the seconds are the median of")
        return self

    def outcome(self) -> Outcome:
        """In the store's terms."""
        return Outcome(
            self.work_id, self.kind, self.key, self.seconds or 0.0, self.iqr, self.steady, self.values,
            self.conditions, self.error,
        )  # fmt: skip


class UploadBody(Model):
    """Results under one fingerprint (its SHA-256); the same `upload_id` again is answered as the first time."""

    upload_id: Id
    lease_id: Id
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    results: Annotated[list[ResultBody], Field(min_length=1, max_length=500)]


class UploadView(BaseModel):
    """How many results were stored, were there already, were failures, or belong to no work of the table."""

    stored: int
    repeated: int
    failed: int
    ignored: int


@router.post("/{device}/leases", responses=responses(404))
def lease(device: DevicePath, request: LeaseRequest, _agent: Agent, after: BackgroundTasks) -> LeaseView:
    """Give the agent work. New facts open a new lookup table; known ones bring theirs back."""
    seconds = get_settings().agent_lease_seconds
    with transaction() as session:
        row = devices.get(session, device)
        if request.renew is not None:
            agents.renew(session, row, request.renew, seconds)
        leased = agents.lease(
            session, row, request.fingerprint, request.limit, seconds, connection=request.connection, host=request.host
        )
    log.debug("agent %s of %s leased %d items", request.agent, device, len(leased.works))
    if leased.woken:
        after.add_task(broker.ring)
    items = [WorkItem(work_id=one.id, kind=one.kind, key=one.key, payload=one.payload) for one in leased.works]
    return LeaseView(
        lease_id=leased.lease_id,
        lease_seconds=seconds,
        table_id=leased.table_id,
        poll_seconds=POLL_SECONDS,
        items=items,
    )


@router.post("/{device}/measurements", responses=responses(404, 409, 413), max_body_size=LARGEST_UPLOAD)
def record(device: DevicePath, upload: UploadBody, _agent: Agent, after: BackgroundTasks) -> UploadView:
    """Store results; repeated, late or doubled ones change nothing."""
    outcomes = [result.outcome() for result in upload.results]
    batch = Batch(upload.upload_id, upload.lease_id, upload.fingerprint, outcomes)
    with transaction() as session:
        answer, woken = agents.record(session, devices.get(session, device), batch)
    if woken:
        after.add_task(broker.ring)
    return UploadView(**answer)
