"""Lookup tables in the database, and what is asked of them: profiles, coverage, whole networks.

A device has one table per fingerprint and one current table: that of the fingerprint that its agent presented last.
Calls that change a device's tables lock its row first (`devices.lock`, `devices.beat`), so they take turns.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from latency_profiler.calibration import Verdict, judge
from latency_profiler.cost import Statistic
from latency_profiler.errors import MeasurementFailed, NotCalibrated
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, Fit, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.store import devices, jobs, work
from service.store.bulk import insert_missing
from service.store.models import (
    Device,
    Fingerprint,
    JobState,
    LookupTable,
    Measurement,
    Profile,
    TableFit,
    Work,
    WorkKind,
    WorkState,
)  # fmt: skip

Mode = Literal["full", "sampled", "on-demand"]
ON_DEMAND: Mode = "on-demand"
FULL = 31
"""Points of a profile that measures every choice."""
SAMPLED = 10
"""Points that suffice to price every structure of a space, interpolated."""


def canonical_sha(value: Any) -> str:
    """SHA-256 of a JSON value, written with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def request_profile(
    session: Session, device: Device, space_arguments: dict[str, Any], mode: Mode, points: int, refine: bool = True
) -> Profile:
    """Ask for the layers of a space to be measured on a device; asking again changes nothing.

    `space_arguments` are those of `get_space`, `points` the widths per slot (a full profile has all of them, whatever
    is given), which are refined where interpolation fails. An on-demand profile sleeps until a job needs it.
    """
    space, points = get_space(**space_arguments), FULL if mode == "full" else points
    row = {
        "device_id": device.id, "space_key": space.key, "space": space_arguments, "mode": mode, "points": points,
        "refined": [] if refine and points < FULL else None,
    }  # fmt: skip
    insert_missing(session, Profile, [row])
    profile = session.scalars(
        select(Profile).filter_by(device_id=device.id, space_key=space.key, mode=mode, points=points)
    ).one()
    _plan_for(session, device, [profile])
    return profile


def request_for_job(session: Session, device: Device, space_arguments: dict[str, Any]) -> Profile:
    """Ask for what a job waits for, before all other profiles: the space's on-demand profile, else a sampled one."""
    key = get_space(**space_arguments).key
    sleeping = [one for one in profiles(session, device) if one.space_key == key and one.mode == ON_DEMAND]
    profile = sleeping[0] if sleeping else request_profile(session, device, space_arguments, "sampled", SAMPLED)
    if (table_id := measured_table(session, device)) is not None:
        if profile.planned_table_id == table_id:
            work.hurry(session, profile, table_id)
        else:
            work.plan_profile(session, profile, table_id, for_job=True)
    return profile


def profiles(session: Session, device: Device) -> Sequence[Profile]:
    """A device's profiles, oldest first."""
    query = select(Profile).where(Profile.device_id == device.id)
    return session.scalars(query.order_by(Profile.created_at, Profile.id)).all()


def counts(session: Session, device: Device) -> dict[WorkState, int]:
    """How much work of the device's current table is in each state."""
    query = select(Work.state, func.count()).where(Work.table_id == device.table_id).group_by(Work.state)
    found = dict.fromkeys(WorkState, 0)
    found.update(session.execute(query).all())
    return found


def size(session: Session, table_id: str) -> tuple[int, int]:
    """Numbers of layers and of networks in a table."""
    query = select(Measurement.kind, func.count()).where(Measurement.table_id == table_id).group_by(Measurement.kind)
    found = dict(session.execute(query).all())
    return found.get(WorkKind.LAYER, 0), found.get(WorkKind.NETWORK, 0)


def unsteady(session: Session, table_id: str) -> int:
    """How many layers and networks of a table have an uncertain median."""
    query = select(func.count()).where(Measurement.table_id == table_id, Measurement.kind != WorkKind.CANARY)
    query = query.where(Measurement.steady.is_(False))
    return session.scalars(query).one()


def current_table(session: Session, device: Device) -> LookupTable | None:
    """The table of the fingerprint that the device's agent presented last."""
    return session.get(LookupTable, device.table_id) if device.table_id else None


def current_fingerprint(session: Session, device: Device) -> Fingerprint | None:
    """What the device's agent runs on, as it said last."""
    table = current_table(session, device)
    return session.get(Fingerprint, table.fingerprint_id) if table else None


def load_table(session: Session, device_name: str, statistic: Statistic = Statistic.P50) -> LatencyTable:
    """The current table of a device: measured layers and fits; empty when no agent has come yet.

    The entries are medians whatever the statistic: what makes one run in ten slow happens to the machine, not to a
    layer, so that a network's 90th percentile follows from the medians of its layers (`calibration.fit_percentile`).

    Raises:
        NotFound: no device has this name.
    """
    device = devices.get(session, device_name)
    fingerprint = current_fingerprint(session, device)
    if device.table_id is None or fingerprint is None:
        return LatencyTable(device.name, "")
    entries = {entry.layer.key: entry for entry in _entries(session, device.table_id)}
    return LatencyTable(device.name, fingerprint.sha256, entries, fits(session, device.table_id, statistic))


def pricing_table(session: Session, device_name: str, space: Space, statistic: Statistic) -> LatencyTable:
    """The current table of a device, to price structures of a space by; the sum of layers alone is a median.

    Raises:
        NotFound: no device has this name.
        NotCalibrated: the table cannot tell another statistic.
    """
    table = load_table(session, device_name, statistic)
    if statistic is not Statistic.P50 and table.fit(space) is None:
        raise NotCalibrated(device_name, space.key, statistic)
    return table


def fits(session: Session, table_id: str, statistic: Statistic = Statistic.P50) -> dict[str, Fit]:
    """Space key → fit of a table."""
    rows = session.scalars(select(TableFit).where(TableFit.table_id == table_id, TableFit.statistic == statistic))
    names = Fit.__dataclass_fields__
    return {row.space_key: Fit(**{name: getattr(row, name) for name in names}) for row in rows}


def verdict(session: Session, device: Device, space_key: str, statistic: Statistic = Statistic.P50) -> Verdict:
    """How far the current table's prices of a space are to be trusted."""
    table = current_table(session, device)
    if table is None:
        return judge(None)
    return judge(fits(session, table.id, statistic).get(space_key), table.stale, table.drift or 0.0)


def layers_missing(session: Session, device_name: str, space: Space) -> list[str]:
    """Keys of the layers that must be measured before every structure of a space can be priced.

    Raises:
        NotFound: no device has this name.
    """
    return load_table(session, device_name).missing(plan_layers(space, SAMPLED))


def failures(session: Session, device: Device) -> dict[str, str]:
    """Key → reason of all that could not be measured for the device's current table."""
    query = select(Work.key, Work.error).where(Work.table_id == device.table_id, Work.state == WorkState.FAILED)
    return {key: error or "failed" for key, error in session.execute(query)}


def request_networks(
    session: Session,
    device: Device,
    items: Iterable[tuple[Space, Sequence[int], str]],
    priority: int = 0,
    statistic: Statistic = Statistic.P50,
) -> list[str]:
    """Ask for whole networks (space, channels, purpose) to be measured for the device's current table.

    Asking again changes nothing, so a job asks whenever it looks: the table may be another one by then. Nothing is
    planned until an agent has come. A statistic other than the median takes more runs, and both are measured.

    Returns:
        Their keys, for `network_seconds`.
    """
    networks = [work.network_item(space, channels, purpose, statistic) for space, channels, purpose in items]
    if (table_id := measured_table(session, device)) is not None:
        work.add(session, table_id, networks, priority)
    return [network.key for network in networks]


def network_seconds(session: Session, device: Device, key: str, statistic: Statistic = Statistic.P50) -> float | None:
    """Measured seconds of a network on the device's current table; None while it waits.

    Raises:
        MeasurementFailed: the device tried and could not; the message is its reason.
    """
    seconds = measured_network(session, device, key, statistic)
    if seconds is None and (reason := failures(session, device).get(key)) is not None:
        raise MeasurementFailed(f"{device.name} could not measure {key}: {reason}")
    return seconds


def open_table(session: Session, device: Device, facts: dict[str, Any]) -> str:
    """Id of the device's table for these facts, made where there is none; the device is locked."""
    sha = canonical_sha(facts)
    fingerprint = session.scalar(select(Fingerprint).filter_by(device_id=device.id, sha256=sha))
    if fingerprint is None:
        fingerprint = Fingerprint(device_id=device.id, sha256=sha, facts=facts)
        session.add(fingerprint)
        session.flush()
        session.add(LookupTable(device_id=device.id, fingerprint_id=fingerprint.id))
    query = select(LookupTable.id).filter_by(device_id=device.id, fingerprint_id=fingerprint.id)
    return session.scalars(query.order_by(LookupTable.version.desc()).limit(1)).one()


def measure_anew(session: Session, device: Device) -> bool:
    """Open the next version of the current table: all of the device's profiles are measured again for it.

    Jobs that have begun keep the table that they hold; the old one stays stored. Nothing happens while no agent has
    come, or nothing is measured yet.

    Returns:
        Whether there is a new table.
    """
    devices.lock(session, device)
    if (table_id := measured_table(session, device)) is None or size(session, table_id) == (0, 0):
        return False
    old = session.get_one(LookupTable, table_id)
    new = LookupTable(device_id=device.id, fingerprint_id=old.fingerprint_id, version=old.version + 1)
    session.add(new)
    session.flush()
    switch(session, device, new.id)
    old.stale = "it was measured anew"
    return True


def switch(session: Session, device: Device, table_id: str) -> bool:
    """Make a table the current one; returns whether jobs that wait for a device must look again."""
    if device.table_id == table_id:
        return False
    if device.table_id is not None:
        work.carry_over(session, device.table_id, table_id)
        _retire(session, device.table_id, table_id)
        devices.forget_prices(session, device, table_id)
    device.table_id = table_id
    plan(session, device)
    return wake(session)


def _retire(session: Session, old_id: str, new_id: str) -> None:
    """Say of a table why another one is current; one that comes back is checked by its agent's connection."""
    old, new = session.get_one(LookupTable, old_id), session.get_one(LookupTable, new_id)
    was, now_is = (session.get_one(Fingerprint, table.fingerprint_id).facts for table in (old, new))
    changed = [name for name in sorted({*was, *now_is}) if was.get(name) != now_is.get(name)]
    old.stale = f"the agent runs on something else now: another {', '.join(changed)}"[:1000]
    new.stale, new.drift = None, None


def plan(session: Session, device: Device) -> None:
    """Plan the profiles that the current table has no work for yet."""
    _plan_for(session, device, profiles(session, device))


def _plan_for(session: Session, device: Device, wanted: Sequence[Profile]) -> None:
    table_id = measured_table(session, device)
    new = [profile for profile in wanted if profile.planned_table_id != table_id]
    if table_id is None or not new:
        return
    waiting = jobs.waiting_for(session, device.name)
    needed = {profile.id for profile in new if profile.space_key in waiting and _for_jobs(profile)}
    for profile in sorted(new, key=lambda one: one.id not in needed):
        if profile.id in needed or profile.mode != ON_DEMAND:
            work.plan_profile(session, profile, table_id, for_job=profile.id in needed)


def _for_jobs(profile: Profile) -> bool:
    """Whether it is one that `request_for_job` takes."""
    return profile.mode == ON_DEMAND or (profile.mode == "sampled" and profile.points == SAMPLED)


def measured_table(session: Session, device: Device) -> str | None:
    """Id of the current table if an agent fills it: nobody can add to an imported one."""
    fingerprint = current_fingerprint(session, device)
    return None if fingerprint is None or fingerprint.facts.get("imported") is True else device.table_id


def wake(session: Session) -> bool:
    """Let the jobs that wait for a device look again; returns whether there are any."""
    return jobs.wake(session, (JobState.PROFILING, JobState.SEARCHING, JobState.VERIFYING)) > 0


def _entries(session: Session, table_id: str) -> list[Entry]:
    """Measured layers of a table; the raw values stay in the database."""
    count = func.json_array_length(Measurement.values)
    rows = session.execute(
        select(Measurement.payload, Measurement.seconds, Measurement.iqr, count, Measurement.steady)
        .where(Measurement.table_id == table_id, Measurement.kind == WorkKind.LAYER)
        .order_by(Measurement.key)
    )
    return [
        Entry(Layer.from_json(payload["layer"]), seconds, iqr, payload.get("count", count), steady)
        for payload, seconds, iqr, count, steady in rows
    ]  # fmt: skip


def measured_network(session: Session, device: Device, key: str, statistic: Statistic = Statistic.P50) -> float | None:
    """Seconds of a network in the device's current table, None where there are none."""
    column = Measurement.p90 if statistic is Statistic.P90 else Measurement.seconds
    seconds: float | None = session.scalar(_network(device, key, column))
    return seconds


def speed_then(session: Session, device: Device, key: str) -> float:
    """Share of its usual speed at which the machine measured a network (`latency_profiler.reference`)."""
    conditions = session.scalar(_network(device, key, Measurement.conditions)) or {}
    speed = conditions.get("speed")
    return speed if isinstance(speed, float) and 0.1 < speed < 10 else 1.0


def _network(device: Device, key: str, column: Any) -> Any:
    return select(column).where(
        Measurement.table_id == device.table_id, Measurement.kind == WorkKind.NETWORK, Measurement.key == key
    )  # fmt: skip
