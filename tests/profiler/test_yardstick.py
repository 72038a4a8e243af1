"""Quiet moments, on a machine that does what the test says."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from latency_profiler.layers import Layer, Op
from latency_profiler.measuring import LEAST_SECONDS, measure_group, measure_work, yardstick_of
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.yardstick import LEARNING, MEMORY, TOLERANCE, Yardstick, _numbers, _spread


@dataclass
class Shared:
    """A machine whose piece of work takes `pace(now)` seconds."""

    pace: Callable[[float], float]
    now: float = 0.0
    took: list[float] = field(default_factory=list)

    def work(self) -> float:
        seconds = self.pace(self.now)
        self.now += seconds
        self.took.append(seconds)
        return seconds

    def yardstick(self) -> Yardstick:
        return Yardstick(pieces=[self.work], clock=lambda: self.now)


def test_the_best_time_is_learnt_before_anything_is_measured() -> None:
    machine = Shared(lambda now: 2e-3 if now < LEARNING - 0.5 else 1e-3)
    assert machine.yardstick().best == 1e-3
    assert machine.now == pytest.approx(LEARNING, abs=0.01)


@pytest.mark.parametrize(("share", "quiet"), [(1.0, True), (TOLERANCE - 0.01, True), (TOLERANCE + 0.01, False)])
def test_a_machine_is_quiet_near_its_best(share: float, quiet: bool) -> None:
    machine = Shared(lambda now: 1e-3 if now < 5 else 1e-3 * share)
    yardstick = machine.yardstick()
    machine.now = 5.0
    assert yardstick.quiet() is quiet


def test_a_quiet_moment_is_waited_for_but_not_for_ever() -> None:
    machine = Shared(lambda now: 1.4e-3 if 5 <= now < 8 else 1e-3)
    yardstick = machine.yardstick()
    machine.now = 5.0
    assert not yardstick.settle(until=6.0)
    assert 6.0 <= machine.now < 6.01
    assert yardstick.settle(until=10.0)
    assert 8.0 <= machine.now < 8.01


def test_a_processor_that_has_become_slower_for_good_is_quiet_again() -> None:
    machine = Shared(lambda now: 1e-3 if now < 5 else 2e-3)
    yardstick = machine.yardstick()
    machine.now = 5.0
    assert not yardstick.quiet()
    for _ in range(MEMORY + 1):
        machine.now += 1.0
        yardstick.quiet()
    assert yardstick.quiet()


@pytest.mark.parametrize("slow", [0, 1])
def test_all_pieces_must_be_as_fast_as_they_can_be(slow: int) -> None:
    machines = [Shared(lambda now: 1e-3), Shared(lambda now: 1e-3)]
    yardstick = Yardstick(pieces=[one.work for one in machines], clock=lambda: sum(one.now for one in machines))
    assert yardstick.quiet()
    assert yardstick.best == pytest.approx(2e-3)
    machines[slow].pace = lambda now: 1e-3 * (TOLERANCE + 0.01)
    assert not yardstick.quiet()
    machines[slow].pace = lambda now: 1e-3
    assert yardstick.quiet()


def test_numbers_of_the_usual_pieces_are_not_astride_cache_lines() -> None:
    numbers = [_numbers(1 << 12) for _ in range(8)]
    assert all(one.ctypes.data % 64 == 0 for one in numbers)
    assert all((one == 1.0).all() for one in numbers)  # written, so that each has memory of its own


def test_all_threads_must_be_undisturbed() -> None:
    together = _spread([lambda: 1e-3, lambda: 3e-3, lambda: 2e-3])
    assert together() == 3e-3


def test_only_runtimes_of_this_machine_have_a_yardstick() -> None:
    assert yardstick_of(open_runtime("simulated", Settings())) is None
    runtime = open_runtime("onnxruntime", Settings())
    layer = Layer(Op.LINEAR, 1024, 1024, size=1)
    item = {"work_id": 1, "kind": "layer", "key": layer.key, "payload": {"layer": layer.to_json()}}
    [result] = measure_work(runtime, [item], np.random.default_rng(0))
    assert result["seconds"] > LEAST_SECONDS
    busy = Shared(lambda now: 1e-3 if now < LEARNING else 2e-3).yardstick()
    [result] = measure_group(runtime, [item], 0, busy)
    assert list(result["conditions"]["disturbed"]) == list(range(len(result["values"])))
    assert not result["steady"]
