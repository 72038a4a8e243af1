"""Skybands: the candidates of a space on a dataset that can be an answer to "the best structures under one bound".

A structure is left out if `MOST` better ones cost no more: whatever the bound, they are all named before it. So a bound
on one cost is answered from some thousand structures, however many there are, and from the candidates that came later,
which are read as they are. Nothing that writes candidates or latencies has to know of skybands: one whose latencies are
from other prices than the device's current ones is not used, and the reconciler makes it anew.
"""

import heapq
from itertools import takewhile
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from sqlalchemy import and_, func, null, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from latency_profiler.cost import Statistic, latency_name, split_latency
from service.store.bulk import upsert
from service.store.models import Candidate, Job, Pricing, Skyband, StructureLatency
from service.store.session import BYTES

Count = Literal["flops", "parameters"]
COUNTS: tuple[Count, ...] = ("flops", "parameters")
MOST = 50
"""Answers of so many structures can be given."""
LEAST_NEW, MOST_NEW = 256, 5000
"""Candidates behind a skyband that are worth taking in, and that are too many to be read for every answer."""
CHUNK = 10_000
"""Candidates that are taken in per transaction: SQLite's only writer is held for a tenth of a second."""
MEMBER = np.dtype(
    [("accuracy", "<f8"), ("flops", "<i8"), ("found", "<i8"), ("cost", "<f8"), ("structure", "S32")]
)  # fmt: skip
Members = npt.NDArray[np.void]
"""Distinct structures, the best first: by accuracy, then FLOPs, then age of the candidate (`found`)."""
REMEMBERED = 32
"""Skybands that a process keeps, of up to some megabytes each: reading one is half of what an answer takes."""


class Place(NamedTuple):
    """Where a bound holds, and on what: `flops`, `parameters`, or a latency's name with the device's id in it."""

    space_key: str
    dataset_id: str
    cost: str


class Stored(NamedTuple):
    """A skyband's row: prices and the last candidate that was looked at decide who its members are."""

    prices: str | None
    upto: int
    members: Members


_remembered: dict[Place, Stored] = {}


def read(session: Session, place: Place) -> Members | None:
    """All structures that can be an answer; None where no skyband is up to date and every candidate must be read."""
    stored = _stored(session, place)
    if stored is None:
        return None
    query = _query(place).where(Candidate.id > stored.upto).order_by(Candidate.id).limit(MOST_NEW + 1)
    rows = session.execute(query).all()
    if len(rows) > MOST_NEW:
        return None
    return _merged(stored.members, [row for row in rows if row.cost is not None])


def _stored(session: Session, place: Place) -> Stored | None:
    """The skyband of a place; its members are sent only where they are others than those known here."""
    current, known = _current(place), _remembered.get(place)
    version = session.execute(current.with_only_columns(Skyband.prices, Skyband.upto)).first()
    if version is None:
        return None
    if known is not None and (known.prices, known.upto) == tuple(version):
        return known
    columns = (Skyband.prices, Skyband.upto, Skyband.members)
    row = session.execute(current.with_only_columns(*columns), execution_options=BYTES).first()
    if row is None:
        return None
    if len(_remembered) >= REMEMBERED:
        _remembered.clear()
    stored = _remembered[place] = Stored(row.prices, row.upto, np.frombuffer(row.members, MEMBER))
    return stored


def places(session: Session) -> list[Place]:
    """Every bound that could be asked for."""
    searched = session.execute(select(Job.space_key, Job.dataset_id).distinct()).all()
    priced = session.execute(select(Pricing.space_key, Pricing.device_id).where(Pricing.prices.is_not(None))).all()
    found = []
    for space_key, dataset_id in sorted((space_key, dataset_id) for space_key, dataset_id in searched):
        devices = sorted(device_id for key, device_id in priced if key == space_key)
        latencies = [latency_name(device_id, statistic) for device_id in devices for statistic in Statistic]
        found += [Place(space_key, dataset_id, cost) for cost in (*COUNTS, *latencies)]
    return found


def last_candidate(session: Session) -> int | None:
    """A candidate behind which none with a smaller id can appear; None while somebody writes some.

    PostgreSQL counts ids before it commits, so it is asked in a moment when nobody writes; on SQLite nobody else does.
    """
    if session.get_bind().dialect.name == "postgresql":
        try:
            with session.begin_nested():
                session.execute(text("LOCK TABLE candidates IN SHARE MODE NOWAIT"))
        except OperationalError:
            return None
    return session.scalar(select(func.coalesce(func.max(Candidate.id), 0)))


def advance(session: Session, place: Place, last: int) -> bool:
    """Take in the next candidates, up to the `last`; whether there are more.

    It stops before the first whose latency is not from the device's current prices: that one would change later.
    """
    prices = session.scalar(select(_prices(place)))
    upto = session.scalar(_current(place).with_only_columns(Skyband.upto)) or 0
    if last - upto < LEAST_NEW or (prices is None and place.cost not in COUNTS):
        return False
    query = _query(place).where(Candidate.id > upto, Candidate.id <= last).order_by(Candidate.id).limit(CHUNK)
    rows = list(takewhile(lambda one: one.prices == prices, session.execute(query)))
    if len(rows) < LEAST_NEW:
        return False
    stored = session.scalar(_current(place).with_only_columns(Skyband.members), execution_options=BYTES)
    old = np.frombuffer(stored or b"", MEMBER)
    members = _skyband(_merged(old, [one for one in rows if one.cost is not None]))
    values = {"prices": prices, "upto": rows[-1].id, "members": members.tobytes()}
    upsert(session, Skyband, [{**place._asdict(), **values}])
    return len(rows) == CHUNK


def _current(place: Place) -> Any:
    """The skyband of a place, if it is from the prices of now."""
    return select(Skyband).filter_by(**place._asdict()).where(Skyband.prices.is_not_distinct_from(_prices(place)))


def _prices(place: Place) -> Any:
    """Digest of the prices that a device's latencies are from now; counts have none."""
    if place.cost in COUNTS:
        return null()
    device_id, _ = split_latency(place.cost)
    query = select(Pricing.prices).where(Pricing.device_id == device_id, Pricing.space_key == place.space_key)
    return query.scalar_subquery()


def _query(place: Place) -> Any:
    """Candidates with their cost, and the prices that it is from."""
    columns = (Candidate.proxy_accuracy, Candidate.flops, Candidate.id, Candidate.structure_id)
    here = and_(Candidate.space_key == place.space_key, Candidate.dataset_id == place.dataset_id)
    cost = price(place.cost).label("cost")
    if place.cost in COUNTS:
        return select(*columns, cost, null().label("prices")).where(here)
    latency = and_(
        StructureLatency.structure_id == Candidate.structure_id,
        StructureLatency.device_id == split_latency(place.cost)[0],
    )
    query = select(*columns, cost, StructureLatency.prices.label("prices"))
    return query.outerjoin(StructureLatency, latency).where(here)


def price(cost: str) -> Any:
    """The column of a cost."""
    if cost in COUNTS:
        return getattr(Candidate, cost)
    return StructureLatency.p90 if split_latency(cost)[1] is Statistic.P90 else StructureLatency.seconds


def _merged(members: Members, rows: list[Any]) -> Members:
    """Members and candidates together, each structure once."""
    if not rows:
        return members
    new = [(row.proxy_accuracy, row.flops, row.id, row.cost, row.structure_id) for row in rows]
    both = np.concatenate([members, np.array(new, MEMBER)])
    both = both[np.lexsort((both["found"], both["flops"], -both["accuracy"]))]
    _, first = np.unique(both["structure"], return_index=True)
    return cast(Members, both[np.sort(first)])


def _skyband(members: Members) -> Members:
    """Those than which fewer than `MOST` are better at no more cost: the cheapest `MOST` before each one tell."""
    cheapest: list[float] = []  # the negated costs of the cheapest so far, the dearest of them first
    kept = []
    for place, cost in enumerate(members["cost"].tolist()):
        if len(cheapest) < MOST:
            heapq.heappush(cheapest, -cost)
        elif cost < -cheapest[0]:
            heapq.heapreplace(cheapest, -cost)
        else:
            continue
        kept.append(place)
    return members[kept]
