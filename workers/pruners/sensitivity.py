"""Sensitivity of layers: each is pruned alone, nothing is retrained, accuracy tells (Han et al. 2015, section 5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workers.networks import PlainNetwork
from workers.pruners import masks as m


@dataclass(frozen=True, slots=True)
class Point:
    """Accuracy with one layer pruned to a density; `quality` is its threshold in deviations of its weights."""

    layer: str
    density: float
    quality: float
    accuracy: float


def measure(network: PlainNetwork, layer: str, density: float, accuracy: Callable[[PlainNetwork], float]) -> Point:
    """Prune one layer of a dense network, judge it, and put the layer back."""
    weight = m.prunable(network)[layer]
    whole, alone = weight.clone(), {layer: weight}
    everything = torch.ones_like(weight, dtype=torch.bool)
    threshold = m.at_densities(alone, {layer: everything}, {layer: density})[layer]
    deviation = m.deviations(alone)[layer]
    weight.masked_fill_(weight.abs().double() < threshold, 0.0)
    judged = accuracy(network)
    weight.copy_(whole)
    return Point(layer, density, threshold / deviation if deviation else 0.0, judged)


def choose(points: Sequence[Point], accuracy: float, most: float) -> dict[str, float]:
    """The largest quality of every layer with which at most so much accuracy is lost.

    A layer that loses more at every density gets the smallest quality that was tried. The rule is ours: the paper says
    only that the most sensitive layer gets the smallest threshold.

    Args:
        accuracy: of the dense network.
        most: the accuracy that may be lost.
    """
    tried: dict[str, list[Point]] = {}
    for point in points:
        tried.setdefault(point.layer, []).append(point)
    return {layer: _largest(row, accuracy - most) for layer, row in tried.items()}


def _largest(row: Sequence[Point], least: float) -> float:
    passed = [point.quality for point in row if point.accuracy >= least]
    return max(passed) if passed else min(point.quality for point in row)
