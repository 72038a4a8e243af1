"""How fast structures are priced: `python -m benchmarks.repricing` prints one JSON line per figure.

- `layer_sum`: milliseconds for 1,000 structures with the vectorised model, the best and the median of many; and whether
  the first hundred equal the slow path to the last bit.
- `repricing`: seconds until 100,000 stored structures have their latency on a new device, from the arrival of its table
  on; and seconds of this process's own, which other work on the machine does not lengthen. The database is SQLite.

Spaces are named on the command line, as in `mobilenet_v1 resnet50`; without any it is the first.
"""

import json
import os
import sys
import tempfile
import threading
import time

import numpy as np

from latency_profiler.cost import CostModel, Ints, layer_flops
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, LatencyModel, LatencyTable, plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service import admin, reconciler
from service.settings import get_settings
from service.store import devices, exchange, repricing
from service.store.bulk import insert_missing
from service.store.candidates import space_arguments
from service.store.models import Structure
from service.store.session import get_engine, snapshot, transaction

SPACES = {"mobilenet_v1": 32, "mobilenet_v2": 224, "resnet50": 224}
STORED, SUMMED, CHECKED, TIMES = 100_000, 1000, 100, 50


def main() -> None:
    """Both figures for each space, in a database of its own."""
    for name in sys.argv[1:] or list(SPACES)[:1]:
        space = get_space(name, SPACES[name], 1.0, 1000, free_last=True)
        layers = plan_layers(space, 6)
        table = LatencyTable("bench", "0" * 64, {layer.key: _entry(layer) for layer in layers})
        channels = _random(space, STORED)
        _say("layer_sum", space, SUMMED, **_layer_sum(table, space, channels[:SUMMED]))
        with tempfile.TemporaryDirectory(prefix="secateurs-repricing-") as home:
            os.environ["SECATEURS_HOME"] = home
            get_settings.cache_clear()
            get_engine.cache_clear()
            admin.migrate()
            _say("repricing", space, STORED, **_repricing(table, space, channels))
            get_engine().dispose()


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
    costs = CostModel(space)
    counts = zip(channels.tolist(), costs.flops(channels), costs.parameters(channels), strict=True)
    rows = [
        {"id": space.digest(row), "space_key": space.key, "space": space_arguments(space), "channels": row,
         "flops": int(flops), "parameters": int(parameters)}
        for row, flops, parameters in counts
    ]  # fmt: skip
    with transaction() as session:
        insert_missing(session, Structure, rows)
    with transaction() as session:
        device, _ = devices.register(session, "new")
        exchange.take(session, device, table.to_json())
    start, used = time.perf_counter(), time.process_time()
    while not reconciler.reprice(reconciler.PRICING_SECONDS, threading.Event()):
        pass
    seconds = {"seconds": time.perf_counter() - start, "process_seconds": time.process_time() - used}
    with snapshot() as session:
        [done] = repricing.progress(session, devices.get(session, "new"))
    assert done.priced == done.structures == len({row["id"] for row in rows})
    return seconds


def _entry(layer: Layer) -> Entry:
    return Entry(layer, 1e-9 * (1000 + layer_flops(layer)))


def _random(space: Space, count: int) -> Ints:
    genes = np.random.default_rng(0).integers(0, 31, (count, len(space.genes)))
    chosen = np.array(space.choices)[np.arange(len(space.genes)), genes]
    fixed = np.array([slot.base for slot in space.fixed], dtype=np.int64)
    return np.concatenate([chosen, np.broadcast_to(fixed, (count, len(fixed)))], axis=1)


def _say(name: str, space: Space, structures: int, **figures: object) -> None:
    print(json.dumps({"name": name, "space": space.key, "structures": structures, **figures}), flush=True)


if __name__ == "__main__":
    main()
