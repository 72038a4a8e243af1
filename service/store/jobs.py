"""Jobs: submitted by users, claimed by workers, moved on step by step.

One worker at a time may write for a job: whoever claimed it last. A claim raises the job's fence, every write of a
worker carries the fence of its claim, and a write that finds another fence is refused (`LeaseLost`). Ended jobs never
change. Every change of state leaves an event in the same transaction.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, case, delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Session, defer

from latency_profiler.errors import NotFound, SecateursError
from service.specs import JobRequest
from service.store import blobs
from service.store.models import TERMINAL, Chunk, Job, JobEvent, JobState, Work, WorkKind, WorkState, clock, now


class JobStateConflict(SecateursError):
    """The job is in a state that does not allow what was asked.

    Attributes:
        job_id, state: the job and where it is.
    """

    def __init__(self, job_id: str, state: JobState, asked: str) -> None:
        self.job_id, self.state = job_id, state
        super().__init__(f"job {job_id} is {state.value}; it cannot be {asked}")


class LeaseLost(SecateursError):
    """Another worker has taken the job, or it has ended: stop and write nothing."""


WITHOUT_MEMORY = defer(Job.memory, raiseload=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write for one job until another claim."""

    job_id: str
    owner: str
    fence: int


def submit(session: Session, spec: JobRequest, *, space_key: str, dataset_id: str, created_by: str | None) -> Job:
    """Accept a resolved request."""
    job = Job(
        spec=spec.model_dump(mode="json"), space_key=space_key, dataset_id=dataset_id, seed=spec.seed,
        created_by=created_by,
    )  # fmt: skip
    session.add(job)
    session.flush()
    add_event(session, job.id, "state", {"state": JobState.QUEUED})
    return job


def get(session: Session, job_id: str, *, memory: bool = True) -> Job:
    """One job; without its `memory`, which grows with every candidate, where only users ask.

    Raises:
        NotFound: no job has this id.
    """
    job = session.get(Job, job_id, options=[] if memory else [WITHOUT_MEMORY])
    if job is None:
        raise NotFound("job", job_id)
    return job


def request_cancel(session: Session, job_id: str) -> Job:
    """End a job that no living worker holds; ask the worker of one that is held. Repeating it changes nothing.

    Raises:
        NotFound: no job has this id.
        JobStateConflict: it has ended otherwise.
    """
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise NotFound("job", job_id)
    if job.state in TERMINAL and job.state is not JobState.CANCELLED:
        raise JobStateConflict(job_id, job.state, "cancelled")
    if job.state is not JobState.CANCELLED:
        first = func.coalesce(Job.cancel_requested_at, now())
        session.execute(update(Job).where(Job.id == job_id).values(cancel_requested_at=first))
        if session.scalar(select(Job.id).where(Job.id == job_id, _unheld())):
            _end(session, job_id, JobState.CANCELLED)
        session.refresh(job)
    return job


def end_cancelled(session: Session) -> None:
    """End what was to be cancelled while a worker held it that has vanished since."""
    waiting = select(Job.id).where(Job.state.not_in(TERMINAL), Job.cancel_requested_at.is_not(None), _unheld())
    for job_id in session.scalars(waiting.with_for_update(skip_locked=True)).all():
        _end(session, job_id, JobState.CANCELLED)


def events_after(session: Session, job_id: str, after_id: int, limit: int = 200) -> Sequence[JobEvent]:
    """What happened in a job after an event, oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after_id).order_by(JobEvent.id)
    return session.scalars(query.limit(limit)).all()


def generations(session: Session, job_id: str) -> list[dict[str, Any]]:
    """What a job's `generation` events tell, oldest first."""
    query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.kind == "generation")
    return list(session.scalars(query.order_by(JobEvent.id)))


def add_event(session: Session, job_id: str, kind: str, data: dict[str, Any]) -> None:
    """Leave an event in the same transaction as the change that it tells of.

    One transaction at a time leaves events of a job: whoever follows it never sees a number before a lower one.
    """
    session.execute(select(Job.id).where(Job.id == job_id).with_for_update())
    session.add(JobEvent(job_id=job_id, kind=kind, data=data))


def _unheld() -> Any:
    """No worker has it, or one that has vanished."""
    return or_(Job.owner.is_(None), Job.lease_until < now())


def _claimable() -> Any:
    return Job.state.not_in(TERMINAL) & (Job.run_after <= now()) & _unheld()


def claimable(session: Session) -> tuple[int, float]:
    """How many jobs wait for a worker, and for how many seconds the oldest has."""
    count, oldest = session.execute(
        select(func.count(), func.coalesce(now() - func.min(Job.updated_at), 0.0)).where(_claimable())
    ).one()
    return count, float(oldest)


def claim(session: Session, owner: str, lease_seconds: float, attempts: int) -> Claim | None:
    """Take the oldest job that waits for a worker; None when there is none.

    A job whose last `attempts` workers vanished before they finished a step ends as failed, one whose cancellation
    was asked for while it was held ends as cancelled.
    """
    query = select(Job).where(_claimable()).order_by(Job.created_at, Job.id).limit(1).with_for_update(skip_locked=True)
    while (job := session.scalar(query)) is not None:
        if job.cancel_requested_at is not None:
            _end(session, job.id, JobState.CANCELLED)
        elif job.attempts >= attempts:
            reason = (job.error or {}).get("detail", f"last held by {job.owner}")
            detail = f"{job.attempts} workers in a row were lost in one step: {reason}"
            _end(session, job.id, JobState.FAILED, error={"title": "worker lost", "detail": detail})
        else:
            return _take(session, job.id, owner, lease_seconds)
    return None


def _take(session: Session, job_id: str, owner: str, lease_seconds: float) -> Claim:
    values = {
        "owner": owner, "fence": Job.fence + 1, "attempts": Job.attempts + 1,
        "lease_until": now() + lease_seconds, "updated_at": now(),
    }  # fmt: skip
    fence = session.scalar(update(Job).where(Job.id == job_id).values(**values).returning(Job.fence))
    assert fence is not None
    return Claim(job_id, owner, fence)


def beat(session: Session, claim: Claim, lease_seconds: float, progress: dict[str, Any] | None = None) -> bool:
    """Renew the lease, store progress; True when the job shall be cancelled.

    Of `progress` events the newest is kept: a job of days would leave hundreds of thousands.

    Raises:
        LeaseLost: the claim does not hold any more.
    """
    values = {"lease_until": now() + lease_seconds} | ({} if progress is None else {"progress": progress})
    row = session.execute(_written(claim, values).returning(Job.cancel_requested_at)).one_or_none()
    if row is None:
        raise _lost(claim)
    if progress is not None:
        session.execute(delete(JobEvent).where(JobEvent.job_id == claim.job_id, JobEvent.kind == "progress"))
        add_event(session, claim.job_id, "progress", progress)
    return row.cancel_requested_at is not None


def load(session: Session, claim: Claim) -> Job:
    """The claimed job as it stands.

    Raises:
        LeaseLost: the claim does not hold any more.
    """
    return _write(session, claim, {})


def save_step(session: Session, claim: Claim, **changes: Any) -> None:
    """Store what a step has done; call it in the transaction that stores the step's rows.

    Args:
        changes: columns of the job. A new state leaves an event.

    Raises:
        LeaseLost: the claim does not hold any more; roll everything back.
    """
    old = session.scalar(select(Job.state).where(Job.id == claim.job_id))
    _write(session, claim, {"attempts": 0, "error": None, "steps": Job.steps + 1, **changes})
    if "state" in changes and changes["state"] is not old:
        add_event(session, claim.job_id, "state", {"state": changes["state"]})


def note(session: Session, claim: Claim, **changes: Any) -> None:
    """Store what a step knows before its work is done: unlike `save_step` it leaves the attempt counted.

    Raises:
        LeaseLost: the claim does not hold any more.
    """
    _write(session, claim, changes)


def excuse(session: Session, claim: Claim) -> None:
    """Do not count this attempt, however it ends: its worker was told to stop."""
    _write(session, claim, {"attempts": case((Job.attempts > 0, Job.attempts - 1), else_=0)})


def release(session: Session, claim: Claim, after_seconds: float = 0.0) -> None:
    """Give a job back unfinished; it can be claimed again after some seconds. Costs no attempt."""
    _give_back(session, claim, after_seconds, attempts=0)


def lose(session: Session, claim: Claim, reason: str, after_seconds: float) -> None:
    """Give a job back because its runner died; this costs one of its attempts."""
    _give_back(session, claim, after_seconds, error={"title": "worker lost", "detail": reason})


def _give_back(session: Session, claim: Claim, after_seconds: float, **changes: Any) -> None:
    """Nobody holds it any more; one that was to be cancelled has ended by that."""
    if _write(session, claim, {}).cancel_requested_at is not None:
        _end(session, claim.job_id, JobState.CANCELLED)
    else:
        _write(session, claim, {"owner": None, "lease_until": None, "run_after": now() + after_seconds, **changes})


def finish(session: Session, claim: Claim, state: JobState, **changes: Any) -> None:
    """End a job: a cancellation that was asked for before wins over any other end.

    Raises:
        LeaseLost: the claim does not hold any more.
    """
    cancelled = _write(session, claim, {"error": None, **changes}).cancel_requested_at is not None
    _end(session, claim.job_id, JobState.CANCELLED if cancelled else state)


def waiting_for(session: Session, device_name: str) -> set[str]:
    """Keys of the spaces of jobs that cannot begin before a device has measured them."""
    waiting = session.execute(select(Job.space_key, Job.spec).where(Job.state == JobState.PROFILING))
    return {key for key, spec in waiting if any(one.get("device") == device_name for one in spec["constraints"])}


def wake(session: Session, states: Sequence[JobState]) -> int:
    """Make jobs that wait in these states claimable now; returns how many."""
    done = session.execute(update(Job).where(Job.state.in_(states), Job.run_after > now()).values(run_after=0.0))
    assert isinstance(done, CursorResult)
    return done.rowcount


def _write(session: Session, claim: Claim, values: dict[str, Any]) -> Job:
    statement = _written(claim, values).returning(Job).execution_options(populate_existing=True)
    job: Job | None = session.scalar(statement)
    if job is None:
        raise _lost(claim)
    return job


def _written(claim: Claim, values: dict[str, Any]) -> Any:
    held = (Job.id == claim.job_id, Job.fence == claim.fence, Job.owner == claim.owner, Job.state.not_in(TERMINAL))
    return update(Job).where(*held).values(updated_at=now(), **values)


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost(f"job {claim.job_id} is no longer held by {claim.owner} (fence {claim.fence})")


def _end(session: Session, job_id: str, state: JobState, **changes: Any) -> None:
    """Into a terminal state, once; nobody scores for the job any more, or measures networks for it."""
    values = {"state": state, "owner": None, "lease_until": None, "finished_at": now(), "updated_at": now(), **changes}
    done = session.execute(update(Job).where(Job.id == job_id, Job.state.not_in(TERMINAL)).values(**values))
    assert isinstance(done, CursorResult)
    if done.rowcount:
        session.execute(delete(Chunk).where(Chunk.job_id == job_id))
        waits = (Work.kind == WorkKind.NETWORK, Work.state == WorkState.WAITING, Work.key.contains(job_id))
        session.execute(delete(Work).where(*waits), execution_options={"synchronize_session": False})
        _drop_checkpoint(session, job_id)
        facts = {name: value for name, value in changes.items() if name == "error"}
        add_event(session, job_id, "state", {"state": state, **facts})


def _drop_checkpoint(session: Session, job_id: str) -> None:
    """Nobody goes on from it any more.

    The file goes before the commit: should that fail, or a job that does just the same refer to it, too, training
    begins anew and ends the same.
    """
    memory = session.scalar(select(Job.memory).where(Job.id == job_id)) or {}
    sha256 = (memory.get("checkpoint") or {}).get("sha256")
    with suppress(OSError):
        blobs.remove(blobs.discard(session, sha256))


def phase_seconds(session: Session, job_id: str) -> dict[str, float]:
    """Seconds that a job has spent in each state but the last ones, read off its events."""
    query = select(JobEvent.data, JobEvent.created_at).where(JobEvent.job_id == job_id, JobEvent.kind == "state")
    events = session.execute(query.order_by(JobEvent.id)).all()
    seconds: dict[str, float] = {}
    ends = [event.created_at for event in events[1:]] + [clock(session)]
    for event, end in zip(events, ends, strict=True):
        state = event.data["state"]
        if state not in TERMINAL:
            seconds[state] = seconds.get(state, 0.0) + end - event.created_at
    return seconds


def newest(
    session: Session, *, limit: int, before: tuple[float, str] | None = None, state: JobState | None = None,
    space: str | None = None, dataset_id: str | None = None,
) -> Sequence[Job]:  # fmt: skip
    """Jobs without their memory, the newest first.

    Args:
        before: creation time and id of the job behind which the list begins.
        space: a space's name or its whole key.
    """
    query = select(Job).options(WITHOUT_MEMORY).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    if before is not None:
        query = query.where(tuple_(Job.created_at, Job.id) < tuple_(*before))
    if state is not None:
        query = query.where(Job.state == state)
    if space is not None:
        query = query.where(or_(Job.space_key == space, Job.space_key.startswith(f"{space}@", autoescape=True)))
    if dataset_id is not None:
        query = query.where(Job.dataset_id == dataset_id)
    return session.scalars(query).all()
