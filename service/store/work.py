"""Measuring work: planned once per table, leased to agents, done or failed.

First comes what running jobs wait for: networks that they have found, then profiles without which they cannot begin.
Then come the other profiles in their order, each one's layers by their expected error (`planning`) and before its whole
networks; and last those networks that are measured only to know the noise.

Work whose lease ran out is suspect, since it may have killed its agent: it is leased again behind the rest of its kind,
among fewer and fewer others, and has failed when it was lost alone.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from latency_profiler.calibration import FITTED, HELD_OUT, REPEATED, calibration_networks
from latency_profiler.cost import Statistic
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.planning import by_expected_error, plan_layers, refinement
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.store.bulk import insert_missing
from service.store.models import Measurement, Profile, Work, WorkKind, WorkState, clock, new_id, now

MOST_LEASES = 6
"""Work that was leased so often, thrice alone, and never answered has failed: agents also die for other reasons."""
FEWER = 4
"""A lease holds so many times fewer pieces of work for each time that they were lost before."""
FOR_JOB = 1
"""Priority of the layers of a profile that a job waits for; its networks come behind them."""
LAST = 1_000_000
"""Priority of what nobody waits for."""
OPEN = (WorkState.WAITING, WorkState.LEASED)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to measure: its key in a table, and what the agent is sent."""

    kind: WorkKind
    key: str
    payload: dict[str, Any]


def network_key(space: Space, channels: Sequence[int], purpose: str) -> str:
    """Key of a whole network; the purpose keeps measurements of one structure for different ends apart."""
    return f"{space.key}|{space.digest(channels)}|{purpose}"


def network_item(space: Space, channels: Sequence[int], purpose: str, statistic: Statistic = Statistic.P50) -> Item:
    """A whole network; the statistic is the one that its measurement is to decide about."""
    payload = {
        "nodes": [asdict(node) for node in space.nodes(channels)],
        "space_key": space.key, "channels": list(space.complete(channels)), "purpose": purpose,
        "statistic": statistic,
    }  # fmt: skip
    return Item(WorkKind.NETWORK, network_key(space, channels, purpose), payload)


def profile_items(space: Space, points: int, refined: Collection[str] = ()) -> list[Item]:
    """What a profile measures: layers, refined ones among them, then the networks that their sum is calibrated on."""
    more = [layer for layer in plan_layers(space) if layer.key in refined] if refined else []
    ordered = by_expected_error(space, [*plan_layers(space, points), *more])
    layers = [Item(WorkKind.LAYER, layer.key, {"layer": layer.to_json()}) for layer in ordered]
    return layers + [network_item(space, channels, purpose) for channels, purpose in calibration_networks(space)]


def profile_keys(profile: Profile) -> tuple[frozenset[str], frozenset[str]]:
    """Keys of a profile's layers, those that were planned since among them, and of its networks."""
    space = profile_space(profile)
    return layer_keys(space, profile.points).union(profile.refined or ()), _network_keys(space)


@lru_cache(maxsize=64)
def layer_keys(space: Space, points: int) -> frozenset[str]:
    """Keys of `plan_layers`."""
    return frozenset(layer.key for layer in plan_layers(space, points))


@lru_cache(maxsize=64)
def _network_keys(space: Space) -> frozenset[str]:
    return frozenset(network_key(space, channels, purpose) for channels, purpose in calibration_networks(space))


def profile_space(profile: Profile) -> Space:
    """The space of a profile."""
    return get_space(**profile.space)


def for_job(key: str) -> bool:
    """Whether a key is that of a network that a job waits for, and no layer or calibration network."""
    return "|" in key and key.rpartition("|")[2] not in (FITTED, HELD_OUT, REPEATED)


def is_canary(key: str) -> bool:
    """Whether a key is that of a layer that is measured again."""
    return "@" in key and "|" not in key


@lru_cache(maxsize=64)
def repeated_keys(space: Space) -> frozenset[str]:
    """Keys of the held-out networks of a space when they are measured once more."""
    return frozenset(item.key for item in _repeats(space))


def _repeats(space: Space) -> list[Item]:
    held_out = [channels for channels, purpose in calibration_networks(space) if purpose == HELD_OUT]
    return [network_item(space, channels, REPEATED) for channels in held_out]


def plan_profile(session: Session, profile: Profile, table_id: str, *, for_job: bool = False) -> None:
    """Plan what a table lacks of a profile: before all others for a job, else behind those that are planned already."""
    query = select(func.count()).select_from(Profile).where(
        Profile.device_id == profile.device_id, Profile.planned_table_id == table_id, Profile.id != profile.id
    )  # fmt: skip
    priority = FOR_JOB if for_job else 10 * (1 + session.scalars(query).one())
    measured = set(session.scalars(select(Measurement.key).where(Measurement.table_id == table_id)))
    every = profile_items(profile_space(profile), profile.points, frozenset(profile.refined or ()))
    items = [item for item in every if item.key not in measured]
    add(session, table_id, [item for item in items if item.kind is WorkKind.LAYER], priority)
    add(session, table_id, [item for item in items if item.kind is WorkKind.NETWORK], priority + 1)
    profile.planned_table_id = table_id
    if for_job:  # what another profile has planned already, too
        hurry(session, profile, table_id)


def refine(session: Session, profile: Profile, table: LatencyTable) -> bool:
    """Plan more of a profile whose layers are all measured, at most as many again; whether there is anything to do."""
    space, (known, _) = profile_space(profile), profile_keys(profile)
    first = layer_keys(space, profile.points)
    most = 2 * len(first) - len(known)
    if profile.refined is None or profile.planned_table_id is None or table.missing(plan_layers(space, profile.points)):
        return False
    found = refinement(space, profile.points, table, most)
    layers = [layer for layer in by_expected_error(space, found) if layer.key not in known]
    networks = select(func.min(Work.priority)).where(
        Work.table_id == profile.planned_table_id, Work.key.in_(_network_keys(space))
    )  # fmt: skip
    items = [Item(WorkKind.LAYER, layer.key, {"layer": layer.to_json()}) for layer in layers]
    add(session, profile.planned_table_id, items, (session.scalar(networks) or FOR_JOB + 1) - 1)
    profile.refined = [*profile.refined, *(item.key for item in items)]
    waiting = open_keys(session, profile.planned_table_id, WorkKind.LAYER)
    return any(item.key in waiting for item in items)


def hurry(session: Session, profile: Profile, table_id: str) -> None:
    """A job waits for a profile: what is left of it comes before all other profiles."""
    for place, keys in enumerate(profile_keys(profile)):
        behind = (Work.table_id == table_id, Work.state.in_(OPEN), Work.priority > FOR_JOB + place)
        waiting = session.execute(select(Work.id, Work.key).where(*behind))
        if rows := [{"id": id_, "priority": FOR_JOB + place} for id_, key in waiting if key in keys]:
            session.execute(update(Work), rows)


def plan_repeats(session: Session, table_id: str, space: Space) -> None:
    """Plan the held-out networks of a space once more: only when all else is there, so that minutes lie between."""
    add(session, table_id, _repeats(space), LAST)


def add(session: Session, table_id: str, items: Iterable[Item], priority: int) -> None:
    """Plan items for a table; what is planned, done or failed already stays as it is."""
    rows = [
        {"table_id": table_id, "kind": item.kind, "key": item.key, "payload": item.payload, "priority": priority}
        for item in items
    ]  # fmt: skip
    insert_missing(session, Work, rows)


def carry_over(session: Session, old_table_id: str, table_id: str) -> None:
    """Plan for a new table the networks that jobs still wait for under the old one."""
    query = select(Work).where(
        Work.table_id == old_table_id, Work.kind == WorkKind.NETWORK, Work.state.in_(OPEN)
    )  # fmt: skip
    for work in session.scalars(query.order_by(Work.id)):
        if for_job(work.key):
            add(session, table_id, [Item(work.kind, work.key, work.payload)], work.priority)


def give_up_lost(session: Session, table_id: str) -> set[str]:
    """Fail the work whose leases all ran out; returns its keys."""
    lost = (
        update(Work)
        .where(Work.table_id == table_id, Work.state == WorkState.LEASED)
        .where(Work.lease_until < now(), Work.attempts >= MOST_LEASES)
        .values(state=WorkState.FAILED, error=f"leased {MOST_LEASES} times without an answer")
    )
    return set(session.scalars(lost.returning(Work.key), execution_options={"synchronize_session": False}))


def lease(session: Session, table_id: str, limit: int, seconds: float) -> tuple[str, Sequence[Work]]:
    """Id of a new lease and the work that it holds; the caller holds the device's lock.

    Work whose lease ran out is given away again; its late result is still taken if it comes first.
    """
    query = select(Work).where(Work.table_id == table_id, _free())
    found = session.scalars(query.order_by(Work.priority, Work.attempts, Work.id).limit(limit)).all()
    lost = found[0].attempts if found else 0
    works = list(takewhile(lambda work: work.attempts == lost, found))[: max(1, limit // FEWER**lost)]
    lease_id, until = new_id(), clock(session) + seconds
    for work in works:
        work.state, work.lease_id, work.lease_until = WorkState.LEASED, lease_id, until
        work.attempts += 1
    session.flush()
    return lease_id, works


def free(session: Session, table_id: str) -> bool:
    """Whether there is work that `lease` would give."""
    return session.scalar(select(Work.id).where(Work.table_id == table_id, _free()).limit(1)) is not None


def renew(session: Session, table_id: str | None, lease_id: str, seconds: float) -> None:
    """Keep a lease's work for some more seconds; what was given away or answered meanwhile stays as it is."""
    session.execute(
        update(Work)
        .where(Work.table_id == table_id, Work.lease_id == lease_id, Work.state == WorkState.LEASED)
        .values(lease_until=now() + seconds),
        execution_options={"synchronize_session": False},
    )


def _free() -> ColumnElement[bool]:
    return or_(Work.state == WorkState.WAITING, and_(Work.state == WorkState.LEASED, Work.lease_until < now()))


def open_keys(session: Session, table_id: str, kind: WorkKind | None = None) -> set[str]:
    """Keys of the layers, the networks or both of a table that wait or are leased."""
    query = select(Work.key).where(Work.table_id == table_id, Work.state.in_(OPEN))
    return set(session.scalars(query if kind is None else query.where(Work.kind == kind)))


def retry_failed(session: Session, profile: Profile) -> None:
    """Give the failed work of a profile another chance."""
    query = select(Work).where(Work.table_id == profile.planned_table_id, Work.state == WorkState.FAILED)
    keys = frozenset[str]().union(*profile_keys(profile))
    for work in session.scalars(query):
        if work.key in keys:
            work.state, work.attempts, work.error = WorkState.WAITING, 0, None
