"""How long something takes, and how sure that is.

run        one execution of a layer or network.
loop       runs that are timed together, so that one value lasts long enough (a tenth of a millisecond) for the clock.
value      seconds per run, from one loop.
single     a run of a loop that is timed by itself: percentiles are about single runs, whose differences a loop hides.
warm-up    runs that are not timed: caches fill, memory is allocated, the CPU leaves its idle state.
refill     runs before each loop that are not timed: others have used the caches since. With one run, OpenVINO's
           networks took 1.2 to 1.7 times as long beside seven others as alone, and that varied by 15 %; with sixteen
           they take as long as alone to 2 %, and vary by 2 %.
disturbed  a value before or after which the machine was slower than it can be (`yardstick`): kept, marked, not counted.
outlier    a counted value far from the others (Tukey's fences): kept and marked, since it says how a device disturbs.
steady     the median's uncertainty (half a box plot's notch: 1.57 IQR / √values; McGill, Tukey and Larsen 1978) is a
           small share of the median, and at least half of what was wanted could be counted.

Several subjects are measured interleaved: each gives one value per round, in an order that is shuffled anew, so that
a disturbance of some milliseconds costs each of them a value (which the median ignores) and not one of them all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from typing import Protocol, runtime_checkable

import numpy as np

from latency_profiler.errors import MeasurementFailed

Clock = Callable[[], float]
NOTCH = 1.57
FENCE = 1.5
"""Interquartile ranges beyond a quartile at which a value is an outlier (Tukey, Exploratory Data Analysis, 1977)."""
MOST_LOOPS = 1 << 20
REFILL = 2e-3
"""Seconds of a refill, for which `LEAST_REFILL` to `MOST_REFILL` runs are made."""
LEAST_REFILL, MOST_REFILL = 2, 16
QUIET_PATIENCE = 3.0
"""Seconds for which subjects that are measured together wait for quiet moments in all."""
DIGITS = 9
"""Single runs are kept to the nanosecond, which is what the clock tells."""


class Subject(Protocol):
    """Something that can be run again and again."""

    def seconds(self, runs: int) -> float:
        """Seconds that so many runs take together."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A subject whose runs can be timed one by one; where that is slow, as on a remote device, it need not be one."""

    def each(self, runs: int) -> list[float]:
        """Seconds of each of so many runs."""
        ...


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """A subject that is really run: `run` does one run, `clock` gives seconds."""

    run: Callable[[], object]
    clock: Clock = time.perf_counter

    def seconds(self, runs: int) -> float:
        """Seconds that so many runs take together."""
        run, times = self.run, range(runs)
        start = self.clock()
        for _ in times:
            run()
        return self.clock() - start

    def each(self, runs: int) -> list[float]:
        """Seconds of each of so many runs."""
        times = [self.clock()]
        for _ in range(runs):
            self.run()
            times.append(self.clock())
        return [after - before for before, after in pairwise(times)]


class Pace(Protocol):
    """Tells whether the machine is undisturbed."""

    @property
    def best(self) -> float:
        """Seconds that its own piece of work takes undisturbed: how fast the machine is."""
        ...

    def settle(self, until: float) -> bool:
        """Wait for a quiet moment until the clock says so; whether there is one."""
        ...

    def quiet(self) -> bool:
        """Whether it is undisturbed now."""
        ...

    def now(self) -> float:
        """What the clock says."""
        ...


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is spent on one subject.

    A value lasts about `value` seconds: long for the clock, and short beside the turns of some milliseconds that an
    operating system gives to processes, so that most values are undisturbed on a busy machine too. Values are counted
    until they are steady, but at least `least` and at most `most` of them, and none beyond `least` once `cap` seconds
    were spent; of disturbed ones, at most `most` more are taken. Of every loop, up to `singles` runs are timed by
    themselves.
    """

    value: float = 1e-4
    least: int = 7
    most: int = 11
    cap: float = 0.5
    steady_share: float = 0.02
    singles: int = 0


LAYER = Effort()
NETWORK = Effort(least=15, most=101, cap=5.0, steady_share=0.02, singles=8)
"""Eager PyTorch's runs differ by an eighth: between visits medians of 35 differed by 4.6 %, of 101 by 3.0 %."""
TAIL = replace(NETWORK, least=101, most=101, cap=10.0)
"""For a percentile that decides: of so many runs, ten at least are slower than the 90th."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured, in seconds per run; `loops` runs per value after `warmup` runs.

    `disturbed` and `outliers` (those beyond Tukey's fences) are positions of values, which are kept. Median and range
    are those of the undisturbed values, or of all where none is; `p90` is that of their single runs, or of the values
    where those are all that there is.
    """

    values: tuple[float, ...]
    singles: tuple[float, ...]
    loops: int
    warmup: int
    median: float
    iqr: float
    p90: float
    steady: bool
    outliers: tuple[int, ...]
    disturbed: tuple[int, ...] = ()

    def at(self, speed: float) -> "Timing":
        """Its figures at a machine's usual speed, where it was taken at this share of that; the values stay raw."""
        return replace(self, median=speed * self.median, iqr=speed * self.iqr, p90=speed * self.p90)


@dataclass
class Series:
    """The values of one subject as they come in."""

    subject: Subject
    effort: Effort = LAYER
    values: list[float] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)
    disturbed: list[int] = field(default_factory=list)
    loops: int = 0
    warmup: int = 0
    refill: int = MOST_REFILL
    spent: float = 0.0
    failure: Exception | None = None

    def advance(self, pace: Pace | None = None, until: float = 0.0) -> None:
        """Warm up, or take one more value, in a quiet moment if there is one; what fails is not run again."""
        try:
            if self.loops:
                self._extend(pace, until)
            else:
                self._warm_up()
        except Exception as error:  # runtimes raise whatever they like: the reason is data
            self.failure = error

    @property
    def counted(self) -> list[float]:
        """The values that were not disturbed."""
        return [value for at, value in enumerate(self.values) if at not in self.disturbed]

    @property
    def done(self) -> bool:
        """Whether nothing more is to be taken."""
        if self.failure is not None or len(self.disturbed) >= self.effort.most:
            return True
        count = len(self.values) - len(self.disturbed)
        if count < self.effort.least:
            return False
        return count >= self.effort.most or self.spent >= self.effort.cap or self._steady()

    def timing(self) -> Timing:
        """The series so far, summed up.

        Raises:
            MeasurementFailed: the subject failed, or gave no value yet.
        """
        if self.failure is not None or not self.values:
            reason = f"{type(self.failure).__name__}: {self.failure}" if self.failure else "no value was taken"
            raise MeasurementFailed(reason) from self.failure
        counted = self.counted or self.values
        low, median, high = (float(q) for q in np.percentile(counted, (25, 50, 75)))
        p90 = float(np.percentile(self.singles or counted, 90))
        fence = FENCE * (high - low)
        outliers = tuple(i for i, value in enumerate(self.values) if not low - fence <= value <= high + fence)
        return Timing(
            tuple(self.values), tuple(self.singles), self.loops, self.warmup, median, high - low, p90,
            self._steady(), tuple(at for at in outliers if at not in self.disturbed), tuple(self.disturbed),
        )  # fmt: skip

    def _warm_up(self) -> None:
        """Run once cold, then in doubling loops until one lasts as long as a value: this sets the number of loops."""
        self.spent, loops = self.subject.seconds(1), 1
        took = self.subject.seconds(loops)
        while took < self.effort.value and loops < MOST_LOOPS:
            self.spent, self.warmup, loops = self.spent + took, self.warmup + loops, loops * 2
            took = self.subject.seconds(loops)
        self.spent, self.warmup = self.spent + took, self.warmup + loops + 1
        self.loops = max(1, round(loops * min(1.0, self.effort.value / took))) if took > 0 else loops
        if took * MOST_REFILL > REFILL * loops:
            self.refill = max(LEAST_REFILL, ceil(REFILL * loops / took))

    def _extend(self, pace: Pace | None, until: float) -> None:
        quiet = pace is None or pace.settle(until)
        self.subject.seconds(self.refill)
        alone = min(self.loops, self.effort.singles)
        singles = self.subject.each(alone) if isinstance(self.subject, Divisible) else []
        rest = self.loops - len(singles)
        took = sum(singles) + (self.subject.seconds(rest) if rest else 0.0)
        self.spent += took
        if not quiet or (pace is not None and not pace.quiet()):
            self.disturbed.append(len(self.values))
        else:
            self.singles += (round(single, DIGITS) for single in singles)
        self.values.append(took / self.loops)

    def _steady(self) -> bool:
        counted = self.counted
        if 2 * len(counted) < self.effort.least:
            return False
        low, median, high = np.percentile(counted, (25, 50, 75))
        return bool(NOTCH * (high - low) / len(counted) ** 0.5 <= self.effort.steady_share * median)


def interleave(
    series: Sequence[Series],
    rng: np.random.Generator,
    pace: Pace | None = None,
    advanced: Callable[[], None] = lambda: None,
) -> None:
    """Advance several series round by round until each is done, waiting for quiet moments if `pace` tells of them.

    `advanced` is called after every value.
    """
    until = pace.now() + QUIET_PATIENCE if pace is not None else 0.0
    while waiting := [one for one in series if not one.done]:
        for i in rng.permutation(len(waiting)):
            waiting[i].advance(pace, until)
            advanced()


def measure(subject: Subject, effort: Effort = LAYER) -> Timing:
    """Time one subject alone.

    Raises:
        MeasurementFailed: it failed.
    """
    series = Series(subject, effort)
    while not series.done:
        series.advance()
    return series.timing()
