"""Figures about everything that is stored."""

from typing import NamedTuple

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from service.store import jobs
from service.store.devices import ALIVE_SECONDS
from service.store.models import Candidate, Device, Job, JobState, now


class Statistics(NamedTuple):
    """Counts by kind; `oldest` is in seconds."""

    jobs: dict[str, int]
    devices: dict[str, int]
    candidates: int
    claimable: int
    oldest: float


def read(session: Session) -> Statistics:
    """The figures of this moment."""
    states = dict.fromkeys((state.value for state in JobState), 0)
    for state, count in session.execute(select(Job.state, func.count()).group_by(Job.state)):
        states[state.value] = count
    return Statistics(states, _devices(session), _candidates(session), *jobs.claimable(session))


def _devices(session: Session) -> dict[str, int]:
    fresh = case((Device.beat_at.is_(None), "never"), (Device.beat_at > now() - ALIVE_SECONDS, "fresh"), else_="away")
    counts = {"fresh": 0, "away": 0, "never": 0}
    counts.update((kind, count) for kind, count in session.execute(select(fresh, func.count()).group_by(fresh)))
    return counts


def _candidates(session: Session) -> int:
    """Rows are never deleted one by one, so the highest id is a count that needs no scan."""
    return session.scalar(select(func.coalesce(func.max(Candidate.id), 0))) or 0
