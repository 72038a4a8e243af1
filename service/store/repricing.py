"""Re-pricing: every structure that was ever found has its latency on every device whose table can price its space.

*Prices* are all that a table says of the structures of a space (`LatencyModel`), named by a digest, and every stored
latency carries the digest of its prices. A *walk* replaces those that carry another one, in the order of the
structures' ids and a chunk per transaction. A walk that is killed begins anew and finds what is left; two at once do
the same work twice. Nothing is trained or evaluated for it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sqlalchemy import Text, and_, cast, func, select
from sqlalchemy.orm import Session

from latency_profiler.cost import Ints, Statistic
from latency_profiler.errors import MissingLatencies, NotCalibrated
from latency_profiler.lookup_table import Floats, LatencyModel, LatencyTable
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space, other_last
from service.store import devices, measurements, work
from service.store.bulk import upsert, upsert_columns
from service.store.models import (
    Device,
    Measurement,
    Pricing,
    Structure,
    StructureLatency,
    WorkKind,
)

CHUNK = 5000
"""Structures per transaction: SQLite's only writer is held for some tenths of a second."""


@dataclass(frozen=True, slots=True)
class Due:
    """Structures of a space that a device may have to price; `source` names what prices would be made from."""

    device_id: str
    table_id: str
    space_key: str
    source: str


def due(session: Session) -> list[Due]:
    """Devices and spaces whose table, fit or structures are others than when they were looked at.

    A space is not due while an agent still measures layers of it: every batch would change its prices. What nobody
    measures, since the device is away, is not waited for.
    """
    spaces = _counts(session)
    done = {(row.device_id, row.space_key): row for row in session.scalars(select(Pricing))}
    found = []
    for device in session.scalars(select(Device).where(Device.table_id.is_not(None)).order_by(Device.name)):
        assert device.table_id is not None
        sources = {key: _source(session, device.table_id, key) for key in spaces}
        changed = [key for key in spaces if not _settled(done.get((device.id, key)), sources[key], spaces[key])]
        waiting = _families(session, device.table_id) if changed and devices.alive(session, device) else set()
        for key in changed:
            space = _space(session, key)
            if waiting.isdisjoint(layer.family for layer in space.layers(space.channels(space.largest))):
                found.append(Due(device.id, device.table_id, key, sources[key]))
    return found


def _counts(session: Session) -> dict[str, int]:
    query = select(Structure.space_key, func.count()).group_by(Structure.space_key).order_by(Structure.space_key)
    return dict(session.execute(query).all())


def _source(session: Session, table_id: str, space_key: str) -> str:
    """Layers of a table are only ever added, so their number says which there are."""
    layers = select(func.count()).where(Measurement.table_id == table_id, Measurement.kind == WorkKind.LAYER)
    fits_of = [measurements.fits(session, table_id, statistic) for statistic in Statistic]
    found = [fits.get(key) for fits in fits_of for key in (space_key, other_last(space_key))]
    fits = measurements.canonical_sha([asdict(fit) if fit else None for fit in found])
    return f"{table_id}:{session.scalars(layers).one()}:{fits[:32]}"


def _settled(row: Pricing | None, source: str, structures: int) -> bool:
    return row is not None and row.source == source and (row.prices is None or row.structures == structures)


def _families(session: Session, table_id: str) -> set[str]:
    """Families of the layers that are still being measured."""
    return {key.rpartition(":")[0] for key in work.open_keys(session, table_id, WorkKind.LAYER)}


def _space(session: Session, space_key: str) -> Space:
    arguments = session.scalars(select(Structure.space).where(Structure.space_key == space_key).limit(1)).one()
    return get_space(**arguments)


class Walk:
    """Prices the structures of a space on a device; `step` in a transaction each, until it says that it has ended."""

    def __init__(self, session: Session, due: Due) -> None:
        self._due, self._after = due, ""
        self._prices = _read_prices(session, due)
        self._digest = self._prices.digest if self._prices else None
        self._done = session.scalars(select(func.count()).where(Structure.space_key == due.space_key)).one()
        self._left = session.scalars(self._outdated(func.count())).one() if self._prices else 0
        self._done -= self._left

    def step(self, session: Session) -> bool:
        """Price the next chunk; False when there is none, or when the device has gone or uses another table."""
        device = session.get(Device, self._due.device_id, with_for_update={"read": True, "key_share": True})
        if device is None or device.table_id != self._due.table_id:
            return False
        chunk, more = self._next(session) if self._prices else ([], False)
        if chunk:
            self._done, self._left = self._done + len(chunk), self._left - len(chunk)
            common = {"device_id": self._due.device_id, "prices": self._digest}
            upsert_columns(session, StructureLatency, self._priced(chunk), common)
        row = {
            "device_id": self._due.device_id, "space_key": self._due.space_key, "source": self._due.source,
            "prices": self._digest, "structures": self._done,
        }  # fmt: skip
        upsert(session, Pricing, [row])
        return more

    def _next(self, session: Session) -> tuple[Sequence[Any], bool]:
        """Ids and channels (as JSON) of the next structures that have other prices, and whether more may follow.

        Where few have, they are looked for; where many have, the structures are gone through as they stand in the
        index, and those that have these prices are left out here.
        """
        columns, here = (Structure.id, cast(Structure.channels, Text)), Structure.id > self._after
        few = self._left <= CHUNK
        query = self._outdated(*columns) if few else select(*columns).where(Structure.space_key == self._due.space_key)
        rows = session.execute(query.where(here).order_by(Structure.id).limit(CHUNK)).all()
        before, self._after = self._after, rows[-1][0] if rows else self._after
        known = set() if few else set(session.scalars(self._current(before, self._after)))
        return [row for row in rows if row[0] not in known], len(rows) == CHUNK

    def _outdated(self, *columns: Any) -> Any:
        """Structures without a latency from the prices.

        A join and a comparison behind it: PostgreSQL takes "no row with these prices exists" for rare where it has no
        statistics yet, and then compares every structure with every latency.
        """
        latency = and_(
            StructureLatency.structure_id == Structure.id, StructureLatency.device_id == self._due.device_id
        )  # fmt: skip
        query = select(*columns).select_from(Structure).outerjoin(StructureLatency, latency)
        return query.where(
            Structure.space_key == self._due.space_key, StructureLatency.prices.is_distinct_from(self._digest)
        )

    def _current(self, after: str, last: str) -> Any:
        """Ids in a range of those that have a latency from the prices."""
        here = (StructureLatency.structure_id > after, StructureLatency.structure_id <= last)
        return select(StructureLatency.structure_id).where(
            *here, StructureLatency.device_id == self._due.device_id, StructureLatency.prices == self._digest
        )

    def _priced(self, chunk: Sequence[Any]) -> dict[str, Sequence[Any]]:
        """Columns of latencies, of the structures that can be priced."""
        assert self._prices is not None
        ids, texts = zip(*chunk, strict=True)
        channels = np.array(json.loads(f"[{','.join(texts)}]"), dtype=np.int64)  # parsed at once: it is half the time
        seconds = self._prices.of(channels)
        priced = np.flatnonzero(~np.isnan(seconds[Statistic.P50])).tolist()
        columns = {name: values[priced].tolist() for name, values in seconds.items()}
        return {
            "structure_id": [ids[i] for i in priced], "seconds": columns[Statistic.P50],
            "p90": columns.get(Statistic.P90, [None] * len(priced)),
        }  # fmt: skip


class Prices:
    """All that a device's tables, one for each statistic that they know, say of the structures of a space.

    Raises:
        MissingLatencies: they lack layers of it.
    """

    def __init__(self, tables: Mapping[Statistic, LatencyTable], space: Space) -> None:
        self._tables, self._space = tables, space
        self._models = {statistic: LatencyModel(table, space) for statistic, table in tables.items()}

    @property
    def digest(self) -> str:
        """Identity of the prices."""
        digests = [model.digest for model in self._models.values()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:32]

    def of(self, channels: Ints) -> dict[Statistic, Floats]:
        """Seconds (n,) of channels (n, s) for each statistic, NaN where they cannot be told."""
        return {statistic: self._of(statistic, channels) for statistic in self._models}

    def _of(self, statistic: Statistic, channels: Ints) -> Floats:
        """Uniform networks lie off the grid and are priced one by one, where they can be."""
        model = self._models[statistic]
        known = model.knows(channels)
        seconds = np.full(len(channels), np.nan)
        seconds[known] = model.seconds(channels[known])
        for i in np.flatnonzero(~known):
            with suppress(MissingLatencies):
                seconds[i] = self._tables[statistic].price(self._space, channels[i].tolist()).seconds
        return seconds


def _read_prices(session: Session, due: Due) -> Prices | None:
    """What a device's current table says of a space; None where it lacks layers of it."""
    device, space = session.get(Device, due.device_id), _space(session, due.space_key)
    if device is None:
        return None
    tables = {Statistic.P50: measurements.load_table(session, device.name)}
    with suppress(NotCalibrated):
        tables[Statistic.P90] = measurements.pricing_table(session, device.name, space, Statistic.P90)
    try:
        return Prices(tables, space)
    except MissingLatencies:
        return None


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many structures of a space there are, and how many have their latency from the device's current table."""

    space_key: str
    structures: int
    priced: int


def progress(session: Session, device: Device) -> list[Coverage]:
    """How far the structures of each space are priced on a device."""
    rows = {row.space_key: row for row in session.scalars(select(Pricing).where(Pricing.device_id == device.id))}
    return [Coverage(key, count, _done(rows.get(key), device, count)) for key, count in _counts(session).items()]


def _done(row: Pricing | None, device: Device, structures: int) -> int:
    if row is None or row.prices is None or not row.source.startswith(f"{device.table_id}:"):
        return 0
    return min(row.structures, structures)
