"""Whether this machine is undisturbed, told by the time that a fixed piece of work takes.

A processor that others share has speeds, not one speed: a neighbour on the same physical core makes everything take
half as long again, for moments or for minutes, and no counter of the guest shows it. So a short piece of work that
never changes is timed before and after every value. Where it takes longer than it is known to take at best, the value
is kept and marked as disturbed, and counts for nothing. The work touches vector units and second-level cache, which
is what neighbours take away.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

TOLERANCE = 1.15
"""Times the best at which a machine is still quiet: undisturbed, the work varied by 8 %, disturbed by 25 % up."""
NUMBERS = 1 << 14
REPEATS = 20
LEARNING = 2.0
"""Seconds for which the best time is looked for before anything is measured."""
MEMORY = 600
"""Moments whose best times are kept: a clock that is lowered for good becomes the new normal."""
MOMENT = 1.0


class Yardstick:
    """A fixed piece of work on as many threads as are measured.

    Args:
        threads: that must all be undisturbed.
        work: takes a number of seconds; None is the usual piece, on every thread at once.
        clock: of this machine.
    """

    def __init__(
        self,
        threads: int = 1,
        work: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._work = work or _spread([_piece(clock) for _ in range(threads)])
        self._best: deque[tuple[float, float]] = deque(maxlen=MEMORY)
        self._learn()

    @property
    def best(self) -> float:
        """Seconds that the work takes undisturbed."""
        return min(seconds for _, seconds in self._best)

    def quiet(self) -> bool:
        """Whether the machine is undisturbed now."""
        self._work()  # fills the caches
        seconds = self._work()
        self._note(seconds)
        return seconds <= TOLERANCE * self.best

    def settle(self, until: float) -> bool:
        """Wait for a quiet moment, at most until the clock says so; whether there is one.

        Waiting is working: a processor that sleeps in between is slow for a while after each sleep.
        """
        while not self.quiet():
            if self._clock() >= until:
                return False
        return True

    def now(self) -> float:
        """What the clock says."""
        return self._clock()

    def _learn(self) -> None:
        end = self._clock() + LEARNING
        while self._clock() < end:
            self._work()
            self._note(self._work())

    def _note(self, seconds: float) -> None:
        """Keep the best of each moment."""
        now = self._clock()
        if self._best and now - self._best[-1][0] < MOMENT:
            at, best = self._best.pop()
            self._best.append((at, min(best, seconds)))
        else:
            self._best.append((now, seconds))


def _piece(clock: Callable[[], float]) -> Callable[[], float]:
    left, right, product = (np.ones(NUMBERS, dtype=np.float32) for _ in range(3))

    def work() -> float:
        start = clock()
        for _ in range(REPEATS):
            np.multiply(left, right, out=product)
        return clock() - start

    return work


def _spread(pieces: list[Callable[[], float]]) -> Callable[[], float]:
    """The slowest of pieces that are done at the same time, each on a thread of its own."""
    if len(pieces) == 1:
        return pieces[0]
    pool = ThreadPoolExecutor(len(pieces), "yardstick")
    return lambda: max(pool.map(lambda piece: piece(), pieces))
