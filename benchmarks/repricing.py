"""How fast structures are priced: `python -m benchmarks.repricing` prints one JSON line per figure.

- `layer_sum`: milliseconds for 1,000 structures with the vectorised model, the best and the median of many; and whether
  the first hundred equal the slow path to the last bit.
- `repricing`: seconds until 100,000 stored structures have their latencies (median and p90) on a new device, from the
  arrival of its table on; and seconds of this process's own, which other work on the machine does not lengthen.

Spaces are named on the command line, as in `mobilenet_v1 resnet50`; without any it is the first. The databases are
those of `benchmarks.stores`.
"""

import json
import sys
import threading
import time
from dataclasses import asdict

from benchmarks import stores
from latency_profiler.cost import Ints, layer_flops
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, Fit, LatencyModel, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service import reconciler
from service.store import devices, exchange, repricing
from service.store.session import snapshot, transaction

SPACES = {"mobilenet_v1": 32, "mobilenet_v2": 224, "resnet50": 224}
STORED, SUMMED, CHECKED, TIMES = 100_000, 1000, 100, 50
MEDIAN, TAIL = Fit(2e-5, 0.9, 8, 8, 0.01, 0.02), Fit(3e-5, 1.1, 8, 8, 0.01, 0.02)


def main() -> None:
    """Both figures for each space, in databases of their own."""
    for name in sys.argv[1:] or list(SPACES)[:1]:
        space = get_space(name, SPACES[name], 1.0, 1000, free_last=True)
        entries = {layer.key: _entry(layer) for layer in plan_layers(space, 6)}
        table = LatencyTable("bench", "0" * 64, entries, {space.key: MEDIAN})
        channels = stores.random_channels(space, STORED)
        _say("layer_sum", space, SUMMED, **_layer_sum(table, space, channels[:SUMMED]))
        for kind in stores.kinds():
            with stores.store(kind):
                _say("repricing", space, STORED, database=kind, **_repricing(table, space, channels))


def _layer_sum(table: LatencyTable, space: Space, channels: Ints) -> dict[str, object]:
    start = time.perf_counter()
    model = LatencyModel(table, space)
    build = time.perf_counter() - start
    seconds = model.seconds(channels)
    slow = [table.price(space, row).seconds for row in channels[:CHECKED].tolist()]
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        model.seconds(channels)
        times.append(time.perf_counter() - start)
    return {
        "milliseconds": 1000 * min(times), "median_ms": 1000 * sorted(times)[TIMES // 2],
        "equal": slow == seconds[:CHECKED].tolist(), "model_seconds": build,
    }  # fmt: skip


def _repricing(table: LatencyTable, space: Space, channels: Ints) -> dict[str, float]:
    ids, _, _ = stores.add_structures(space, channels)
    with transaction() as session:
        device, _ = devices.register(session, "new")
        exchange.take(session, device, table.to_json() | {"p90_fits": {space.key: asdict(TAIL)}})
    start, used = time.perf_counter(), time.process_time()
    walks: dict[repricing.Due, repricing.Walk] = {}
    while not reconciler.reprice(reconciler.PRICING_SECONDS, threading.Event(), walks):
        pass
    seconds = {"seconds": time.perf_counter() - start, "process_seconds": time.process_time() - used}
    with snapshot() as session:
        [done] = repricing.progress(session, devices.get(session, "new"))
    assert done.priced == done.structures == len(set(ids))
    return seconds


def _entry(layer: Layer) -> Entry:
    return Entry(layer, 1e-9 * (1000 + layer_flops(layer)))


def _say(name: str, space: Space, structures: int, **figures: object) -> None:
    print(json.dumps({"name": name, "space": space.key, "structures": structures, **figures}), flush=True)


if __name__ == "__main__":
    main()
