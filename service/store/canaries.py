"""Canaries: some layers of a table that are measured again, to see whether the device is still what it was.

They are measured whenever an agent connects, and daily. Every check's measurements stay, under keys of their own.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.store import work
from service.store.models import Device, LookupTable, Measurement, WorkKind, clock

Measured = tuple[str, dict[str, Any], float]
"""Key, payload and seconds of a layer."""
CANARIES = 7
"""Layers of a check: enough for a median that three disturbed ones cannot move, and measured within seconds."""
CONNECTIONS, CONNECTION_DIGITS = 7, 8
"""Of a device that are remembered, and digits of each."""
FIRST = -1
"""Their priority: before the networks that jobs wait for, whose verdict would be no better than the table."""
CHECK_SECONDS = 86400.0
CHECK_SECONDS_STALE = 3600.0
"""A table that went stale is looked at more often: the machine may have been throttled for a while only."""
MOST_DRIFT = 0.05
"""Change of the canaries' median beyond which a table is stale: more than the mean error that a trusted table may
have, and more than the noise of a median of seven layers."""


def watch(session: Session, device: Device, table: LookupTable, connection: str | None) -> None:
    """Plan a check of the current table where one is due: for a new connection, or when the last one is too old."""
    connected = connection is not None and _new(device, connection)
    patience = CHECK_SECONDS_STALE if table.stale else CHECK_SECONDS
    age = clock(session) - (table.checked_at or table.created_at)
    if connected or age > patience:
        _plan(session, table)


def _new(device: Device, connection: str) -> bool:
    """Whether a connection is none of the device's latest; it is one of them from now on.

    More than one is remembered: two agents that take turns would have the table checked for ever.
    """
    known, one = (device.connection or "").split(), hashlib.sha256(connection.encode()).hexdigest()[:CONNECTION_DIGITS]
    if one in known:
        return False
    device.connection = " ".join([*known, one][-CONNECTIONS:])
    return True


def settle(session: Session, table: LookupTable) -> None:
    """After canaries ended: what a complete check says about the table.

    A table goes stale when two checks in a row are off, so that one disturbance does not decide, and is good again as
    soon as one is not.
    """
    if work.open_keys(session, table.id, WorkKind.CANARY):
        return
    table.checked_at = clock(session)
    drift = _drift(session, table)
    if drift is None:
        return
    before, table.drift = table.drift, drift
    if abs(drift) <= MOST_DRIFT:
        table.stale = None
    elif before is None or abs(before) <= MOST_DRIFT:
        _plan(session, table)
    else:
        way = "slower" if drift > 0 else "faster"
        table.stale = (
            f"layers that were measured again are {abs(drift):.1%} {way} than in the table ({MOST_DRIFT:.0%} are "
            "allowed); `secateurs profile … --again` measures it anew"
        )


def _plan(session: Session, table: LookupTable) -> None:
    """Plan a check, unless one is under way or the table has too few layers."""
    query = select(Measurement.key, Measurement.payload, Measurement.seconds).where(
        Measurement.table_id == table.id, Measurement.kind == WorkKind.LAYER
    )  # fmt: skip
    found = session.execute(query.order_by(Measurement.seconds, Measurement.key))
    rows = [(key, payload, seconds) for key, payload, seconds in found]
    if len(rows) < CANARIES or work.open_keys(session, table.id, WorkKind.CANARY):
        return
    table.checks += 1
    items = [
        work.Item(WorkKind.CANARY, f"{key}@{table.checks}", {"layer": payload["layer"]})
        for key, payload, _ in _spread(rows)
    ]
    work.add(session, table.id, items, FIRST)


def _spread(rows: Sequence[Measured]) -> list[Measured]:
    """Of layers in the order of their cost, those that halve equal parts of the whole time."""
    sums = list(accumulate(seconds for _, _, seconds in rows))
    middles = [(2 * part + 1) / (2 * CANARIES) * sums[-1] for part in range(CANARIES)]
    return [rows[at] for at in dict.fromkeys(bisect_left(sums, middle) for middle in middles)]


def _drift(session: Session, table: LookupTable) -> float | None:
    """By what share the last check's layers took longer; None where none could be measured."""
    query = select(Measurement.key, Measurement.seconds).where(Measurement.table_id == table.id)
    again = dict(session.execute(query.where(Measurement.kind == WorkKind.CANARY)).all())
    check = f"@{table.checks}"
    seconds = {key.removesuffix(check): value for key, value in again.items() if key.endswith(check)}
    first = session.execute(query.where(Measurement.kind == WorkKind.LAYER, Measurement.key.in_(seconds)))
    ratios = [seconds[key] / value for key, value in first]
    return median(ratios) - 1.0 if ratios else None
