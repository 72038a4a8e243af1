"""Leased work → results, as they are handed in.

Work is measured in groups: what is loaded at the same time is timed interleaved, and the runtime's empty run with it,
under the same conditions. A layer's seconds are its median less the empty run's, or less its frame's where the runtime
wants frames (`frames`); a network keeps the call that it pays for once.

A machine that others share is slower for some seconds and fast again, and a network is slower or faster for as long as
its weights lie where they lie. Layers are so many that this cancels. A network is loaded and measured in several
*visits* that lie apart, and the middle one counts. What changes for minutes is told by a `reference` that is timed with
every group: seconds are those at its usual speed. Far from that (`CLOSE`) the reference tells too little of others, so
that networks are visited more often. Canaries, which watch that speed, count as they ran.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from latency_profiler.cost import Statistic, layer_parameters
from latency_profiler.device import conditions
from latency_profiler.errors import InvalidInput, MeasurementFailed, NoMeasuringProcess
from latency_profiler.frames import frame
from latency_profiler.layers import Layer, Node
from latency_profiler.reference import Reference, Speed, reference_of
from latency_profiler.runtimes.base import Runtime
from latency_profiler.timing import DIGITS, LAYER, NETWORK, TAIL, Pace, Series, Stopwatch, Timing, interleave
from latency_profiler.yardstick import Yardstick

Json = dict[str, Any]
Measure = Callable[[Sequence[Json], int], list[Json]]
GROUP_SIZE = 8
GROUP_PARAMETERS = 1 << 24
"""Weights that are loaded at the same time: 64 MiB, unless one layer alone has more."""
LONGEST_REASON = 1000
VISITS = 3
"""Of each network close to the machine's usual speed; odd, so that there is a middle one."""
MOST_VISITS = 9
"""Where the machine is slower or faster for longer than some visits last."""
CLOSE = 0.1
"""Share of the usual speed: what mostly waits slows down less than what computes, and for a correction of 17 % that was
6 % (a small network of PyTorch's)."""
APART = 2.0
"""Seconds from the end of one visit to the next, at least, where the machine is one that others share."""
LEAST_SECONDS = 1e-9
"""What a layer counts that takes no longer than what is left without it: too little to be seen, but not nothing."""
log = logging.getLogger("secateurs.agent")


def measure_work(
    runtime: Runtime, items: Sequence[Json], rng: np.random.Generator, go_on: Callable[[], bool] = lambda: True
) -> list[Json]:
    """`measure_groups` in this process."""
    return measure_groups(measuring(runtime), items, rng, go_on)


def measuring(runtime: Runtime) -> Measure:
    """`measure_group` in this process; all groups are compared with the same yardstick and reference."""
    return partial(measure_group, runtime, yardstick=yardstick_of(runtime), reference=reference_of(runtime))


def measure_groups(
    measure: Measure,
    items: Sequence[Json],
    rng: np.random.Generator,
    go_on: Callable[[], bool] = lambda: True,
    again: Callable[[], bool] = lambda: True,
    wait: Callable[[float], object] = time.sleep,
) -> list[Json]:
    """Results of leased items, in a shuffled order, so that a drift of the machine is no slope over widths.

    When all is done once, networks are visited again, and layers that were unsteady or measured
    far from the usual speed: the disturbance may be over.

    Args:
        measure: gives the results of items that are loaded at the same time, and a seed.
        items: `{"work_id", "kind", "key", "payload"}` each.
        rng: shuffles.
        go_on: asked before every group but the first; what is left out has no result.
        again: asked before every group that was measured before; where it says no, networks that were visited too few
            times have no result.
        wait: passes some seconds between visits.

    Raises:
        NoMeasuringProcess: nothing could be measured; what was measured before that counts.
    """
    visits, left, whole = dict[int, list[Json]](), dict[int, float](), False

    def pause(group: Sequence[Json]) -> None:
        shared = [item for item in group if item["kind"] == "network" and _shared(visits[item["work_id"]][0])]
        if shared:
            wait(max(0.0, max(left[item["work_id"]] for item in shared) + APART - time.monotonic()))

    def rounds() -> Iterator[list[Json]]:
        nonlocal whole
        for group in _groups([items[i] for i in rng.permutation(len(items))]):
            if visits and not go_on():
                break
            yield group
        for _ in range(1, MOST_VISITS):
            for group in _groups([item for item in items if _visited_again(item, visits.get(item["work_id"], []))]):
                pause(group)
                if not again():
                    return
                yield group
        whole = True

    try:
        for group in rounds():
            for result in measure(group, _seed(rng)):
                visits.setdefault(result["work_id"], []).append(result)
                left[result["work_id"]] = time.monotonic()
    except NoMeasuringProcess as error:
        if not visits:
            raise
        log.warning("%s; what was measured before is handed in", error)
    asked = {item["work_id"]: item for item in items}
    return [
        _middle(results, asked[work_id])
        for work_id, results in visits.items()
        if whole or asked[work_id]["kind"] != "network" or not _visited_again(asked[work_id], results)
    ]


def yardstick_of(runtime: Runtime) -> Yardstick | None:
    """What tells quiet moments where a runtime computes on this machine; None where it asks another one."""
    return Yardstick(runtime.settings.threads) if isinstance(runtime.empty_run(), Stopwatch) else None


@dataclass(frozen=True, slots=True)
class Difference:
    """An item as it is measured: one series, and what of its seconds is not the item's own, if anything is."""

    whole: Series
    rest: Series | None


def measure_group(
    runtime: Runtime,
    items: Sequence[Json],
    seed: int,
    yardstick: Pace | None = None,
    advanced: Callable[[], None] = lambda: None,
    reference: Reference | None = None,
) -> list[Json]:
    """Results of items that are loaded and timed together; `advanced` is called after each load and each value."""
    empty = Series(runtime.empty_run())
    loaded = []
    for item in items:
        loaded.append(_load(runtime, item, empty))
        advanced()
    pairs = [one for one in loaded if isinstance(one, Difference)]
    frames = (one.rest for one in pairs if one.rest is not None and one.rest is not empty)
    effort = max((one.whole.effort for one in pairs), key=lambda effort: effort.least, default=LAYER)
    beside = reference.series(effort) if reference else []
    series = [empty, *(one.whole for one in pairs), *frames, *beside]
    interleave(series, np.random.default_rng(seed), yardstick, advanced)
    about: Json = {"runtime": f"{runtime.name} {runtime.version}", "yardstick": yardstick and yardstick.best}
    try:
        took = [one.timing() for one in beside]
    except MeasurementFailed as error:
        return [failure(item, f"the reference failed: {error}") for item in items]
    speed = reference.speed(took) if reference else None
    about |= {"reference": [one.median for one in took]} if took else {}
    return [_result(item, one, empty, about, speed) for item, one in zip(items, loaded, strict=True)]


def failure(item: Json, reason: str) -> Json:
    """The result of an item that could not be measured."""
    return {**{name: item[name] for name in ("work_id", "kind", "key")}, "error": _said(reason)}


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 32))


def _visited_again(item: Json, results: Sequence[Json]) -> bool:
    """Whether a network has too few results close to the usual speed, or a layer only one, far from it or unsteady."""
    if not results or any("error" in result for result in results):
        return False
    if item["kind"] == "network":
        return sum(map(_close, results)) < VISITS
    return len(results) == 1 and not (results[0]["steady"] and _close(results[0]))


def _close(result: Json) -> bool:
    """Whether the machine had about its usual speed."""
    return bool(abs(result["conditions"].get("speed", 1.0) - 1) <= CLOSE)


def _shared(result: Json) -> bool:
    """Whether this was measured on a machine that can be disturbed: only that has a yardstick."""
    return result.get("conditions", {}).get("yardstick") is not None


def _middle(results: Sequence[Json], item: Json) -> Json:
    """The middle of several visits, or the surer of two; the others' values are kept among its conditions.

    Those close to the usual speed are preferred to the others.
    """
    right = [result for result in results if "error" not in result]
    if len(right) < 2:
        return (right or results)[0]
    close = [one for one in right if _close(one)] or right
    if len(close) <= 2:
        best = min(close, key=lambda one: (not one["steady"], one["iqr"] / len(one["values"]) ** 0.5))
    else:
        tail = item["payload"].get("statistic") == Statistic.P90
        best = sorted(close, key=lambda one: one["conditions"]["p90"] if tail else one["seconds"])[len(close) // 2]
    kept = [
        {name: one[name] for name in ("seconds", "iqr", "steady")}
        | {"values": [round(value, DIGITS) for value in one["values"]]}
        | {"speed": one["conditions"].get("speed", 1.0), "at": one["conditions"]["at"]}
        for one in right
        if one is not best
    ]
    return best | {"conditions": {**best["conditions"], "others": kept}}


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


def _result(
    item: Json, measured: Difference | Exception, empty: Series, about: Json, machine: Speed | None
) -> Json:  # fmt: skip
    if isinstance(measured, Exception):
        return failure(item, f"{type(measured).__name__}: {measured}")
    try:
        whole, nothing = measured.whole.timing(), empty.timing()
        rest = None if measured.rest is None else measured.rest.timing()
    except MeasurementFailed as error:
        return failure(item, str(error))
    speed = 1.0 if machine is None or item["kind"] == "canary" else machine.of(whole.median)
    about = conditions() | about | {"speed": speed, "empty_run": speed * nothing.median}
    whole, rest = whole.at(speed), rest and rest.at(speed)
    return {name: item[name] for name in ("work_id", "kind", "key")} | _figures(whole, rest, about)


def _figures(whole: Timing, rest: Timing | None, about: Json) -> Json:
    """What was measured; the seconds of `rest` are not the item's own.

    The range of a difference is that of both together; what is steady is the run of which a layer is a part.
    """
    facts = asdict(whole)
    own = facts.pop("median") - (0.0 if rest is None else rest.median)
    facts["iqr"] = math.hypot(whole.iqr, 0.0 if rest is None else rest.iqr)
    if rest is not None:
        about = {**about, "rest_values": [round(value, DIGITS) for value in rest.values]}
    return {
        "seconds": max(own, LEAST_SECONDS),
        "iqr": facts.pop("iqr"),
        "steady": facts.pop("steady") and (rest is None or rest.steady),
        "values": list(facts.pop("values")),
        "conditions": {**about, **facts, "rest": rest and rest.median},
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
