"""Structures and the candidates that jobs judged: written a generation at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from latency_profiler.cost import Statistic, flops, latency_name, parameters
from latency_profiler.spaces.space import Space
from service.store.bulk import insert_missing
from service.store.models import Candidate, Job, Structure, StructureLatency

TURN = 100_000
"""More than a method judges; keeps the positions of a job's methods and rounds apart."""
PRUNED = ("kept", "prunable", "sparse_flops", "note")
"""What is shown of a judgement besides what every candidate has."""


@dataclass(frozen=True)
class Judged:
    """One candidate as a search hands it over; `latencies` are corrected seconds by the latency's name."""

    encoding: tuple[int, ...]
    birth: str
    parents: tuple[tuple[int, ...], ...]
    flops: int
    parameters: int
    latencies: dict[str, float]
    accuracy: float
    loss: float


def space_arguments(space: Space) -> dict[str, Any]:
    """What `get_space` must be given to make this space again."""
    names = ("name", "image_size", "width", "classes", "free_last")
    return {name: getattr(space, name) for name in names}


def add_structures(session: Session, space: Space, channels: Sequence[tuple[int, ...]]) -> list[str]:
    """Make sure that structures have rows; returns their ids in order."""
    rows = []
    for widths in channels:
        layers = space.layers(widths)
        rows.append(
            {
                "id": space.digest(widths), "space_key": space.key, "space": space_arguments(space),
                "channels": list(space.complete(widths)), "flops": flops(layers), "parameters": parameters(layers),
            }
        )  # fmt: skip
    insert_missing(session, Structure, rows)
    return [space.digest(widths) for widths in channels]


def record_generation(
    session: Session, job: Job, space: Space, generation: int, judged: Sequence[Judged], predicted: Mapping[str, str]
) -> None:
    """Store a generation: its structures, their predicted latencies and its candidates with their lineage.

    The predictions of structures that are new stand until the devices' tables have priced them (`repricing`).

    Args:
        predicted: device name → device id.
    """
    ids = add_structures(session, space, [space.channels(one.encoding) for one in judged])
    latencies = [
        {
            "structure_id": structure_id, "device_id": device_id, "seconds": one.latencies[name],
            "p90": one.latencies.get(latency_name(name, Statistic.P90)),
        }
        for structure_id, one in sorted(zip(ids, judged, strict=True), key=lambda pair: pair[0])
        for name, device_id in predicted.items()
        if name in one.latencies
    ]  # fmt: skip
    insert_missing(session, StructureLatency, latencies)
    rows = [
        {
            "job_id": job.id, "structure_id": structure_id, "space_key": space.key, "dataset_id": job.dataset_id,
            "generation": generation, "position": position, "encoding": list(one.encoding),
            "encoding_key": encoding_key(one.encoding), "flops": one.flops, "parameters": one.parameters,
            "latencies": one.latencies, "proxy_accuracy": one.accuracy, "proxy_loss": one.loss, "birth": one.birth,
            "parents": [encoding_key(parent) for parent in one.parents],
        }
        for position, (structure_id, one) in enumerate(zip(ids, judged, strict=True))
    ]  # fmt: skip
    if rows:
        session.execute(insert(Candidate), rows)


def record_pruning(
    session: Session, job: Job, space: Space, method: str, turn: tuple[int, int],
    judged: Sequence[Mapping[str, Any]], known: int,
) -> None:  # fmt: skip
    """Store what a pruning method judged on its way, as far as that is not stored yet.

    Args:
        turn: the method's place among those of the job, and the round of corrections.
        judged: all judgements so far, as JSON; a round is a generation.
        known: how many of them are stored.
    """
    fresh = list(enumerate(judged))[known:]
    ids = add_structures(session, space, [tuple(one["channels"]) for _, one in fresh])
    rows = []
    for structure_id, (place, one) in zip(ids, fresh, strict=True):
        layers = space.layers(one["channels"])
        rows.append(
            {
                "job_id": job.id, "structure_id": structure_id, "space_key": f"{space.key}/{method}",
                "dataset_id": job.dataset_id, "generation": one["round"],
                "position": (turn[0] * TURN + turn[1]) * TURN + place,
                "encoding": [], "encoding_key": f"{method}:{turn[1]}.{place}", "flops": flops(layers),
                "parameters": parameters(layers), "latencies": {}, "proxy_accuracy": one["accuracy"],
                "proxy_loss": one["loss"], "birth": "pruning", "parents": [],
                "pruned": {"method": method, **{name: one[name] for name in PRUNED}},
            }
        )  # fmt: skip
    if rows:
        session.execute(insert(Candidate), rows)


def encoding_key(encoding: Sequence[int]) -> str:
    """The genes joined by commas."""
    return ",".join(map(str, encoding))
