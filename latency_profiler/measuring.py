"""Leased work → results, as they are handed in.

Work is measured in groups: what is loaded at the same time is timed interleaved, and the runtime's empty run with it,
under the same conditions. A layer's seconds are its median less the empty run's; a network keeps the call that it
pays for once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from latency_profiler.cost import Statistic, layer_parameters
from latency_profiler.device import conditions
from latency_profiler.errors import InvalidInput, MeasurementFailed
from latency_profiler.layers import Layer, Node
from latency_profiler.runtimes.base import Runtime
from latency_profiler.timing import LAYER, NETWORK, TAIL, Effort, Pace, Series, Stopwatch, Subject, Timing, interleave
from latency_profiler.yardstick import Yardstick

Json = dict[str, Any]
Measure = Callable[[Sequence[Json], int], list[Json]]
GROUP_SIZE = 8
GROUP_PARAMETERS = 1 << 24
"""Weights that are loaded at the same time: 64 MiB, unless one layer alone has more."""
LONGEST_REASON = 1000
LEAST_SECONDS = 1e-9
"""What a layer counts that is not slower than the empty run: too little to be seen, but not nothing."""


def measure_work(
    runtime: Runtime, items: Sequence[Json], rng: np.random.Generator, go_on: Callable[[], bool] = lambda: True
) -> list[Json]:
    """`measure_groups` in this process."""
    return measure_groups(partial(measure_group, runtime, yardstick=yardstick_of(runtime)), items, rng, go_on)


def measure_groups(
    measure: Measure,
    items: Sequence[Json],
    rng: np.random.Generator,
    go_on: Callable[[], bool] = lambda: True,
    again: Callable[[], bool] = lambda: True,
) -> list[Json]:
    """Results of leased items, in a shuffled order, so that a drift of the machine is no slope over widths.

    What was unsteady is measured once more when all else is done: the disturbance may be over.

    Args:
        measure: gives the results of items that are loaded at the same time, and a seed.
        items: `{"work_id", "kind", "key", "payload"}` each.
        rng: shuffles.
        go_on: asked before every group but the first; what is left out has no result.
        again: asked before every group of unsteady items.
    """
    results: dict[int, Json] = {}
    for group in _groups([items[i] for i in rng.permutation(len(items))]):
        if results and not go_on():
            break
        results |= _by_id(measure(group, _seed(rng)))
    unsteady = [item for item in items if not results.get(item["work_id"], {}).get("steady", True)]
    for group in _groups(unsteady):
        if not again():
            break
        for work_id, second in _by_id(measure(group, _seed(rng))).items():
            results[work_id] = _better(results[work_id], second)
    return list(results.values())


def yardstick_of(runtime: Runtime) -> Yardstick | None:
    """What tells quiet moments where a runtime computes on this machine; None where it asks another one."""
    return Yardstick(runtime.settings.threads) if isinstance(runtime.empty_run(), Stopwatch) else None


def measure_group(runtime: Runtime, items: Sequence[Json], seed: int, yardstick: Pace | None = None) -> list[Json]:
    """Results of items that are loaded and timed together."""
    empty = Series(runtime.empty_run())
    loaded = [_load(runtime, item) for item in items]
    series = [empty, *(one for one in loaded if isinstance(one, Series))]
    interleave(series, np.random.default_rng(seed), yardstick)
    name = f"{runtime.name} {runtime.version}"
    return [_result(item, one, empty, name) for item, one in zip(items, loaded, strict=True)]


def failure(item: Json, reason: str) -> Json:
    """The result of an item that could not be measured."""
    return {**{name: item[name] for name in ("work_id", "kind", "key")}, "error": _said(reason)}


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 32))


def _by_id(results: Sequence[Json]) -> dict[int, Json]:
    return {result["work_id"]: result for result in results}


def _better(first: Json, second: Json) -> Json:
    """Of two measurements the one with the surer median; it keeps the other's values among its conditions."""
    if "error" in second:
        return first
    spread = [one["iqr"] / len(one["values"]) ** 0.5 for one in (first, second)]
    best, other = (second, first) if second["steady"] or spread[1] < spread[0] else (first, second)
    kept = {name: other[name] for name in ("seconds", "iqr", "steady", "values")} | {"at": other["conditions"]["at"]}
    return best | {"conditions": {**best["conditions"], "other": kept}}


def _load(runtime: Runtime, item: Json) -> Series | Exception:
    """An item ready to be measured, or why it cannot be."""
    try:
        subject, effort = _subject(runtime, item), _effort(item)
    except Exception as error:  # runtimes raise whatever they like: the reason is data
        return error
    return Series(subject, effort)


def _effort(item: Json) -> Effort:
    if item["kind"] != "network":
        return LAYER
    return TAIL if item["payload"].get("statistic") == Statistic.P90 else NETWORK


def _subject(runtime: Runtime, item: Json) -> Subject:
    kind, payload = item["kind"], item["payload"]
    if kind == "network":
        return runtime.load_network(_nodes(payload))
    if kind not in ("layer", "canary"):
        raise InvalidInput(f"this agent cannot measure {kind!r}; it measures layers and networks")
    layer = Layer.from_json(payload["layer"])
    if layer.key != item["key"].partition("@")[0]:
        raise InvalidInput(f"the payload of {item['key']!r} is the layer {layer.key!r}")
    return runtime.load_layer(layer)


def _nodes(payload: Json) -> list[Node]:
    return [
        Node(node["name"], Layer.from_json(node["layer"]), node["input"], node["shortcut"]) for node in payload["nodes"]
    ]


def _result(item: Json, series: Series | Exception, empty: Series, runtime: str) -> Json:
    if isinstance(series, Exception):
        return failure(item, f"{type(series).__name__}: {series}")
    try:
        timing, nothing = series.timing(), empty.timing()
    except MeasurementFailed as error:
        return failure(item, str(error))
    fixed = 0.0 if item["kind"] == "network" else nothing.median
    return {name: item[name] for name in ("work_id", "kind", "key")} | _figures(timing, nothing.median, fixed, runtime)


def _figures(timing: Timing, empty_run: float, fixed: float, runtime: str) -> Json:
    """What was measured; `fixed` seconds of every run are not the item's own."""
    facts = asdict(timing)
    return {
        "seconds": max(facts.pop("median") - fixed, LEAST_SECONDS),
        "iqr": facts.pop("iqr"),
        "steady": facts.pop("steady"),
        "values": list(facts.pop("values")),
        "conditions": {**conditions(), "runtime": runtime, **facts, "empty_run": empty_run},
    }


def _said(reason: str) -> str:
    """A reason as the service takes it: whatever a native library has put into its message."""
    return reason.encode("ascii", "backslashreplace").decode().replace("\0", " ")[:LONGEST_REASON]


def _groups(items: Sequence[Json]) -> Iterator[list[Json]]:
    """Items that are loaded at the same time."""
    group: list[Json] = []
    weight = 0
    for item in items:
        added = _parameters(item)
        if group and (len(group) == GROUP_SIZE or weight + added > GROUP_PARAMETERS):
            yield group
            group, weight = [], 0
        group, weight = [*group, item], weight + added
    if group:
        yield group


def _parameters(item: Json) -> int:
    """Weights of an item; none where its payload cannot be read, which loading it will report."""
    try:
        nodes = item["payload"].get("nodes") or [item["payload"]]
        return sum(layer_parameters(Layer.from_json(node["layer"])) for node in nodes)
    except (InvalidInput, KeyError, TypeError, AttributeError):
        return 0
