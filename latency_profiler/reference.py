"""How fast a machine is just now, told by two networks that never change.

In moments when the yardstick finds nothing amiss, a machine that others share is still some percent slower for minutes,
with everything it runs: caches are shared, and so are the units that fetch instructions. Eight networks that were
measured again and again differed by 5.8 % (PyTorch) and 5.5 % (ONNX Runtime); their ratios to a ninth one, which ran
between them, by 2.2 and 1.8 %. So networks that never change are timed between all that is measured at the same time,
and what is measured counts as long as it takes while those take what they usually take. Raw values stay as they were.
What is usual outlives the process: a winner may be measured days after its table, by another process.

They are two, since what is mostly a runtime's overhead slows down less than what computes: small networks of PyTorch's
differed by 4.9 %, their ratios to the large reference by 6.4 %, to what both say at their size by 3.1 %.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from latency_profiler.durable import save
from latency_profiler.runtimes.base import Runtime
from latency_profiler.spaces.registry import get_space
from latency_profiler.timing import Clock, Effort, Series, Stopwatch, Subject, Timing

MEMORY = 600
"""Readings of which the middle one is usual: a clock that is lowered for good becomes the new normal."""
NOW = 5.0
"""Seconds whose readings tell what it takes now: of few values, one alone is off by some percent."""
SAVING_SECONDS = 10.0
"""Between two times that the readings are written down."""
log = logging.getLogger("secateurs.agent")


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a machine, as shares of its usual one (below 1 where it is slow now), by how long something usually takes."""

    seconds: tuple[float, ...]
    shares: tuple[float, ...]

    def of(self, seconds: float) -> float:
        """For what takes so long: between the references in proportion, beyond them as for the nearest one."""
        return float(np.exp(np.interp(seconds, self.seconds, np.log(self.shares))))


class Reference:
    """Networks that are timed beside all others, and the seconds that they took so far.

    Args:
        subjects: the networks, each slower than the one before.
        clock: tells which readings are of now.
        file: keeps the readings for the next process that measures here; None is nowhere.
    """

    def __init__(self, subjects: Sequence[Subject], clock: Clock = time.monotonic, file: Path | None = None) -> None:
        self._subjects, self._clock, self._file = subjects, clock, file
        before = _kept(file, len(subjects)) if file else []
        self._readings: deque[tuple[float, tuple[float, ...]]] = deque(
            ((-math.inf, one) for one in before), maxlen=MEMORY
        )
        self._saved = -math.inf

    def series(self, effort: Effort) -> list[Series]:
        """New series of them."""
        return [Series(subject, effort) for subject in self._subjects]

    def speed(self, timings: Sequence[Timing]) -> Speed:
        """The machine's, after these series."""
        at = self._clock()
        self._readings.append((at, tuple(timing.median for timing in timings)))
        self._keep(at)
        usual = _medians([seconds for _, seconds in self._readings])
        now = _medians([seconds for read, seconds in self._readings if at - read <= NOW])
        return Speed(usual, tuple(before / taken for before, taken in zip(usual, now, strict=True)))

    def _keep(self, at: float) -> None:
        if self._file is None or at - self._saved < SAVING_SECONDS:
            return
        self._saved = at
        try:
            save(self._file, json.dumps([seconds for _, seconds in self._readings]).encode())
        except OSError as error:
            log.warning("how fast this machine usually is cannot be kept for later: %s", error)


def _medians(readings: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(median, zip(*readings, strict=True)))


def _kept(file: Path, count: int) -> list[tuple[float, ...]]:
    """The readings of a former process; none where there was none, or where they cannot be read."""
    try:
        found = [tuple(map(float, one)) for one in json.loads(file.read_bytes())]
        if not all(len(one) == count and all(0 < seconds < math.inf for seconds in one) for one in found):
            raise ValueError(f"not {count} times each")
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        log.warning("how fast this machine usually is will be learned anew: %s: %s", file, error)
        return []


def reference_of(runtime: Runtime, file: Path | None = None) -> Reference | None:
    """The reference of a runtime that computes on this machine; None where it asks another one, or cannot load it.

    `file` keeps its readings, which are of this runtime, these settings and this machine alone.
    """
    if not isinstance(runtime.empty_run(), Stopwatch):
        return None
    space = get_space("mobilenet_v1", 32, 0.5, 10)
    ends = (space.smallest, space.largest)
    try:
        return Reference([runtime.load_network(space.nodes(space.channels(end))) for end in ends], file=file)
    except Exception as error:  # runtimes raise whatever they like
        log.warning("measuring without a reference, which %s cannot load: %s", runtime.name, error)
        return None
