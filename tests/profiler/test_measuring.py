"""How leased items are measured: in groups, in which order, how often, and which of several visits counts."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from latency_profiler import measuring
from latency_profiler.cost import layer_parameters
from latency_profiler.layers import Layer
from latency_profiler.measuring import (
    APART,
    GROUP_SIZE,
    LEAST_SECONDS,
    VISITS,
    failure,
    measure_groups,
    measure_work,
)
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from latency_profiler.timing import TAIL, Stopwatch
from tests.profiler.test_agent import Json, layer, layer_item, network_item

LARGEST_FACTS = 32 << 10
"""Bytes of conditions that the service takes."""


def test_a_percentile_that_decides_takes_more_runs_and_fits_into_an_upload() -> None:
    plain, tail = network_item(1), network_item(2)
    tail["payload"]["statistic"] = "p90"
    results = measure_work(Simulated(Settings()), [plain, tail], np.random.default_rng(0))
    runs = {one["work_id"]: len(one["conditions"]["singles"]) for one in results}
    assert runs[2] >= TAIL.least > runs[1] / TAIL.singles
    assert len(json.dumps(results[0]["conditions"])) < LARGEST_FACTS
    assert len(json.dumps(results[1]["conditions"])) < LARGEST_FACTS


def test_broken_items_are_results_with_a_reason() -> None:
    wrong_key = {**layer_item(1, 16), "key": "conv:1>2"}
    no_layer = {**layer_item(2, 16), "payload": {}}
    unknown = {**layer_item(3, 16), "kind": "dance"}
    results = measure_work(
        Simulated(Settings()), [wrong_key, no_layer, unknown, layer_item(4, 16)], np.random.default_rng(0)
    )
    errors = {one["work_id"]: one.get("error") for one in results}
    assert "is the layer 'conv-k3s1p1-8x8-bn-relu:8>16'" in errors[1]
    assert errors[2] == "KeyError: 'layer'"
    assert "cannot measure 'dance'" in errors[3]
    assert errors[4] is None


class Fragile(Simulated):
    """Fails while running one layer, in the words of a native library."""

    def load_layer(self, layer: Layer) -> Any:
        return Stopwatch(self._fail) if layer.c_out == 16 else super().load_layer(layer)

    def _fail(self) -> None:
        raise RuntimeError("kernel \0 \udcff" + "x" * 5000)


def test_a_layer_that_fails_while_running_spoils_no_other() -> None:
    items = [layer_item(1, 16), layer_item(2, 24)]
    results = {one["work_id"]: one for one in measure_work(Fragile(Settings()), items, np.random.default_rng(0))}
    assert results[1]["error"].startswith("RuntimeError: kernel   \\udcff")
    assert len(results[1]["error"]) == 1000
    assert results[2]["seconds"] > LEAST_SECONDS


def test_the_order_is_shuffled_by_the_seed() -> None:
    items = [layer_item(i, 8 + i) for i in range(1, 30)]

    def order(seed: int) -> list[int]:
        return [one["work_id"] for one in measure_work(Simulated(Settings()), items, np.random.default_rng(seed))]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(1, 30)) != order(0)


def test_measuring_ends_with_the_lease_but_not_empty_handed() -> None:
    items = [layer_item(i, 8 + i) for i in range(1, 30)]
    results = measure_work(Simulated(Settings()), items, np.random.default_rng(0), lambda: False)
    assert len(results) == GROUP_SIZE


def test_layers_of_more_weights_than_fit_are_loaded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    items, loaded = [layer_item(at, 24) for at in range(4)], list[int]()

    def measure(group: Sequence[Json], seed: int) -> list[Json]:
        loaded.append(len(group))
        return [failure(item, "lost") for item in group]

    for most, expected in ((2 * layer_parameters(layer(items[0])), [2, 2]), (1, [1] * 4)):
        monkeypatch.setattr(measuring, "GROUP_PARAMETERS", most)
        loaded.clear()
        measure_groups(measure, items, np.random.default_rng(0))
        assert loaded == expected


class Restless:
    """Measures; `unsteady` of the calls for a key are unsteady."""

    def __init__(self, unsteady: int) -> None:
        self.unsteady, self.calls = unsteady, list[str]()

    def __call__(self, items: Sequence[Json], seed: int) -> list[Json]:
        return [self._result(item) for item in items]

    def _result(self, item: Json) -> Json:
        self.calls.append(item["key"])
        nth = self.calls.count(item["key"])
        wild = nth <= self.unsteady and item["work_id"] == 3
        about = {"seconds": float(nth), "iqr": 0.5 / nth if wild else 0.0, "steady": not wild, "values": [float(nth)]}
        return {"work_id": item["work_id"], "key": item["key"], **about, "conditions": {"at": f"time {nth}"}}


@pytest.mark.parametrize("unsteady", [1, 2])
def test_what_is_unsteady_is_measured_again_when_all_else_is_done(unsteady: int) -> None:
    items, measure = [layer_item(i, 8 + i) for i in range(1, 30)], Restless(unsteady)
    results = {one["work_id"]: one for one in measure_groups(measure, items, np.random.default_rng(0))}
    assert measure.calls[-1] == items[2]["key"]
    assert len(measure.calls) == len(items) + 1
    result = results[3]
    assert (result["seconds"], result["steady"]) == (2.0, unsteady == 1), "the surer one stands, flagged if unsteady"
    other = {"seconds": 1.0, "iqr": 0.5, "steady": False, "values": [1.0], "speed": 1.0, "at": "time 1"}
    assert result["conditions"]["others"] == [other]
    assert "others" not in results[4]["conditions"]


class Moody:
    """Measures networks in times that are told; None is a failure."""

    def __init__(self, *times: tuple[float, float] | None, yardstick: float | None = None) -> None:
        self.times, self.yardstick = list(times), yardstick

    def __call__(self, items: Sequence[Json], seed: int) -> list[Json]:
        assert len(items) == 1
        if (told := self.times.pop(0)) is None:
            return [failure(items[0], "lost")]
        conditions = {"at": "now", "p90": told[1], "yardstick": self.yardstick}
        figures = {"seconds": told[0], "iqr": 0.0, "steady": True, "values": [told[0]], "conditions": conditions}
        return [{"work_id": items[0]["work_id"], **figures}]


def test_the_middle_of_three_visits_is_a_networks_time() -> None:
    measure = Moody((1.0, 9.0), (3.0, 4.0), (2.0, 8.0))
    [result] = measure_groups(measure, [network_item(1)], np.random.default_rng(0))
    assert (result["seconds"], measure.times) == (2.0, [])
    assert [one["values"] for one in result["conditions"]["others"]] == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("speeds", "seconds"),
    [
        ([1.0, 0.8, 0.8, 0.95, 1.05], 4.0),
        ([0.8, 1.2, *[0.8] * 4, 0.95, 0.8, 0.8], 7.0),
        ([0.8, 1.2, *[0.8] * 7], 5.0),
    ],
    ids=["three that are close", "one that is close", "none that is close"],
)
def test_a_network_is_visited_more_often_where_the_machine_is_slower_than_usual(
    speeds: list[float], seconds: float
) -> None:
    """And the middle of the visits close to the usual speed counts."""

    def measure(items: Sequence[Json], seed: int) -> list[Json]:
        nth = next(visits)
        conditions = {"at": "now", "p90": 1.0, "speed": speeds[nth]}
        figures = {"iqr": 0.1 / (nth + 1), "steady": True, "values": [1.0], "conditions": conditions}
        return [{"work_id": items[0]["work_id"], "seconds": float(nth + 1), **figures}]

    visits = iter(range(len(speeds)))
    [result] = measure_groups(measure, [network_item(1)], np.random.default_rng(0))
    assert (result["seconds"], next(visits, None)) == (seconds, None), "and no more often"
    assert [one["speed"] for one in result["conditions"]["others"]] == [
        speed for nth, speed in enumerate(speeds, 1) if nth != seconds
    ]


def test_a_layer_measured_far_from_the_usual_speed_is_measured_again() -> None:
    def measure(items: Sequence[Json], seed: int) -> list[Json]:
        speed, seconds = next(visits)
        figures = {"iqr": 0.0, "steady": True, "values": [1.0], "conditions": {"at": "now", "speed": speed}}
        return [{"work_id": items[0]["work_id"], "seconds": seconds, **figures}]

    visits = iter([(0.8, 1.0), (0.95, 2.0)])
    [result] = measure_groups(measure, [layer_item(1, 8)], np.random.default_rng(0))
    assert (result["seconds"], result["conditions"]["speed"]) == (2.0, 0.95)


def test_where_a_percentile_decides_visits_are_ordered_by_it() -> None:
    item = network_item(1)
    item["payload"]["statistic"] = "p90"
    [result] = measure_groups(Moody((1.0, 9.0), (3.0, 4.0), (2.0, 8.0)), [item], np.random.default_rng(0))
    assert result["conditions"]["p90"] == 8.0
    [result] = measure_groups(Moody((1.0, 7.0), (3.0, 4.0), (2.0, 8.0)), [item], np.random.default_rng(0))
    assert result["conditions"]["p90"] == 7.0


@pytest.mark.parametrize(("yardstick", "apart"), [(None, 0), (1e-4, 2)])
def test_visits_lie_apart_where_others_can_disturb(
    yardstick: float | None, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latency_profiler.measuring.time.monotonic", lambda: 0.0)
    waited = list[float]()
    measure = Moody(*[(1.0, 1.0)] * 3, yardstick=yardstick)
    measure_groups(measure, [network_item(1)], np.random.default_rng(0), wait=waited.append)
    assert waited == [APART] * apart


def test_every_network_has_its_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was measured last and comes first in the next round."""
    clock, at = [0.0], dict[int, list[float]]()
    monkeypatch.setattr("latency_profiler.measuring.time.monotonic", lambda: clock[0])

    def measure(items: Sequence[Json], seed: int) -> list[Json]:
        results = []
        for item in items:
            at.setdefault(item["work_id"], []).append(clock[0])
            conditions = {"at": "now", "p90": 1.0, "yardstick": 1e-4}
            about = {"seconds": 1.0, "iqr": 0.0, "steady": True, "values": [1.0], "conditions": conditions}
            results.append({"work_id": item["work_id"], **about})
        clock[0] += 0.7
        return results

    def wait(seconds: float) -> None:
        clock[0] += seconds

    items = [layer_item(1000 + i, 8 + i) for i in range(20)] + [network_item(i) for i in range(1, 30)]
    measure_groups(measure, items, np.random.default_rng(0), wait=wait)
    gaps = [after - before for times in at.values() for before, after in pairwise(times)]
    assert len(gaps) == 2 * 29
    assert min(gaps) >= APART
    assert clock[0] < 15, "and no longer than that takes"


def test_visits_end_when_one_fails_or_the_agent_is_stopped() -> None:
    [result] = measure_groups(Moody((1.0, 1.0), None), [network_item(1)], np.random.default_rng(0))
    assert result["seconds"] == 1.0
    [result] = measure_groups(Moody(None), [network_item(1)], np.random.default_rng(0))
    assert result["error"] == "lost"


def test_a_network_that_was_visited_too_few_times_when_the_agent_stops_has_no_result() -> None:
    """It would stand for good: the first measurement of a key does."""
    visited = list[int]()

    def moody(items: Sequence[Json], seed: int) -> list[Json]:
        visited.append(len(items))
        return machine(items, seed)

    for visits, kept in ((1, 0), (VISITS - 1, 0), (VISITS, 1)):
        visited.clear()
        machine = Moody(*[(1.0, 1.0)] * VISITS)
        results = measure_groups(
            moody, [network_item(1)], np.random.default_rng(0), again=lambda: len(visited) < visits  # noqa: B023
        )  # fmt: skip
        assert len(results) == kept


def test_a_second_measurement_that_fails_or_has_no_time_leaves_the_first() -> None:
    def fails(items: Sequence[Json], seed: int) -> list[Json]:
        return [failure(item, "lost") for item in items] if wild.calls else wild(items, seed)

    wild = Restless(9)
    [first] = measure_groups(fails, [layer_item(3, 11)], np.random.default_rng(0))
    assert (first["seconds"], first["steady"]) == (1.0, False)
    [first] = measure_groups(
        Restless(9), [layer_item(3, 11)], np.random.default_rng(0), again=lambda: False
    )  # fmt: skip
    assert first["seconds"] == 1.0


def test_a_canary_is_measured_like_its_layer() -> None:
    item = layer_item(1, 16)
    canary = {**item, "work_id": 2, "kind": "canary", "key": f"{item['key']}@7"}
    layer_result, again = sorted(
        measure_work(Simulated(Settings()), [item, canary], np.random.default_rng(0)), key=lambda one: one["work_id"]
    )
    assert (again["kind"], again["key"]) == ("canary", canary["key"])
    assert again["seconds"] == pytest.approx(layer_result["seconds"], rel=0.05), "less the empty run, too"
