"""Which layers of a space are measured, and in which order: where a price would be most wrong without them, first.

Before its corners are measured a layer has no price at all. Inside measured corners, halving a gap between widths
quarters the error of a smooth interpolation, and an error counts by the layer's share of a network's work. So each
layer's expected error is its multiply-adds, times its places in the network, over 4 to the power of its *level*: how
often the range of widths was halved before its width is reached. Layers of about one error are shuffled, so that a
drift of the machine is no slope over widths.

A grid has, of each part of the range, the width that most powers of two divide and one that fewest do: kernels are made
for such *even* widths, a search picks them, and prices are interpolated among widths of one kind (`interpolation`).
When a grid is measured, its points say where that fails, as where a cache is full: where a point lies far from the line
between its neighbours of its kind, the gaps on both of its sides are halved (`refinement`), again and again until lines
hold, or the difference is too small to matter.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise, product

import numpy as np

from latency_profiler.cost import layer_flops
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Floats, LatencyTable
from latency_profiler.spaces.space import CHOICES, Slot, Space, Unit

Point = tuple[int, int]
Levels = dict[int, int]
EVEN = 32
"""Channels beyond whose multiples no kernel is known to be faster."""
REFINED_ERROR = 0.05
"""Gaps are halved where a measured layer differs from the line between its neighbours by this share of its time,"""
REFINED_SHARE = 0.01
"""and, in all of its places together, by this share of a network's."""


def plan_layers(space: Space, points: int | None = None) -> list[Layer]:
    """The distinct layers to measure so that every structure of a space can be priced.

    A layer whose input and output are one width (depthwise, poolings) is always planned at every choice: these are
    few, and interpolation does them worst (runtimes have a fast depthwise kernel for multiples of 4 channels only,
    seen 10 to 27 times faster than its neighbours).

    Args:
        space: whose layers.
        points: widths per slot (`sampled`); the rest is interpolated. None plans every choice. Fixed slots are planned
            like genes, since the uniform network scales them too.
    """
    layers = dict[Layer, None]()
    for unit in space.units:
        if unit.tied:
            pairs: Iterable[Point] = ((choice, choice) for choice in range(CHOICES))
        else:
            pairs = product(sampled(unit.source, points), sampled(unit.target, points))
        layers |= {unit.at(unit.source.at(i), unit.target.at(j)): None for i, j in pairs}
    return list(layers)


def sampled(slot: Slot, points: int | None) -> list[int]:
    """At most so many choices of a slot, of 4 or more: both ends, the most and the least even one of each part between.

    None is all choices.
    """
    if points is None or points >= CHOICES:
        return list(range(CHOICES))
    evenness = np.gcd([slot.at(choice) for choice in range(CHOICES)], EVEN)
    found = {0, CHOICES - 1}
    for part in np.array_split(np.arange(CHOICES), max(1, (points - 2) // 2)):
        for wanted in (evenness[part].max(), evenness[part].min()):
            as_even = part[evenness[part] == wanted].tolist()
            if CHOICES - 1 not in as_even:  # which is there already
                found.add(as_even[len(as_even) // 2])
    return sorted(found)


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
    inputs, outputs = {features * width for width in source.widths()}, set(target.widths())
    here = [(c_in, c_out) for c_in, c_out in points if c_in in inputs and c_out in outputs]
    by_input, by_output = (_halved(sorted({point[side] for point in here})) for side in (0, 1))
    return {(c_in, c_out): max(by_input[c_in], by_output[c_out]) for c_in, c_out in here}


def _halved(widths: Sequence[int]) -> Levels:
    """0 for both ends; then the middles of what lies between widths of smaller levels."""
    levels, gaps, level = dict.fromkeys((*widths[:1], *widths[-1:]), 0), [(0, len(widths) - 1)], 1
    while gaps:
        split = [(low, (low + high) // 2, high) for low, high in gaps if high - low > 1]
        levels |= {widths[middle]: level for _, middle, _ in split}
        gaps, level = [gap for low, middle, high in split for gap in ((low, middle), (middle, high))], level + 1
    return levels


def refinement(space: Space, points: int, table: LatencyTable, most: int) -> list[Layer]:
    """What else to measure when the grid of so many points is measured, and what was refined before.

    Args:
        space: whose layers.
        points: widths per slot of the first grid.
        table: what was measured.
        most: layers; places whose prices are furthest off come first.

    Raises:
        MissingLatencies: the table does not price the space.
    """
    middle = space.layers(space.channels([CHOICES // 2] * len(space.genes)))
    matters = REFINED_SHARE * sum(table.layer(layer).seconds for layer in middle)
    places, units = Counter(unit.kind for unit in space.units), {unit.kind: unit for unit in space.units}
    found = []
    for kind, unit in units.items():
        worst, layers = _refined(unit, points, table, matters / places[kind])
        found.append((worst * places[kind], layers))
    wanted = dict[Layer, None]()
    for _, layers in sorted(found, key=lambda one: -one[0]):
        new = [layer for layer in layers if layer not in wanted]
        if len(wanted) + len(new) <= most:
            wanted |= dict.fromkeys(new)
    return list(wanted)


def _refined(unit: Unit, points: int, table: LatencyTable, matters: float) -> tuple[float, list[Layer]]:
    """The largest error of a place's lines, in seconds, and the layers that would mend it."""
    if unit.tied:
        return 0.0, []
    axes = _axes(unit, points, table)
    measured = [[table.entries.get(unit.at(*point).key) for point in row] for row in _grid(unit, axes)]
    if any(entry is None for row in measured for entry in row):  # it could not be measured
        return 0.0, []
    seconds = np.array([[entry.seconds for entry in row if entry] for row in measured])
    by_input, by_output = table.alignments(unit.at(1, 1).family)
    worst_in, inputs = _halves(unit.source, axes[0], seconds, matters, by_input // math.gcd(by_input, unit.features))
    worst_out, outputs = _halves(unit.target, axes[1], seconds.T, matters, by_output)
    finer = [sorted({*axes[0], *inputs}), sorted({*axes[1], *outputs})]
    layers = (unit.at(*point) for row in _grid(unit, finer) for point in row)
    return max(worst_in, worst_out), [layer for layer in layers if layer.key not in table.entries]


def _halves(slot: Slot, axis: Sequence[int], seconds: Floats, matters: float, alignment: int) -> tuple[float, set[int]]:
    """The largest error of lines between rows (n, m) of widths that are, or are not, multiples; and what would mend it.

    That are the choices of the same kind in the middle of gaps where lines fail.
    """
    worst, halves, known = 0.0, set[int](), {slot.at(choice) for choice in axis}
    for aligned in (True, False):
        rows = [row for row, choice in enumerate(axis) if (slot.at(choice) % alignment == 0) == aligned]
        if len(rows) < 3:
            continue
        times = seconds[rows]
        errors = _errors(np.array([slot.at(axis[row]) for row in rows]), times)
        wrong = (errors > matters) & (errors > REFINED_ERROR * (times[:-1] + times[1:]).mean(1) / 2)
        worst = max(worst, *errors[wrong], 0.0)
        for (low, high), is_wrong in zip(pairwise(axis[row] for row in rows), wrong, strict=True):
            widths = {choice: slot.at(choice) for choice in range(low + 1, high)} if is_wrong else {}
            new = [c for c, width in widths.items() if (width % alignment == 0) == aligned and width not in known]
            halves |= {min((abs(2 * choice - low - high), choice) for choice in new)[1]} if new else set()
    return worst, halves


def _axes(unit: Unit, points: int, table: LatencyTable) -> list[list[int]]:
    """Choices of both sides, one for each width: the first grid's, and others that were measured with all of these."""
    slots, axes = (unit.source, unit.target), list[list[int]]()
    first = [{slot.at(choice) for choice in sampled(slot, points)} for slot in slots]
    for side, slot in enumerate(slots):
        choices = {slot.at(choice): choice for choice in reversed(range(CHOICES))}
        across = [slots[0].at(choice) for choice in axes[0]] if side else sorted(first[1])
        axes.append(
            [
                choice
                for width, choice in sorted(choices.items())
                if width in first[side]
                or all(unit.at(*((other, width) if side else (width, other))).key in table.entries for other in across)
            ]
        )
    return axes


def _grid(unit: Unit, axes: Sequence[Sequence[int]]) -> list[list[Point]]:
    """Widths of every pair of choices, as rows of the first axis."""
    return [[(unit.source.at(i), unit.target.at(j)) for j in axes[1]] for i in axes[0]]


def _errors(widths: Floats, seconds: Floats) -> Floats:
    """Of n - 1 gaps between rows (n, m): how far their ends are off the lines between the rows beside, in seconds."""
    share = ((widths[1:-1] - widths[:-2]) / (widths[2:] - widths[:-2]))[:, None]
    off = np.abs((1 - share) * seconds[:-2] + share * seconds[2:] - seconds[1:-1]).mean(1)
    ends: Floats = np.maximum(np.append(off, 0.0), np.insert(off, 0, 0.0))
    return ends if len(widths) > 1 else off
