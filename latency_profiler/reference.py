"""How fast a machine is just now, told by a network that never changes.

In moments when the yardstick finds nothing amiss, a machine that others share is still some percent slower for minutes,
with everything it runs: caches are shared, and so are the units that fetch instructions. Eight networks that were
measured again and again differed by 5.8 % (PyTorch) and 5.5 % (ONNX Runtime); their ratios to a ninth one, which ran
between them, by 2.2 and 1.8 %. So one network is timed between all that is measured at the same time, and what is
measured counts as long as it takes while that network takes what it usually takes. Raw values stay as they were.
What is usual outlives the process: a winner may be measured days after its table, by another process.
"""

import json
import logging
import math
import time
from collections import deque
from pathlib import Path
from statistics import median

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


class Reference:
    """A network that is timed beside all others, and the seconds that it took so far.

    Args:
        subject: the network.
        clock: tells which readings are of now.
        file: keeps the readings for the next process that measures here; None is nowhere.
    """

    def __init__(self, subject: Subject, clock: Clock = time.monotonic, file: Path | None = None) -> None:
        self._subject, self._clock, self._file = subject, clock, file
        before = _kept(file) if file else []
        self._readings: deque[tuple[float, float]] = deque(((-math.inf, one) for one in before), maxlen=MEMORY)
        self._saved = -math.inf

    def series(self, effort: Effort) -> Series:
        """A new series of it."""
        return Series(self._subject, effort)

    def speed(self, timing: Timing) -> float:
        """The machine's, as a share of its usual one: below 1 where it is slow now."""
        at = self._clock()
        self._readings.append((at, timing.median))
        self._keep(at)
        now = median(seconds for read, seconds in self._readings if at - read <= NOW)
        return median(seconds for _, seconds in self._readings) / now

    def _keep(self, at: float) -> None:
        if self._file is None or at - self._saved < SAVING_SECONDS:
            return
        self._saved = at
        try:
            save(self._file, json.dumps([seconds for _, seconds in self._readings]).encode())
        except OSError as error:
            log.warning("how fast this machine usually is cannot be kept for later: %s", error)


def _kept(file: Path) -> list[float]:
    """The readings of a former process; none where there was none, or where they cannot be read."""
    try:
        found = json.loads(file.read_bytes())
        return [seconds for seconds in map(float, found) if 0 < seconds < math.inf]
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
    try:
        return Reference(runtime.load_network(space.nodes(space.channels(space.largest))), file=file)
    except Exception as error:  # runtimes raise whatever they like
        log.warning("measuring without a reference, which %s cannot load: %s", runtime.name, error)
        return None
