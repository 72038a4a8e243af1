"""Analytic devices with seeded noise: for demonstrations and tests, on any machine, without a runtime.

A layer takes a fixed time, its multiply-adds at a peak rate and its bytes at a bandwidth; widths count as the next
multiple of 8, as on hardware with vector lanes. Every value of `simulated` is a function of (seed, key, position of the
value). `simulated-phone` also drifts, and slows down when it has worked for a while: there a value depends on the
seconds that were measured before it, and on the seed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, pi, sin

import numpy as np

from latency_profiler.cost import layer_flops, layer_parameters
from latency_profiler.layers import Layer, Node, Op
from latency_profiler.runtimes.base import Settings

LANES = 8
RATE = 20e9
"""Multiply-adds per second of one thread."""
BANDWIDTH = 10e9
"""Bytes per second."""
LAYER_SECONDS = 1.5e-6
EMPTY_SECONDS = 5e-6
CACHED = 0.96
"""Share of its time alone that a layer takes inside a network, where its input is in the cache."""
NOISE = 0.01
"""Mean share by which a value is too long is 0.8 of this (half a normal distribution)."""


DRIFT_PERIOD = 60.0
"""Seconds in which a device that drifts is slow and fast once."""
COOL, HOT = 20.0, 5.0
"""Seconds of work before a device that throttles is too hot, and before it is cool again."""


@dataclass
class Pace:
    """How a device's speed changes while it works; `phase` (radians) is where its drift begins."""

    drift: float = 0.0
    """Largest share by which it becomes slower and faster than its mean."""
    throttle: float = 0.0
    """Share by which everything takes longer while it is hot."""
    phase: float = 0.0
    worked: float = 0.0

    def spend(self, seconds: float) -> float:
        """Seconds that this much work takes now."""
        hot = self.throttle if self.worked % (COOL + HOT) >= COOL else 0.0
        wave = self.drift * sin(2 * pi * self.worked / DRIFT_PERIOD + self.phase)
        took = seconds * (1 + wave) * (1 + hot)
        self.worked += took
        return took


@dataclass
class SimulatedSubject:
    """Takes `mean` seconds per run or a little more, as disturbances do; nothing is waited for."""

    mean: float
    rng: np.random.Generator = field(repr=False)
    pace: Pace = field(default_factory=Pace)

    def seconds(self, runs: int) -> float:
        """Seconds that so many runs would take together."""
        return self.pace.spend(float(runs * self.mean * (1 + NOISE * abs(self.rng.standard_normal()))))

    def each(self, runs: int) -> list[float]:
        """Seconds that each of so many runs would take."""
        return [self.seconds(1) for _ in range(runs)]


class Simulated:
    """A device that exists as a formula."""

    name = "simulated"
    version = "1"
    framed = False
    dtypes = ("float32",)

    def __init__(self, settings: Settings, seed: int = 0) -> None:
        self.settings, self._seed, self._pace = settings, seed, self._begin(seed)

    def load_layer(self, layer: Layer) -> SimulatedSubject:
        """One layer, with the cost of calling the device."""
        return self._subject(layer.key, EMPTY_SECONDS + self._layer_seconds(layer))

    def load_network(self, nodes: Sequence[Node]) -> SimulatedSubject:
        """A network: one call, and its layers a little faster than alone."""
        mean = EMPTY_SECONDS + CACHED * sum(self._layer_seconds(node.layer) for node in nodes)
        return self._subject(" ".join(node.layer.key for node in nodes), mean)

    def empty_run(self) -> SimulatedSubject:
        """The cost of calling the device."""
        return self._subject("", EMPTY_SECONDS)

    def _layer_seconds(self, layer: Layer) -> float:
        batch, rate = self.settings.batch, RATE * float(self.settings.threads**0.8)
        moved = 4 * (layer_parameters(layer) + batch * _elements(layer))
        return LAYER_SECONDS + batch * layer_flops(_rounded(layer)) / rate + moved / BANDWIDTH

    def _subject(self, key: str, mean: float) -> SimulatedSubject:
        digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
        return SimulatedSubject(mean, np.random.default_rng(int.from_bytes(digest[:8])), self._pace)

    def _begin(self, seed: int) -> Pace:
        return Pace()


class SimulatedPhone(Simulated):
    """One that drifts by 3 % to both sides and takes half as long again while it is hot."""

    name = "simulated-phone"

    def _begin(self, seed: int) -> Pace:
        return Pace(drift=0.03, throttle=0.5, phase=float(np.random.default_rng(seed).uniform(0, 2 * pi)))


def _rounded(layer: Layer) -> Layer:
    """With channels as the vector unit sees them; classes and image channels are padded like all others."""
    return replace(layer, c_in=LANES * ceil(layer.c_in / LANES), c_out=LANES * ceil(layer.c_out / LANES))


def _elements(layer: Layer) -> int:
    """Numbers that are read and written for one image."""
    pixels = 1 if layer.op is Op.LINEAR else layer.size**2
    written = layer.c_out * layer.out_size**2
    return layer.c_in * pixels + written * (2 if layer.residual else 1)
