"""In which order the layers of a space are measured: where a price would be most wrong without them, first.

Before its corners are measured a layer has no price at all. Inside measured corners, halving a gap between widths
quarters the error of a smooth interpolation, and an error counts by the layer's share of a network's work. So each
layer's expected error is its multiply-adds, times its places in the network, over 4 to the power of its *level*: how
often the range of widths was halved before its width is reached. Layers of about one error are shuffled, so that a
drift of the machine is no slope over widths.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from latency_profiler.cost import layer_flops
from latency_profiler.layers import Layer
from latency_profiler.spaces.space import CHOICES, Slot, Space, width_of

Point = tuple[int, int]
Levels = dict[int, int]


def by_expected_error(space: Space, layers: Sequence[Layer], seed: int = 0) -> list[Layer]:
    """The layers, those first whose absence costs most."""
    families = defaultdict[str, dict[Point, int]](dict)
    for at, layer in enumerate(layers):
        families[layer.family][layer.c_in, layer.c_out] = at
    level, places = [CHOICES] * len(layers), [0] * len(layers)
    for unit, largest in zip(space.units, space.layers(space.channels(space.largest)), strict=True):
        points = families.get(largest.family, {})
        for point, found in _levels(points.keys(), unit.features, unit.source, unit.target).items():
            level[points[point]] = min(level[points[point]], found)
            places[points[point]] += 1

    def rank(at: int) -> tuple[bool, int]:
        error = max(1, places[at] * layer_flops(layers[at])) / 4 ** level[at]
        return level[at] > 0, -math.floor(math.log(error, 4))

    shuffled = np.random.default_rng(seed).permutation(len(layers))
    return [layers[at] for at in sorted(shuffled.tolist(), key=rank)]


def _levels(points: AbstractSet[Point], features: int, source: Slot, target: Slot) -> dict[Point, int]:
    """Level of each planned point that one place of the network can have."""
    inputs, outputs = {features * width for width in _widths(source)}, _widths(target)
    here = [(c_in, c_out) for c_in, c_out in points if c_in in inputs and c_out in outputs]
    by_input, by_output = (_halved(sorted({point[side] for point in here})) for side in (0, 1))
    return {(c_in, c_out): max(by_input[c_in], by_output[c_out]) for c_in, c_out in here}


def _widths(slot: Slot) -> set[int]:
    return {slot.base} if slot.index is None else {width_of(slot.base, choice) for choice in range(CHOICES)}


def _halved(widths: Sequence[int]) -> Levels:
    """0 for both ends; then the middles of what lies between widths of smaller levels."""
    levels, gaps, level = dict.fromkeys((*widths[:1], *widths[-1:]), 0), [(0, len(widths) - 1)], 1
    while gaps:
        split = [(low, (low + high) // 2, high) for low, high in gaps if high - low > 1]
        levels |= {widths[middle]: level for _, middle, _ in split}
        gaps, level = [gap for low, middle, high in split for gap in ((low, middle), (middle, high))], level + 1
    return levels
