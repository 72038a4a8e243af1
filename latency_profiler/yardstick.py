"""Whether this machine is undisturbed, told by the time that fixed pieces of work take.

A processor that others share has speeds, not one speed: a neighbour on the same physical core makes everything take
half as long again, for moments or for minutes, and no counter of the guest shows it. So short pieces of work that
never change are timed before and after every value. Where one takes longer than it is known to take at best, the value
is kept and marked as disturbed, and counts for nothing. One piece keeps the second-level cache busy, the other the
vector units: neighbours take away the one or the other.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], float]
Work = Callable[[], float]
"""Does a piece of work and gives the seconds it took."""
TOLERANCE = 1.1
"""Times the best at which a machine is still quiet: undisturbed, the pieces vary by 5 %, disturbed by 20 % up."""
LEARNING = 2.0
"""Seconds for which the best times are looked for before anything is measured."""
MEMORY = 600
"""Moments whose best times are kept: a clock that is lowered for good becomes the new normal."""
MOMENT = 1.0


class Yardstick:
    """Fixed pieces of work on as many threads as are measured.

    Args:
        threads: that must all be undisturbed.
        pieces: of work; None is the usual two, on every thread at once.
        clock: of this machine.
    """

    def __init__(
        self, threads: int = 1, pieces: Sequence[Work] | None = None, clock: Clock = time.perf_counter
    ) -> None:
        self._clock = clock
        self._pieces = [_Piece(work, clock) for work in pieces or _usual(threads, clock)]
        self._learn()

    @property
    def best(self) -> float:
        """Seconds that the pieces take undisturbed."""
        return sum(piece.best for piece in self._pieces)

    def quiet(self) -> bool:
        """Whether the machine is undisturbed now."""
        disturbed = [piece for piece in self._pieces if not piece.quiet()]
        return not disturbed

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
            self.quiet()


class _Piece:
    """A piece of work, and the least time that it took in each of the latest moments."""

    def __init__(self, work: Work, clock: Clock) -> None:
        self._work, self._clock = work, clock
        self._moments: deque[tuple[float, float]] = deque(maxlen=MEMORY)

    @property
    def best(self) -> float:
        return min(seconds for _, seconds in self._moments)

    def quiet(self) -> bool:
        self._work()  # fills the caches
        seconds = self._work()
        self._note(seconds)
        return seconds <= TOLERANCE * self.best

    def _note(self, seconds: float) -> None:
        now = self._clock()
        if self._moments and now - self._moments[-1][0] < MOMENT:
            at, best = self._moments.pop()
            self._moments.append((at, min(best, seconds)))
        else:
            self._moments.append((now, seconds))


def _usual(threads: int, clock: Clock) -> list[Work]:
    return [_spread([piece(clock) for _ in range(threads)]) for piece in (_multiplying, _exponentials)]


def _multiplying(clock: Clock) -> Work:
    """Products of numbers that the second-level cache holds."""
    left, right, product = (_numbers(1 << 14) for _ in range(3))

    def work() -> float:
        start = clock()
        for _ in range(20):
            np.multiply(left, right, out=product)
        return clock() - start

    return work


def _exponentials(clock: Clock) -> Work:
    """Arithmetic on numbers that the first-level cache holds."""
    given, found = (_numbers(1 << 12) for _ in range(2))

    def work() -> float:
        start = clock()
        for _ in range(20):
            np.exp(given, out=found)
        return clock() - start

    return work


def _numbers(count: int) -> NDArray[np.float32]:
    """Ones from the start of a page: astride cache lines, the same work takes up to twice as long."""
    numbers = np.frombuffer(mmap(-1, 4 * count), np.float32)
    numbers[:] = 1.0  # pages that were never written are all the same one, which is always in the first-level cache
    return numbers


def _spread(pieces: list[Work]) -> Work:
    """The slowest of pieces that are done at the same time, each on a thread of its own."""
    if len(pieces) == 1:
        return pieces[0]
    pool = ThreadPoolExecutor(len(pieces), "yardstick")
    return lambda: max(pool.map(lambda piece: piece(), pieces))
