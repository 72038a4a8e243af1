"""How fast "the best under a budget" is answered: `python -m benchmarks.structures [CANDIDATES …]`.

One JSON line per database (`benchmarks.stores`), number of candidates and kind of question, with milliseconds of the
answer (median, p95), of a full scan of the same question, and whether all answers were equal. Questions are the ten
best under a device's latency (tight, middle, loose), under its p90, under multiply-adds, and the front against latency.
Accuracies grow with multiply-adds and scatter; latencies are those of a made-up table. `fill_seconds` is what the
reconciler took to gather all candidates once.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from benchmarks import stores
from latency_profiler.cost import Ints, layer_flops
from latency_profiler.lookup_table import Entry, Fit, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from service import reconciler
from service.specs import JobRequest
from service.store import datasets, devices, exchange, jobs, structures
from service.store.models import Candidate, StructureLatency
from service.store.session import snapshot, transaction
from service.store.structures import Budget

SPACE = get_space("mobilenet_v1", 32, 1.0, 1000, free_last=True)
MEDIAN, TAIL = Fit(2e-5, 0.9, 8, 8, 0.01, 0.02), Fit(3e-5, 1.1, 8, 8, 0.01, 0.02)
SHARES = {"tight": (0.02, 0.1), "middle": (0.3, 0.6), "loose": (0.8, 0.99)}
"""Quantiles of the cost between which bounds lie."""
TIMES, SCANS, LIMIT = 200, 10, 10
Answer = list[tuple[Any, ...]]
Ask = Callable[[Session, float], Answer]


class World(NamedTuple):
    """What the questions are about; `costs` are those of all candidates, by name."""

    dataset_id: str
    device_id: str
    costs: dict[str, Ints]


def main() -> None:
    """All questions in databases of their own."""
    for count in [int(argument) for argument in sys.argv[1:]] or [10_000, 100_000]:
        for kind in stores.kinds():
            with stores.store(kind):
                began = time.perf_counter()
                world = _fill(count)
                filled = time.perf_counter() - began
                for row in _rows(world):
                    print(
                        json.dumps({"database": kind, "candidates": count, **row, "fill_seconds": filled}), flush=True
                    )


def _fill(count: int) -> World:
    """Candidates of one job, a device that prices them, and the skybands."""
    channels = stores.random_channels(SPACE, count)
    ids, flops, parameters = stores.add_structures(SPACE, channels)
    entries = {layer.key: Entry(layer, 1e-9 * (1000 + layer_flops(layer))) for layer in plan_layers(SPACE, 4)}
    document = LatencyTable("bench", "0" * 64, entries, {SPACE.key: MEDIAN}).to_json()
    with transaction() as session:
        device, _ = devices.register(session, "bench")
        exchange.take(session, device, document | {"p90_fits": {SPACE.key: asdict(TAIL)}})
        dataset = datasets.find(session, "digits") or datasets.add(
            session, "digits", "digits", None, classes=10, image_size=8, train_images=9, test_images=9
        )
        request = JobRequest(space=SPACE.name, dataset="digits", constraints=[{"metric": "flops", "max": 1}])  # type: ignore[list-item]
        job = jobs.submit(session, request, space_key=SPACE.key, dataset_id=dataset.id, created_by=None)
    noise = np.random.default_rng(1).normal(0, 0.02, count)
    accuracies = (1 - 0.5 * np.exp(-4 * flops / flops.max()) + noise).round(4).tolist()
    common = {"job_id": job.id, "space_key": SPACE.key, "dataset_id": dataset.id, "generation": 0, "encoding": [],
              "latencies": {}, "proxy_loss": 1.0, "birth": "random", "parents": []}  # fmt: skip
    for start in range(0, count, stores.ROWS):
        rows = [
            {"structure_id": ids[i], "position": i, "encoding_key": str(i), "flops": int(flops[i]),
             "parameters": int(parameters[i]), "proxy_accuracy": accuracies[i]}
            for i in range(start, min(count, start + stores.ROWS))
        ]  # fmt: skip
        with transaction() as session:
            session.execute(insert(Candidate), [row | common for row in rows])
    stop = threading.Event()
    while not (reconciler.reprice(600.0, stop) and reconciler.gather(600.0, stop)):
        pass
    return World(dataset.id, device.id, {"flops": flops, **_latencies()})


def _latencies() -> dict[str, Any]:
    with snapshot() as session:
        rows = session.execute(select(StructureLatency.seconds, StructureLatency.p90)).all()
    seconds, p90 = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return {"seconds": seconds, "p90": p90}


def _rows(world: World) -> Sequence[dict[str, Any]]:
    """Every kind of question, asked with many bounds."""
    names = {"seconds": world.device_id, "p90": f"{world.device_id}:p90", "flops": "flops"}
    kinds = [("seconds", share) for share in SHARES] + [("p90", "tight"), ("flops", "tight")]
    found = [
        {"name": f"best_{cost}_{share}", **_measure(*_best(world, names[cost]), _bounds(world.costs[cost], share))}
        for cost, share in kinds
    ]
    return [*found, {"name": "front_seconds", **_measure(*_front(world), [0.0] * TIMES)}]


def _bounds(costs: Any, share: str) -> list[float]:
    draw = random.Random(share)
    return [float(np.quantile(costs, draw.uniform(*SHARES[share]))) for _ in range(TIMES)]


def _best(world: World, cost: str) -> tuple[Ask, Ask]:
    """From skybands, and by looking at every candidate."""

    def budget(most: float) -> Budget:
        return Budget(flops=int(most)) if cost == "flops" else Budget(latencies={cost: most})

    def quick(session: Session, most: float) -> Answer:
        return list(structures.best_candidates(session, [SPACE.key], world.dataset_id, budget(most), LIMIT))

    def scan(session: Session, most: float) -> Answer:
        column = structures._price(cost)
        query = select(Candidate.proxy_accuracy, Candidate.flops, Candidate.id, Candidate.structure_id)
        if cost != "flops":
            query = query.join(StructureLatency, StructureLatency.structure_id == Candidate.structure_id)
        query = query.where(column <= most).order_by(-Candidate.proxy_accuracy, Candidate.flops, Candidate.id)
        best: dict[str, Any] = {}
        for row in session.execute(query.limit(5 * LIMIT)):
            best.setdefault(row.structure_id, structures.Hit(*row))
        return list(best.values())[:LIMIT]

    return quick, scan


def _front(world: World) -> tuple[Ask, Ask]:
    def quick(session: Session, _: float) -> Answer:
        return list(structures.front(session, [SPACE.key], world.dataset_id, world.device_id))

    def scan(session: Session, _: float) -> Answer:
        query = select(Candidate.proxy_accuracy, StructureLatency.seconds, Candidate.id, Candidate.structure_id)
        query = query.join(StructureLatency, StructureLatency.structure_id == Candidate.structure_id)
        best: Answer = []
        for row in session.execute(query.order_by(StructureLatency.seconds, -Candidate.proxy_accuracy, Candidate.id)):
            if not best or row[0] > best[-1][0]:
                best.append(structures.Point(*row))
        return best

    return quick, scan


def _measure(quick: Ask, scan: Ask, bounds: Sequence[float]) -> dict[str, Any]:
    answers, times = _timed(quick, bounds)
    scanned, long = _timed(scan, bounds[:SCANS])
    median = 1000 * float(np.median(times))
    return {
        "milliseconds": median, "p95": 1000 * float(np.percentile(times, 95)),
        "scan": 1000 * float(np.median(long)), "ratio": float(np.median(long)) / float(np.median(times)),
        "equal": answers[:SCANS] == scanned,
    }  # fmt: skip


def _timed(ask: Ask, bounds: Sequence[float]) -> tuple[list[Answer], list[float]]:
    answers, times = [], []
    for most in bounds:
        start = time.perf_counter()
        with snapshot() as session:
            answers.append(ask(session, most))
        times.append(time.perf_counter() - start)
    return answers, times


if __name__ == "__main__":
    main()
