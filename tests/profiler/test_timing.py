"""Timing with a clock that does what the test says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import pytest

from latency_profiler.errors import MeasurementFailed
from latency_profiler.timing import Effort, Series, Stopwatch, interleave, measure


@dataclass
class Machine:
    """A clock that only runs while `run` does: `first` seconds for the first run, then `costs` one by one."""

    costs: Iterable[float]
    first: float = 0.0
    now: float = 0.0
    runs: int = 0
    _costs: Iterator[float] = field(init=False)

    def __post_init__(self) -> None:
        self._costs = iter(self.costs)

    def run(self) -> None:
        self.now += self.first if self.runs == 0 and self.first else next(self._costs)
        self.runs += 1

    def clock(self) -> float:
        return self.now

    @property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.run, self.clock)


def test_a_value_lasts_as_long_as_asked() -> None:
    machine = Machine(repeat(3e-6))
    timing = measure(machine.stopwatch, Effort(value=1e-3))
    assert timing.loops == pytest.approx(1e-3 / 3e-6, rel=0.01)
    assert timing.median == pytest.approx(3e-6)


@pytest.mark.parametrize(("cost", "refill"), [(3e-6, 16), (1e-4, 16), (4.01e-4, 5), (1e-2, 2)])
def test_some_runs_refill_the_caches_before_each_value(cost: float, refill: int) -> None:
    """Sixteen, or as many as take two milliseconds, but two."""
    machine = Machine(repeat(cost))
    timing = measure(machine.stopwatch)
    assert machine.runs - timing.warmup == (refill + timing.loops) * len(timing.values)


def test_the_caches_of_others_cost_no_value_anything() -> None:
    """After others have run, a subject's first eight runs are slow."""
    slow: dict[int, int] = {}

    @dataclass
    class Cached:
        name: int

        def seconds(self, runs: int) -> float:
            if slow.get(self.name, 0) == 0:
                slow.clear()
            left = 8 - slow.get(self.name, 0)
            slow[self.name] = min(8, slow.get(self.name, 0) + runs)
            return 1e-4 * runs + 1e-4 * max(0, min(left, runs))

    series = [Series(Cached(name), Effort(least=9, most=9)) for name in range(8)]
    interleave(series, np.random.default_rng(0))
    assert [value for one in series for value in one.values] == pytest.approx([1e-4] * 72)


def test_a_run_longer_than_a_value_is_a_loop_of_one() -> None:
    timing = measure(Machine(repeat(0.01)).stopwatch)
    assert (timing.loops, timing.median) == (1, pytest.approx(0.01))


def test_a_slow_first_run_spoils_neither_loops_nor_values() -> None:
    timing = measure(Machine(repeat(1e-5), first=0.5).stopwatch, Effort(value=1e-3))
    assert timing.loops == pytest.approx(100, rel=0.02)
    assert max(timing.values) == pytest.approx(1e-5)


def test_constant_costs_are_steady_after_the_least_number_of_values() -> None:
    timing = measure(Machine(repeat(2e-3)).stopwatch, Effort(least=5, most=50))
    assert (len(timing.values), timing.steady) == (5, True)
    assert timing.iqr == pytest.approx(0.0, abs=1e-15)


def test_wild_costs_stop_at_the_most_and_are_called_unsteady() -> None:
    costs = np.random.default_rng(0).uniform(1e-3, 9e-3, 10_000).tolist()
    timing = measure(Machine(costs).stopwatch, Effort(least=5, most=20))
    assert (len(timing.values), timing.steady) == (20, False)
    low, median, high = np.percentile(timing.values, (25, 50, 75))
    assert (timing.median, timing.iqr) == (pytest.approx(median), pytest.approx(high - low))


def test_the_cap_in_seconds_ends_what_is_slow() -> None:
    costs = [1.0, 3.0] * 100
    timing = measure(Machine(costs).stopwatch, Effort(least=5, most=1000, cap=2.0))
    assert len(timing.values) == 5
    wild = np.random.default_rng(0).uniform(1e-3, 9e-3, 10_000).tolist()
    timing = measure(Machine(wild).stopwatch, Effort(least=2, most=1000, cap=0.2, steady_share=0.0))
    assert 20 < len(timing.values) < 60, "what is too wild ends as well"


def test_a_clock_that_stands_still_ends_too() -> None:
    class Still:
        def seconds(self, runs: int) -> float:
            return 0.0

    assert measure(Still(), Effort(most=5, least=5)).median == 0.0


def test_one_disturbance_costs_no_median() -> None:
    """Half a millisecond hits one value of each of three interleaved subjects."""
    machines = [Machine([2e-3] * 7 + [1.0] + [2e-3] * 100) for _ in range(3)]
    series = [Series(machine.stopwatch, Effort(least=7, most=15)) for machine in machines]
    interleave(series, np.random.default_rng(0))
    for one in series:
        assert one.timing().median == pytest.approx(2e-3)
        assert max(one.timing().values) == 1.0


def test_outliers_are_kept_and_marked() -> None:
    machine = Machine([2e-3] * 7 + [1.0] + [2.001e-3] * 6 + [2e-3] * 100)
    timing = measure(machine.stopwatch, Effort(least=9, most=9))
    assert [timing.values[at] for at in timing.outliers] == [1.0]
    assert timing.median == pytest.approx(2e-3, rel=1e-3)


def test_interleaved_subjects_take_turns() -> None:
    order: list[int] = []

    @dataclass
    class Noted:
        name: int

        def seconds(self, runs: int) -> float:
            order.append(self.name)
            return 2e-3 * runs

    interleave([Series(Noted(name), Effort(least=6, most=6)) for name in range(4)], np.random.default_rng(0))
    last = order[-48::2]
    assert last == order[-47::2], "each refills its caches itself"
    assert len(order) > 48
    for turn in range(6):
        assert sorted(last[4 * turn : 4 * turn + 4]) == [0, 1, 2, 3]
    assert len({tuple(last[4 * turn : 4 * turn + 4]) for turn in range(6)}) > 1, "the order changes"


def test_a_subject_that_fails_says_why_and_stops_no_other() -> None:
    def fail() -> None:
        raise OSError("no such kernel")

    bad, good = Series(Stopwatch(fail)), Series(Machine(repeat(1e-3)).stopwatch)
    interleave([bad, good], np.random.default_rng(0))
    assert good.timing().median == pytest.approx(1e-3)
    with pytest.raises(MeasurementFailed, match="OSError: no such kernel"):
        bad.timing()


def test_single_runs_are_timed_by_themselves_and_are_part_of_their_loop() -> None:
    costs = [1e-4 + at * 1e-9 for at in range(10_000)]
    machine = Machine(costs)
    timing = measure(machine.stopwatch, Effort(value=1e-3, least=20, most=20, singles=4))
    assert (len(timing.values), len(timing.singles)) == (20, 80)
    refill = (machine.runs - timing.warmup) // 20 - timing.loops
    assert refill > 1
    for at, value in enumerate(timing.values):
        loop = costs[timing.warmup + at * (timing.loops + refill) + refill :][: timing.loops]
        assert value == pytest.approx(np.mean(loop), abs=1e-12), "a loop is all of its runs"
        assert timing.singles[4 * at : 4 * at + 4] == pytest.approx(loop[:4], abs=1e-12)
    assert timing.p90 == pytest.approx(np.percentile(timing.singles, 90))


def test_the_percentile_is_that_of_runs_where_a_loop_would_hide_it() -> None:
    """One run in five is slow; every loop has two of them, so that all loops are alike."""
    costs = [5e-4, 1e-4, 1e-4, 1e-4, 1e-4] * 10_000
    apart = measure(Machine(costs).stopwatch, Effort(value=1.8e-3, least=30, most=30, singles=10))
    together = measure(Machine(costs).stopwatch, Effort(value=1.8e-3, least=30, most=30))
    assert apart.p90 == pytest.approx(5e-4)
    assert together.p90 < 2.5e-4
    assert together.singles == ()


def test_a_subject_that_cannot_time_single_runs_gives_values_only() -> None:
    class Remote:
        def seconds(self, runs: int) -> float:
            return 2e-4 * runs

    timing = measure(Remote(), Effort(singles=8))
    assert (timing.singles, timing.p90) == ((), pytest.approx(2e-4))


@dataclass
class Neighbour:
    """Says of each look whether the machine is quiet, then that it is."""

    looks: list[bool]
    patient: bool = True
    best = 1e-3

    def quiet(self) -> bool:
        return self.looks.pop(0) if self.looks else True

    def settle(self, until: float) -> bool:
        while not (quiet := self.quiet()) and self.patient:
            pass
        return quiet

    def now(self) -> float:
        return 0.0


def test_disturbed_values_are_kept_and_count_for_nothing() -> None:
    """Before each value the machine is asked until it is quiet, and once more behind it."""
    costs = [2e-3, 2e-3, *(cost for value in (5e-3, 2e-3, 7e-3) for cost in (1e-3, 1e-3, value)), *[2e-3] * 100]
    pace = Neighbour([True, False, False, True, True, True, False])
    series = Series(Machine(costs).stopwatch, Effort(least=5, most=9))
    interleave([series], np.random.default_rng(0), pace)
    timing = series.timing()
    assert (timing.disturbed, timing.median, {0, 2} & set(timing.outliers)) == ((0, 2), pytest.approx(2e-3), set())
    assert [round(value, 9) for value in timing.values] == [5e-3, 2e-3, 7e-3, *[2e-3] * 4]
    assert (timing.steady, timing.p90) == (True, pytest.approx(2e-3))


def test_single_runs_of_disturbed_values_count_for_nothing() -> None:
    series = Series(Machine(repeat(1e-4)).stopwatch, Effort(value=1e-3, least=5, most=9, singles=4))
    interleave([series], np.random.default_rng(0), Neighbour([True, False]))
    assert (len(series.disturbed), len(series.singles)) == (1, 4 * len(series.counted))


def test_a_machine_that_is_never_quiet_is_measured_all_the_same_and_called_unsteady() -> None:
    series = Series(Machine(repeat(2e-3)).stopwatch, Effort(least=5, most=9))
    interleave([series], np.random.default_rng(0), Neighbour([False] * 1000, patient=False))
    timing = series.timing()
    assert (len(timing.values), len(timing.disturbed), timing.steady) == (9, 9, False)
    assert timing.median == pytest.approx(2e-3)
