"""How far a table's prices of whole networks are off, on this machine; one JSON line per device setting and space.

    python benchmarks/latency.py                 the short form, under 10 minutes
    python benchmarks/latency.py --full          every setting, space and image size
    python benchmarks/latency.py --full --only openvino
    python benchmarks/latency.py --costs         entries and minutes against the error, and a plain sum of layers

Layers are measured as an agent measures them, and their grid is refined as the service does it; then the networks of
a calibration and 50 held-out random ones. The held-out ones are measured once more at the end: prices are compared
with the mean of both, and the mean difference between the two, as they ran, is the noise floor. Last, 30 networks
that searches under budgets in milliseconds begin with (`picked`): such have the widths that the table calls fast.
Results are kept one by one in results/latency.json; what is there is not measured again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
from jobs import RESULTS, write

from latency_profiler.calibration import (
    FITTED,
    PENALTIES,
    Parts,
    calibration_networks,
    fit_networks,
    parts_of,
    sum_of_layers,
)
from latency_profiler.cost import Constraint, Metric
from latency_profiler.device import conditions, cpu
from latency_profiler.lookup_table import Entry, LatencyModel, LatencyTable
from latency_profiler.measuring import measure_groups, measuring
from latency_profiler.planning import plan_layers, refinement
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.store.measurements import SAMPLED
from workers.budget import Budget

Json = dict[str, Any]
HELD, PICKED = 50, 30
DENSITIES: tuple[int | None, ...] = (6, 10, 16, None)


@dataclass(frozen=True)
class Case:
    """One line: a runtime with its settings, and a space."""

    runtime: str
    threads: int
    batch: int
    space: str
    image_size: int
    points: int | None = SAMPLED
    """Widths per slot that are measured; None is all 31."""

    @property
    def name(self) -> str:
        """In the file of results."""
        return f"{self.device} {self.space}@{self.image_size} {self.points or 'full'}"

    @property
    def device(self) -> str:
        """The setting."""
        return f"{self.runtime} {self.threads} thread{'s' * (self.threads > 1)} batch {self.batch}"


SETTINGS = [("torch", 1), ("torch", 2), ("onnxruntime", 1), ("openvino", 1)]
SPACES = ["mobilenet_v1", "mobilenet_v2", "resnet50"]
WIDTH = 0.5
SHORT = [Case("onnxruntime", 1, 1, "mobilenet_v1", 32), Case("openvino", 1, 1, "mobilenet_v1", 32)]
COSTS = [Case("onnxruntime", 1, 1, "mobilenet_v1", 32, points) for points in DENSITIES]
FULL = [
    Case(runtime, threads, batch, space, size)
    for size, batch, (runtime, threads), space in product((32, 224), (1, 8), SETTINGS, SPACES)
]


def main() -> None:
    """Measure what is asked for, and print it line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT", help="the lines whose name has this in it")
    options = parser.parse_args()
    path = RESULTS / "latency.json"
    lines: Json = json.loads(path.read_text())["lines"] if path.exists() else {}
    for case in FULL if options.full else COSTS if options.costs else SHORT:
        if options.only not in case.name:
            continue
        if case.name not in lines:
            lines[case.name] = measure(case)
            write("latency", {"lines": lines})
        print(json.dumps(lines[case.name]), flush=True)


def measure(case: Case) -> Json:
    """One line."""
    space = get_space(case.space, case.image_size, WIDTH, 10 if case.image_size == 32 else 1000, True)
    runtime = open_runtime(case.runtime, Settings(case.threads, case.batch))
    rng, start = np.random.default_rng(0), time.perf_counter()
    in_process = measuring(runtime)

    def measured(items: Sequence[Json]) -> list[Json]:
        return sorted(measure_groups(in_process, items, rng), key=lambda result: int(result["work_id"]))

    def seconds(items: Sequence[Json]) -> list[float]:
        return [result["seconds"] for result in measured(items)]

    table, planned = LatencyTable("bench", ""), plan_layers(space, case.points)
    layers = planned
    while layers:
        items = [_item(at, "layer", layer.key, {"layer": layer.to_json()}) for at, layer in enumerate(layers)]
        for layer, took in zip(layers, seconds(items), strict=True):
            table.add(Entry(layer, took))
        room = 2 * len(planned) - len(table.entries)
        layers = refinement(space, case.points, table, room) if case.points else []
    minutes = (time.perf_counter() - start) / 60
    fitted = [channels for channels, purpose in calibration_networks(space) if purpose == FITTED]
    held_out = [channels for channels, _ in calibration_networks(space, 0, HELD) if channels not in fitted]
    of_fitted = seconds(_networks(space, fitted))
    fit_minutes = (time.perf_counter() - start) / 60 - minutes
    twice = [measured(_networks(space, held_out)) for _ in range(2)]
    steadied = list(zip(*([result["seconds"] for result in results] for results in twice), strict=True))
    repeated = list(zip(*(map(_as_it_ran, results) for results in twice), strict=True))
    known, asked = (
        list(zip((parts_of(table, space, one) for one in channels), took, strict=True))
        for channels, took in ((fitted, of_fitted), (held_out, [sum(both) / 2 for both in steadied]))
    )
    line, found = (fit_networks(known, asked, repeated, penalties) for penalties in ((), PENALTIES))
    assert line is not None and found is not None  # noqa: PT018 - times are positive and differ
    table.fits[space.key] = found
    picked = _picked(table, space, rng)
    by_table = np.array([table.price(space, channels).seconds for channels in picked])
    errors = by_table / seconds(_networks(space, picked)) - 1
    return {
        "name": "lut_error", "device": case.device, "space": space.key, "image_size": case.image_size,
        "networks": found.held_out, "mean": found.mean_error, "max": found.max_error, "within_5": found.within_5,
        "spearman": found.spearman, "noise_floor": found.noise_floor,
        "noise_at_usual_speed": mean(abs(again / first - 1) for first, again in steadied),
        "entries": len(table.entries), "refined": len(table.entries) - len(planned), "minutes": round(minutes, 2),
        "fit_minutes": round(fit_minutes, 2),
        "points": case.points,
        "terms": sorted(found.terms),
        "without_terms": {"mean": line.mean_error, "max": line.max_error, "within_5": line.within_5},
        "sum_of_layers": _plain(asked),
        "picked": {
            "networks": len(picked), "mean": float(np.abs(errors).mean()), "max": float(np.abs(errors).max()),
            "bias": float(errors.mean()),
        }, "cpu": cpu(), "load": conditions()["load"], "at": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _as_it_ran(result: Json) -> float:
    """Seconds, whatever the reference says."""
    return float(result["seconds"] / result["conditions"].get("speed", 1.0))


def _picked(table: LatencyTable, space: Space, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """One network of those that a search begins with under each of some budgets, spread over what the space allows."""
    fastest = space.channels(LatencyModel(table, space).fastest)
    least, most = (table.price(space, end).seconds for end in (fastest, space.channels(space.largest)))
    found: list[tuple[int, ...]] = []
    for budget in np.linspace(1.2 * least, most, PICKED):
        bound = Constraint(Metric.LATENCY, float(budget), device="bench")
        asked = Budget(space, [bound], {"bench": table}, {})
        found += map(tuple, asked.channels(asked.sample(1, rng)).tolist())
    return found


def _plain(networks: Sequence[tuple[Parts, float]]) -> Json:
    """Errors of the plain sum of layers."""
    off = np.abs([sum_of_layers(parts) / seconds - 1 for parts, seconds in networks])
    return {"mean": float(off.mean()), "max": float(off.max()), "within_5": float((off <= 0.05).mean())}


def _networks(space: Space, channels: Sequence[Sequence[int]]) -> list[Json]:
    nodes = ([asdict(node) for node in space.nodes(one)] for one in channels)
    return [_item(at, "network", f"network {at}", {"nodes": one}) for at, one in enumerate(nodes)]


def _item(work_id: int, kind: str, key: str, payload: Json) -> Json:
    return {"work_id": work_id, "kind": kind, "key": key, "payload": payload}


if __name__ == "__main__":
    main()
