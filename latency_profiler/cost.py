"""What a structure costs in arithmetic and storage.

FLOPs are multiply-adds of convolutions and linear layers for one image: one multiply-add counts one, nothing else
counts (the convention of the published numbers; MobileNetV1 has 568,740,352). The authors of MetaPruning constrain
their searches by another count, `authors_flops`, which adds what their `cal_FLOPs.py` sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.spaces.space import Slot, Space

Ints = npt.NDArray[np.int64]


class Metric(StrEnum):
    """What a constraint bounds."""

    FLOPS = "flops"
    PARAMETERS = "parameters"
    LATENCY = "latency"


class Statistic(StrEnum):
    """Which of a network's runs a latency is about."""

    P50 = "p50"
    """The median: half of the runs take no longer."""
    P90 = "p90"
    """Nine of ten take no longer."""


def latency_name(device: str, statistic: Statistic) -> str:
    """What a latency is called beside others: `DEVICE` for the median, else `DEVICE:STATISTIC`."""
    return device if statistic is Statistic.P50 else f"{device}:{statistic}"


def split_latency(name: str) -> tuple[str, Statistic]:
    """Inverse of `latency_name`; no device has a colon in its name."""
    device, _, statistic = name.partition(":")
    return device, Statistic(statistic or Statistic.P50)


@dataclass(frozen=True, slots=True)
class Constraint:
    """Bounds on one metric: multiply-adds, parameters, or seconds on a device (of one statistic)."""

    metric: Metric
    maximum: float
    minimum: float = 0.0
    device: str | None = None
    statistic: Statistic = Statistic.P50

    @property
    def latency(self) -> str | None:
        """Name of the latency that is bounded, if one is."""
        return None if self.device is None else latency_name(self.device, self.statistic)

    def allows(self, value: float) -> bool:
        """Whether a value lies inside the bounds."""
        return self.minimum <= value <= self.maximum

    def check(self, smallest: float, largest: float) -> None:
        """See that values of this range can lie inside the bounds.

        Raises:
            InfeasibleConstraint: they cannot; latencies in milliseconds.
        """
        if max(self.minimum, smallest) <= min(self.maximum, largest):
            return
        name, unit = ("latency_ms", 1000) if self.metric is Metric.LATENCY else (self.metric.value, 1)
        asked = self.maximum if self.maximum < smallest else self.minimum
        raise InfeasibleConstraint(name, unit * asked, unit * smallest, unit * largest, self.latency)


def layer_flops(layer: Layer) -> int:
    """Multiply-adds of one layer for one image."""
    outputs = layer.c_out * layer.out_size**2
    match layer.op:
        case Op.CONV:
            return outputs * layer.c_in * layer.kernel**2
        case Op.DEPTHWISE:
            return outputs * layer.kernel**2
        case Op.LINEAR:
            return layer.c_in * layer.c_out
        case _:
            return 0


def layer_parameters(layer: Layer) -> int:
    """Trained numbers of one layer: its weights, and batch norm's scale and shift or a bias."""
    behind = (2 if layer.norm else 1) * layer.c_out
    match layer.op:
        case Op.CONV:
            return layer.c_out * layer.c_in * layer.kernel**2 + behind
        case Op.DEPTHWISE:
            return layer.c_out * layer.kernel**2 + behind
        case Op.LINEAR:
            return layer.c_out * layer.c_in + behind
        case _:
            return 0


def flops(layers: Sequence[Layer]) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    return sum(map(layer_flops, layers))


def parameters(layers: Sequence[Layer]) -> int:
    """Trained numbers of a network."""
    return sum(map(layer_parameters, layers))


def authors_flops(space: Space, channels: Sequence[int]) -> int:
    """The count that MetaPruning's own search is constrained by (`cal_FLOPs.py`).

    Multiply-adds, every element that a bias is added to or that enters a batch norm, a max or average pooling's window
    sizes, and the elements of ReLU *modules* (ReLUs called as functions, as in the MobileNets, are not seen; nor are
    adaptive poolings and additions).
    """
    total = 0
    for layer in space.layers(channels):
        elements = layer.c_out * layer.out_size**2
        total += layer_flops(layer) + (elements if layer_parameters(layer) else 0)
        total += elements if space.counts_relu and layer.activation is not Activation.NONE else 0
        if layer.op is Op.MAX_POOL or (layer.op is Op.GLOBAL_POOL and space.counts_global_pool):
            total += elements * layer.kernel**2
    return total


class CostModel:
    """FLOPs and parameters of many structures of one space at once.

    Both are `a * c_in * c_out + b * c_out` for every layer; a and b are read off `layer_flops` and
    `layer_parameters`, so there is one definition of each. Letters: n structures, s slots.
    """

    def __init__(self, space: Space) -> None:
        self._widths = np.array(space.choices)
        self._fixed = np.array([slot.base for slot in space.fixed], dtype=np.int64)
        self._slots = [(unit.source, unit.target, unit.features) for unit in space.units]
        layers = space.layers([slot.base for slot in space.slots])
        self._flops = [_coefficients(layer, layer_flops) for layer in layers]
        self._parameters = [_coefficients(layer, layer_parameters) for layer in layers]

    def channels(self, encodings: Ints) -> Ints:
        """Channels (n, s) of encodings (n, g)."""
        chosen = self._widths[np.arange(len(self._widths)), encodings]
        return np.concatenate([chosen, np.broadcast_to(self._fixed, (len(encodings), len(self._fixed)))], axis=1)

    def flops(self, channels: Ints) -> Ints:
        """Multiply-adds (n,) of channels (n, s)."""
        return self._sum(channels, self._flops)

    def parameters(self, channels: Ints) -> Ints:
        """Trained numbers (n,) of channels (n, s)."""
        return self._sum(channels, self._parameters)

    def _sum(self, channels: Ints, coefficients: list[tuple[int, int]]) -> Ints:
        total = np.zeros(len(channels), dtype=np.int64)
        for (source, target, features), (a, b) in zip(self._slots, coefficients, strict=True):
            c_out = widths(target, channels)
            total += (a * features * widths(source, channels) + b) * c_out
        return total


def widths(slot: Slot, channels: Ints) -> Ints:
    """One slot's widths (n,) in channels (n, s)."""
    if slot.index is None:
        return np.full(len(channels), slot.base, dtype=np.int64)
    return channels[:, slot.index]


def _coefficients(layer: Layer, count: Callable[[Layer], int]) -> tuple[int, int]:
    """A and b of `count` = a * c_in * c_out + b * c_out."""
    one = count(replace(layer, c_in=1, c_out=1))
    a = count(replace(layer, c_in=2, c_out=1)) - one
    return a, one - a
