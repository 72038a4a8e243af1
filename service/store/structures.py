"""Structures that were found, across all jobs.

One bound is answered from a skyband (`skybands`), however tight it is. "Best under a budget" of several bounds walks
the index `ix_candidates_best` from the best accuracy down and stops when it has enough: where many structures satisfy
the budget it reads a few rows, and it never reads the table itself. Equal accuracies are ordered by FLOPs, then by age.

Where a device's current table has a measurement of the whole network, that counts under a bound there, and not the
prediction.
"""

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from sqlalchemy import ColumnElement, Select, func, or_, select, tuple_
from sqlalchemy.orm import Session

from latency_profiler.cost import Statistic, latency_name, split_latency
from latency_profiler.errors import NotFound
from service.store import devices, skybands
from service.store.models import (
    Candidate,
    Dataset,
    Device,
    Job,
    Measurement,
    Result,
    Structure,
    StructureLatency,
)
from service.store.skybands import COUNTS, Members, Place, price

CHUNK = 64
SortKey = Literal["proxy_accuracy", "flops", "parameters", "generation"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds; `latencies` are seconds by a latency's name, with the device's id in it (`latency_name`)."""

    flops: int | None = None
    parameters: int | None = None
    latencies: Mapping[str, float] = field(default_factory=dict)

    @property
    def bounds(self) -> dict[str, float]:
        """All of them by the name of what is bounded (`skybands.Place.cost`)."""
        counts = {"flops": self.flops, "parameters": self.parameters}
        return {name: most for name, most in counts.items() if most is not None} | dict(self.latencies)


class Hit(NamedTuple):
    """Where a structure was found; `found` is the row of its candidate or of its result."""

    accuracy: float
    flops: int
    found: int
    structure_id: str


class Point(NamedTuple):
    """A structure on a front; `cost` is a count or seconds."""

    accuracy: float
    cost: float
    found: int
    structure_id: str


def searched_spaces(session: Session, dataset_id: str) -> Sequence[str]:
    """Keys of the spaces that jobs on a dataset have searched."""
    return session.scalars(select(Job.space_key).where(Job.dataset_id == dataset_id).distinct()).all()


def best_candidates(
    session: Session, space_keys: Sequence[str], dataset_id: str, budget: Budget, limit: int
) -> list[Hit]:
    """The distinct structures of highest proxy accuracy within a budget, best first."""
    found = [_best(session, key, dataset_id, budget, limit) for key in space_keys]
    hits: dict[str, Hit] = {}
    for hit in heapq.merge(*found, key=_rank):
        hits.setdefault(hit.structure_id, hit)
        if len(hits) == limit:
            break
    return list(hits.values())


def _best(session: Session, space_key: str, dataset_id: str, budget: Budget, limit: int) -> Iterator[Hit]:
    """At least so many structures within a budget, best first, if there are so many."""
    candidates, chunk = _candidates(space_key, dataset_id, budget), max(CHUNK, 2 * limit)
    if len(budget.bounds) == 1:
        [(cost, most)] = budget.bounds.items()
        members = skybands.read(session, Place(space_key, dataset_id, cost))
        if members is not None:
            chosen = members[np.flatnonzero(members["cost"] <= most)[: skybands.MOST]].tolist()
            hits = [Hit(accuracy, flops, found, id_.decode()) for accuracy, flops, found, _, id_ in chosen]
            if cost not in COUNTS:
                known = measured(session, [hit.structure_id for hit in hits], [cost])
                hits = [hit for hit in hits if known.get(hit.structure_id, {}).get(cost, 0.0) <= most]
            if len(hits) >= limit or len(chosen) < skybands.MOST:
                faster = [] if cost in COUNTS else session.scalars(_faster(cost, most)).all()
                others = candidates.where(Candidate.structure_id.in_(faster))
                return heapq.merge(hits, _walk(session, others, chunk) if faster else (), key=_rank)
    return _walk(session, candidates, chunk)


def _faster(latency: str, most: float) -> Select[str | None]:
    """Ids of the structures that are predicted above a latency, but were measured within it."""
    device_id = split_latency(latency)[0]
    return (
        select(Measurement.structure_id)
        .join(StructureLatency, StructureLatency.structure_id == Measurement.structure_id)
        .where(Measurement.table_id == _table(device_id), _measurement(latency) <= most)
        .where(StructureLatency.device_id == device_id, price(latency) > most)
    )


def measured(session: Session, ids: Collection[str], latencies: Collection[str]) -> dict[str, dict[str, float]]:
    """Structure id → latency → seconds of whole networks in the devices' current tables; of several the last counts."""
    found: dict[str, dict[str, float]] = {}
    for latency in latencies:
        query = select(Measurement.structure_id, seconds := _measurement(latency)).order_by(Measurement.id)
        query = query.where(Measurement.table_id == _table(split_latency(latency)[0]), seconds.is_not(None))
        for structure_id, took in session.execute(query.where(Measurement.structure_id.in_(ids))):
            found.setdefault(structure_id, {})[latency] = took
    return found


def _table(device_id: str) -> Any:
    """Id of a device's current table."""
    return select(Device.table_id).where(Device.id == device_id).scalar_subquery()


def _measurement(latency: str) -> Any:
    """The column of a measured latency."""
    return Measurement.p90 if split_latency(latency)[1] is Statistic.P90 else Measurement.seconds


@dataclass(frozen=True, slots=True)
class Sparse:
    """Upper bounds on what masks keep; a network without masks keeps everything."""

    flops: int | None = None
    kept: int | None = None


def best_results(
    session: Session, space_keys: Sequence[str], dataset_id: str, budget: Budget, limit: int, sparse: Sparse,
    methods: Sequence[str] | None = None,
) -> list[Result]:  # fmt: skip
    """Trained networks of highest test accuracy within a budget, best first: of each structure the best per method."""
    query = (
        select(Result)
        .join(Structure, Structure.id == Result.structure_id)
        .where(Result.dataset_id == dataset_id, Structure.space_key.in_(space_keys))
        .where(*_within(budget, Structure.flops, Structure.parameters, Result.structure_id))
    )
    for most, name, dense in (
        (sparse.flops, "sparse_flops", Structure.flops), (sparse.kept, "kept", Structure.parameters)
    ):  # fmt: skip
        if most is not None:
            query = query.where(func.coalesce(Result.pruned[name].as_integer(), dense) <= most)
    if methods is not None:
        query = query.where(Result.method.in_(methods))
    found: dict[tuple[str, str], Result] = {}
    for row in session.scalars(query.order_by(Result.test_accuracy.desc(), Structure.flops, Result.id)):
        found.setdefault((row.structure_id, row.method), row)
        if len(found) == limit:
            break
    return list(found.values())


def front(session: Session, space_keys: Sequence[str], dataset_id: str, cost: str) -> list[Point]:
    """The Pareto front of proxy accuracy against a cost (`skybands.Place.cost`), cheapest first."""
    points = [point for key in space_keys for point in _front(session, Place(key, dataset_id, cost))]
    points.sort(key=lambda point: (point.cost, -point.accuracy, point.found))
    kept: list[Point] = []
    for point in points:
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def _front(session: Session, place: Place) -> Iterator[Point]:
    """From the highest accuracy down: each point is the best of all that are cheaper than the one before."""
    members = skybands.read(session, place)
    return _walk_front(session, place) if members is None else _front_of(members)


def _front_of(members: Members) -> Iterator[Point]:
    """Those that cost less than all that are better; of equally good ones the cheapest comes first."""
    ordered = members[np.lexsort((members["found"], members["flops"], members["cost"], -members["accuracy"]))]
    cheapest = np.minimum.accumulate(np.concatenate([[np.inf], ordered["cost"]]))[:-1]
    for accuracy, _, found, cost, structure_id in ordered[ordered["cost"] < cheapest].tolist():
        yield Point(accuracy, cost, found, structure_id.decode())


def _walk_front(session: Session, place: Place) -> Iterator[Point]:
    here = (Candidate.space_key == place.space_key, Candidate.dataset_id == place.dataset_id)
    query = select(Candidate.proxy_accuracy, cost := price(place.cost), Candidate.id, Candidate.structure_id)
    query = query.where(*here)
    if place.cost not in COUNTS:
        query = query.join(StructureLatency, StructureLatency.structure_id == Candidate.structure_id)
        query = query.where(StructureLatency.device_id == split_latency(place.cost)[0], cost.is_not(None))
    lowest = session.scalar(select(func.min(Candidate.flops)).where(*here)) if place.cost == "flops" else None
    query = query.order_by(Candidate.proxy_accuracy.desc(), cost, Candidate.flops, Candidate.id).limit(1)
    row = session.execute(query).first()
    while row is not None:
        point = Point(*row)
        yield point
        if point.cost == lowest:
            return
        row = session.execute(query.where(Candidate.proxy_accuracy < point.accuracy, cost < point.cost)).first()


def _candidates(space_key: str, dataset_id: str, budget: Budget) -> Select[float, int, int, str]:
    return (
        select(Candidate.proxy_accuracy, Candidate.flops, Candidate.id, Candidate.structure_id)
        .where(Candidate.space_key == space_key, Candidate.dataset_id == dataset_id)
        .where(*_within(budget, Candidate.flops, Candidate.parameters, Candidate.structure_id))
    )


def _within(budget: Budget, flops: Any, parameters: Any, structure_id: Any) -> list[ColumnElement[bool]]:
    bounds: list[ColumnElement[bool]] = []
    if budget.flops is not None:
        bounds.append(flops <= budget.flops)
    if budget.parameters is not None:
        bounds.append(parameters <= budget.parameters)
    for name, seconds in budget.latencies.items():
        device_id, _ = split_latency(name)
        of_it = (Measurement.table_id == _table(device_id), Measurement.structure_id == structure_id)
        last = select(_measurement(name)).where(*of_it, _measurement(name).is_not(None))
        last = last.order_by(Measurement.id.desc()).limit(1)
        predicted = select(price(name)).where(
            StructureLatency.structure_id == structure_id, StructureLatency.device_id == device_id
        )
        bounds.append(func.coalesce(last.scalar_subquery(), predicted.scalar_subquery()) <= seconds)
    return bounds


def _walk(session: Session, query: Select[float, int, int, str], chunk: int) -> Iterator[Hit]:
    """All hits, best first, in chunks that double: a row is read again at most for its equals in accuracy."""
    ordered = query.order_by(Candidate.proxy_accuracy.desc(), Candidate.flops, Candidate.id)
    hits = [Hit(*row) for row in session.execute(ordered.limit(chunk))]
    while hits:
        yield from hits
        if len(hits) < chunk:
            return
        last, chunk = hits[-1], 2 * chunk
        behind = or_(
            Candidate.proxy_accuracy < last.accuracy,
            tuple_(Candidate.flops, Candidate.id) > tuple_(last.flops, last.found),
        )
        following = ordered.where(Candidate.proxy_accuracy <= last.accuracy, behind)
        hits = [Hit(*row) for row in session.execute(following.limit(chunk))]


def _rank(hit: Hit) -> tuple[float, int, int]:
    return -hit.accuracy, hit.flops, hit.found


def get(session: Session, structure_id: str) -> Structure:
    """One structure.

    Raises:
        NotFound: no structure has this id.
    """
    structure = session.get(Structure, structure_id)
    if structure is None:
        raise NotFound("structure", structure_id)
    return structure


def by_id(session: Session, ids: Sequence[str]) -> dict[str, Structure]:
    """Structures by their ids."""
    return {row.id: row for row in session.scalars(select(Structure).where(Structure.id.in_(ids)))}


def latencies(session: Session, ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Predicted seconds by structure id and the latency's name."""
    query = (
        select(StructureLatency.structure_id, Device.name, StructureLatency.seconds, StructureLatency.p90)
        .join(Device, Device.id == StructureLatency.device_id)
        .where(StructureLatency.structure_id.in_(ids))
    )
    found: dict[str, dict[str, float]] = {structure_id: {} for structure_id in ids}
    for structure_id, name, seconds, p90 in session.execute(query):
        found[structure_id][name] = seconds
        if p90 is not None:
            found[structure_id][latency_name(name, Statistic.P90)] = p90
    return found


def candidates(session: Session, ids: Sequence[int]) -> dict[int, Candidate]:
    """Candidates by their rows."""
    return {row.id: row for row in session.scalars(select(Candidate).where(Candidate.id.in_(ids)))}


def sightings(session: Session, structure_id: str, limit: int = 50) -> Sequence[tuple[Candidate, str]]:
    """Where searches have met a structure, the best first, with the dataset's name."""
    query = (
        select(Candidate, Dataset.name)
        .join(Dataset, Dataset.id == Candidate.dataset_id)
        .where(Candidate.structure_id == structure_id)
        .order_by(Candidate.proxy_accuracy.desc(), Candidate.id)
    )
    return [(candidate, name) for candidate, name in session.execute(query.limit(limit))]


def results(session: Session, ids: Sequence[str], dataset_id: str | None = None) -> dict[str, list[Result]]:
    """What came out where structures were trained from scratch, by structure id, the best first."""
    query = select(Result).where(Result.structure_id.in_(ids)).order_by(Result.test_accuracy.desc(), Result.id)
    if dataset_id is not None:
        query = query.where(Result.dataset_id == dataset_id)
    found: dict[str, list[Result]] = {structure_id: [] for structure_id in ids}
    for row in session.scalars(query):
        found[row.structure_id].append(row)
    return found


def device_ids(session: Session, names: Sequence[str]) -> dict[str, str]:
    """Ids of devices by name.

    Raises:
        NotFound: a device is unknown; says which there are.
    """
    found = {name: id_ for name, id_ in session.execute(select(Device.name, Device.id).where(Device.name.in_(names)))}
    for name in names:
        if name not in found:
            raise NotFound("device", name, devices.known(session))
    return found


def of_job(
    session: Session, job_id: str, sort: SortKey, descending: bool, limit: int, behind: tuple[float, int] | None = None
) -> Sequence[tuple[Candidate, Structure]]:
    """A job's candidates with their structures, in an order whose ties are broken by age.

    Args:
        behind: sort value and id of the candidate behind which the list begins.
    """
    column = getattr(Candidate, sort)
    query = select(Candidate, Structure).join(Structure, Structure.id == Candidate.structure_id)
    query = query.where(Candidate.job_id == job_id)
    if behind is not None:
        here, there = tuple_(column, Candidate.id), tuple_(*behind)
        query = query.where(here < there if descending else here > there)
    keys = (column, Candidate.id)
    query = query.order_by(*(key.desc() if descending else key.asc() for key in keys)).limit(limit)
    return [(candidate, structure) for candidate, structure in session.execute(query)]
