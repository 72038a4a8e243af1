"""Leased work → results, as they are handed in.

Work is measured in groups: what is loaded at the same time is timed interleaved, and the runtime's empty run with it,
under the same conditions. A layer's seconds are its median less the empty run's, or less its frame's where the runtime
wants frames (`frames`); a network keeps the call that it pays for once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from latency_profiler.cost import Statistic, layer_parameters
from latency_profiler.device import conditions
from latency_profiler.errors import InvalidInput, MeasurementFailed
from latency_profiler.frames import frame
from latency_profiler.layers import Layer, Node
from latency_profiler.runtimes.base import Runtime
from latency_profiler.timing import NETWORK, TAIL, Pace, Series, Stopwatch, Timing, interleave
from latency_profiler.yardstick import Yardstick

Json = dict[str, Any]
Measure = Callable[[Sequence[Json], int], list[Json]]
GROUP_SIZE = 8
GROUP_PARAMETERS = 1 << 24
"""Weights that are loaded at the same time: 64 MiB, unless one layer alone has more."""
LONGEST_REASON = 1000
LEAST_SECONDS = 1e-9
"""What a layer counts that takes no longer than what is left without it: too little to be seen, but not nothing."""


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


@dataclass(frozen=True, slots=True)
class Difference:
    """An item as it is measured: one series, and what of its seconds is not the item's own, if anything is."""

    whole: Series
    rest: Series | None


def measure_group(runtime: Runtime, items: Sequence[Json], seed: int, yardstick: Pace | None = None) -> list[Json]:
    """Results of items that are loaded and timed together."""
    empty = Series(runtime.empty_run())
    loaded = [_load(runtime, item, empty) for item in items]
    pairs = [one for one in loaded if isinstance(one, Difference)]
    frames = (one.rest for one in pairs if one.rest is not None and one.rest is not empty)
    interleave([empty, *(one.whole for one in pairs), *frames], np.random.default_rng(seed), yardstick)
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


def _load(runtime: Runtime, item: Json, empty: Series) -> Difference | Exception:
    """An item ready to be measured, or why it cannot be."""
    try:
        kind, payload = item["kind"], item["payload"]
        if kind == "network":
            effort = TAIL if payload.get("statistic") == Statistic.P90 else NETWORK
            return Difference(Series(runtime.load_network(_nodes(payload)), effort), None)
        layer = _layer(item)
        around = frame(layer) if runtime.framed else None
        if around is None:
            return Difference(Series(runtime.load_layer(layer)), empty)
        without = empty if around.without is None else Series(runtime.load_network(around.without))
        return Difference(Series(runtime.load_network(around.around)), without)
    except Exception as error:  # runtimes raise whatever they like: the reason is data
        return error


def _layer(item: Json) -> Layer:
    if item["kind"] not in ("layer", "canary"):
        raise InvalidInput(f"this agent cannot measure {item['kind']!r}; it measures layers and networks")
    layer = Layer.from_json(item["payload"]["layer"])
    if layer.key != item["key"].partition("@")[0]:
        raise InvalidInput(f"the payload of {item['key']!r} is the layer {layer.key!r}")
    return layer


def _nodes(payload: Json) -> list[Node]:
    return [
        Node(node["name"], Layer.from_json(node["layer"]), node["input"], node["shortcut"]) for node in payload["nodes"]
    ]


def _result(item: Json, measured: Difference | Exception, empty: Series, runtime: str) -> Json:
    if isinstance(measured, Exception):
        return failure(item, f"{type(measured).__name__}: {measured}")
    try:
        whole, nothing = measured.whole.timing(), empty.timing()
        rest = None if measured.rest is None else measured.rest.timing()
    except MeasurementFailed as error:
        return failure(item, str(error))
    return {name: item[name] for name in ("work_id", "kind", "key")} | _figures(whole, rest, nothing.median, runtime)


def _figures(whole: Timing, rest: Timing | None, empty_run: float, runtime: str) -> Json:
    """What was measured; the seconds of `rest` are not the item's own."""
    facts = asdict(whole)
    own = facts.pop("median") - (0.0 if rest is None else rest.median)
    return {
        "seconds": max(own, LEAST_SECONDS),
        "iqr": facts.pop("iqr"),
        "steady": facts.pop("steady") and (rest is None or rest.steady),
        "values": list(facts.pop("values")),
        "conditions": {
            **conditions(), "runtime": runtime, **facts, "empty_run": empty_run, "rest": rest and rest.median,
        },
    }  # fmt: skip


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
