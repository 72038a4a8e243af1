"""What the agents of devices do: take work, and hand in what they measured.

Every call locks the device's row first (`devices.beat`): the agents of one device take turns, and a batch that is
repeated while its first answer is on the way finds that answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import numpy as np
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from latency_profiler.calibration import (
    FITTED,
    HELD_OUT,
    REPEATED,
    Parts,
    calibration_networks,
    fit_networks,
    fit_percentile,
    parts_of,
)
from latency_profiler.cost import Statistic
from latency_profiler.errors import SecateursError
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.spaces.space import Space
from service.store import canaries, devices, hosts, measurements, work
from service.store.models import (
    Device,
    LookupTable,
    Measurement,
    Profile,
    TableFit,
    Upload,
    Work,
    WorkKind,
    WorkState,
    new_id,
)

MOST_SECONDS = 1000.0
"""No run takes so long; a percentile beyond it is no number to be believed."""


class UploadConflict(SecateursError):
    """An upload's id was used before with other contents."""

    def __init__(self, upload_id: str) -> None:
        self.upload_id = upload_id
        super().__init__(f"upload {upload_id!r} was stored with other contents; use a new id for new results")


class FingerprintMismatch(SecateursError):
    """Results under a fingerprint that is not the device's current one: lease again, under the new one.

    Attributes:
        current: the SHA-256 that results must carry; None when no agent has presented one.
    """

    def __init__(self, device: str, given: str, current: str | None) -> None:
        self.current = current
        super().__init__(
            f"{device!r} measures under fingerprint {current}, not {given[:64]}; drop these results and lease anew"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One result of an agent: seconds with their raw values, or the reason why there are none."""

    work_id: int
    kind: WorkKind
    key: str
    seconds: float = 0.0
    iqr: float = 0.0
    steady: bool = True
    values: Sequence[float] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Results that an agent hands in at once; `fingerprint` is the SHA-256 that they were measured under."""

    upload_id: str
    lease_id: str
    fingerprint: str
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class Leased:
    """Work for an agent; `woken` says that jobs can go on now."""

    lease_id: str
    table_id: str
    works: Sequence[Work]
    woken: bool


def lease(
    session: Session,
    device: Device,
    facts: dict[str, Any],
    limit: int,
    seconds: float,
    *,
    connection: str | None = None,
    host: str | None = None,
) -> Leased:
    """Give an agent work for some seconds, after switching to the table of its fingerprint.

    New facts of what the agent runs on open a new table; known ones bring their old table back. A new `connection` (the
    agent's process) has the table checked. While another device of the same `host` measures there is no work.
    """
    devices.beat(session, device)
    table_id = measurements.open_table(session, device, facts)
    woken = measurements.switch(session, device, table_id)
    measurements.plan(session, device)
    canaries.watch(session, device, session.get_one(LookupTable, table_id), connection)
    woken |= _settle(session, device, work.give_up_lost(session, table_id))
    if host is not None and limit > 0:
        session.flush()
        if not work.free(session, table_id) or not hosts.take(session, host, device, seconds):
            return Leased(new_id(), table_id, (), woken)
    lease_id, works = work.lease(session, table_id, limit, seconds)
    return Leased(lease_id, table_id, works, woken)


def renew(session: Session, device: Device, lease_id: str, seconds: float) -> None:
    """Let an agent that still measures keep its work, and its host, for some more seconds."""
    devices.beat(session, device)
    work.renew(session, device.table_id, lease_id, seconds)
    hosts.renew(session, device, seconds)


def record(session: Session, device: Device, batch: Batch) -> tuple[dict[str, int], bool]:
    """Store an agent's results; the same batch again is answered with the stored response.

    The first measurement of a key stands, and a measurement stands against a failure whichever comes first: results
    may come repeated, late, split or in any order. Work that the table does not know is ignored.

    Returns:
        The response: how many were stored, repeated, failed, ignored. And whether jobs can go on now.

    Raises:
        UploadConflict: the id was used with other contents.
        FingerprintMismatch: the results are not those of the current table.
    """
    devices.beat(session, device)
    sha = measurements.canonical_sha(asdict(batch))
    if (stored := session.get(Upload, (device.id, batch.upload_id))) is not None:
        if stored.body_sha != sha:
            raise UploadConflict(batch.upload_id)
        return stored.response, False
    table = measurements.current_table(session, device)
    fingerprint = measurements.current_fingerprint(session, device)
    if table is None or fingerprint is None or fingerprint.sha256 != batch.fingerprint:
        raise FingerprintMismatch(device.name, batch.fingerprint, fingerprint.sha256 if fingerprint else None)
    hosts.release(session, device)
    response, touched = _take(session, table, batch)
    session.add(Upload(device_id=device.id, upload_id=batch.upload_id, body_sha=sha, response=response))
    session.flush()
    return response, _settle(session, device, touched)


def _take(session: Session, table: LookupTable, batch: Batch) -> tuple[dict[str, int], set[str]]:
    """Store what is new of a batch; returns the counts, and the keys whose work ended by it."""
    ids = {outcome.work_id for outcome in batch.outcomes}
    known = {row.id: row for row in session.scalars(select(Work).where(Work.table_id == table.id, Work.id.in_(ids)))}
    counts, touched, rows = dict.fromkeys(("stored", "repeated", "failed", "ignored"), 0), set(), []
    for outcome in batch.outcomes:
        item = known.get(outcome.work_id)
        if item is None or (item.kind, item.key) != (outcome.kind, outcome.key):
            counts["ignored"] += 1
        elif item.state is WorkState.DONE or (item.state is WorkState.FAILED and outcome.error is not None):
            counts["repeated"] += 1
        else:
            touched.add(item.key)
            item.error = outcome.error
            item.state = WorkState.DONE if outcome.error is None else WorkState.FAILED
            counts["stored" if outcome.error is None else "failed"] += 1
            if outcome.error is None:
                rows.append(_measured(table, item, outcome, batch.upload_id))
    if rows:
        session.execute(insert(Measurement), rows)
    return counts, touched


def _measured(table: LookupTable, item: Work, outcome: Outcome, upload_id: str) -> dict[str, Any]:
    return {
        "table_id": table.id, "fingerprint_id": table.fingerprint_id, "kind": item.kind, "key": item.key,
        "payload": item.payload, "seconds": outcome.seconds, "p90": _p90(outcome), "iqr": outcome.iqr,
        "steady": outcome.steady, "values": list(outcome.values), "conditions": dict(outcome.conditions),
        "upload_id": upload_id,
    }  # fmt: skip


def _p90(outcome: Outcome) -> float:
    """What the agent says of its single runs, else the percentile of the values; less what is not the item's own.

    That is what the agent says (`rest`; nothing for a network), else by what `seconds` is less than the values.
    """
    p90, rest = (outcome.conditions.get(name) for name in ("p90", "rest"))
    if not _is_seconds(p90):
        p90 = float(np.percentile(outcome.values, 90))
    if not _is_seconds(rest):
        rest = 0.0 if "rest" in outcome.conditions else float(np.median(outcome.values)) - outcome.seconds
    return max(outcome.seconds, p90 - rest)


def _is_seconds(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < MOST_SECONDS


def _settle(session: Session, device: Device, touched: set[str]) -> bool:
    """After work ended: fit the profiles that became complete, and wake jobs where something they wait for is there."""
    if not touched or device.table_id is None:
        return False
    layers, networks = (work.open_keys(session, device.table_id, kind) for kind in (WorkKind.LAYER, WorkKind.NETWORK))
    ready = any(map(work.for_job, touched)) and not any(map(work.for_job, networks))
    for profile in measurements.profiles(session, device):
        if profile.planned_table_id != device.table_id:
            continue
        space = work.profile_space(profile)
        repeated = work.repeated_keys(space)
        if _finer(session, device, profile, touched, layers):
            continue
        if _complete(profile, touched, layers | networks):
            _fit(session, device, space)
            work.plan_repeats(session, device.table_id, space)
            ready = True
        elif touched & repeated and not networks & repeated:
            _fit(session, device, space)
    if any(map(work.is_canary, touched)):
        canaries.settle(session, session.get_one(LookupTable, device.table_id))
    return ready and measurements.wake(session)


def _finer(session: Session, device: Device, profile: Profile, touched: set[str], open_layers: set[str]) -> bool:
    """Whether the last of a profile's layers have ended just now and show that more are needed."""
    layers, _ = work.profile_keys(profile)
    if touched.isdisjoint(layers) or not layers.isdisjoint(open_layers):
        return False
    return work.refine(session, profile, measurements.load_table(session, device.name))


def _complete(profile: Profile, touched: set[str], open_keys: set[str]) -> bool:
    """Whether all of a profile has ended, and something of it just now."""
    every = frozenset[str]().union(*work.profile_keys(profile))
    return not touched.isdisjoint(every) and every.isdisjoint(open_keys)


def _fit(session: Session, device: Device, space: Space) -> None:
    """Fit each statistic of a space from the networks of the current table; a table without a line keeps none."""
    table = measurements.load_table(session, device.name)
    median = fit_networks(*_networks(session, device, space, table, Statistic.P50))
    if median is None:
        return
    tail = fit_percentile(median, *_networks(session, device, space, table, Statistic.P90))
    for statistic, fit in ((Statistic.P50, median), (Statistic.P90, tail)):
        if fit is not None:
            session.merge(TableFit(table_id=device.table_id, space_key=space.key, statistic=statistic, **asdict(fit)))


def _networks(
    session: Session, device: Device, space: Space, table: LatencyTable, statistic: Statistic
) -> tuple[list[tuple[Parts, float]], list[tuple[Parts, float]], list[tuple[float, float]]]:
    """The networks that were measured: to fit, held out, and measured again, as `fit_networks` takes them.

    Those that were measured again are compared as they ran, at whatever speed: the noise is what a user will meet.
    """
    pairs: dict[str, list[tuple[Parts, float]]] = {FITTED: [], HELD_OUT: []}
    repeated: list[tuple[float, float]] = []
    for channels, purpose in calibration_networks(space):
        key = work.network_key(space, channels, purpose)
        seconds = measurements.measured_network(session, device, key, statistic)
        if seconds is None or table.missing(space.layers(channels)):
            continue
        later = work.network_key(space, channels, REPEATED)
        again = measurements.measured_network(session, device, later, statistic)
        if purpose == HELD_OUT and again is not None:
            before, after = (measurements.speed_then(session, device, one) for one in (key, later))
            repeated.append((seconds / before, again / after))
            seconds = (seconds + again) / 2
        pairs[purpose].append((parts_of(table, space, channels), seconds))
    return pairs[FITTED], pairs[HELD_OUT], repeated
