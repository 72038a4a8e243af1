"""Seconds of layers between measured ones.

Bilinear, inside the smallest measured cell of a layer's family around it; nothing is extrapolated beyond what was
measured. Kernels have steps: where widths that are multiples of some number are faster, a layer is interpolated among
those that are, or are not, multiples as it is.
"""

import heapq
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from statistics import mean

import numpy as np

Cell = tuple[int, int]
ALIGNMENTS = (1, 4, 8, 16)
"""Numbers whose multiples some kernels are made for."""
LEAST_GAIN, LEAST_ERROR = 0.15, 1e-6
"""Share by which a surface with steps must lower the error of one without, or there are none (noise gains 0.01, the
kernels that were seen to have steps 0.2 to 0.75); and the error, as a share, below which all is rounding."""
ALIKE = 1.03
"""Of alignments whose errors differ by no more than this, the smallest are taken."""
NEAREST = 128
"""Measured inputs on either side of one among which a cell is looked for, and narrowest widths of a diagonal by which
its steps are told: spaces hardly have more, and in a table with tens of thousands a layer is priced in a moment."""
TINY = 1e-12
"""Seconds that a layer counts at least where logarithms are taken."""


class Family:
    """Measured points (c_in, c_out) → seconds of layers that differ in nothing else.

    The layers of several places in a network can be one family, each with a grid of its own, so that the points form
    no common grid: cells are searched among pairs of inputs and the outputs that were measured with both.
    """

    def __init__(self) -> None:
        self.points: dict[Cell, float] = {}
        self._rows: dict[int, set[int]] = defaultdict(set)
        self._forget()

    def _forget(self) -> None:
        self._tied: int | None = None
        self._tied_widths: list[int] | None = None
        self._aligned: Cell | None = None
        self._classes: dict[tuple[bool, bool], Family] = {}
        self._pairs: dict[int, list[Cell]] = {}
        self._outputs: dict[Cell, list[int]] = {}
        self._all_outputs: list[int] | None = None
        self._errors: list[float] | None = None

    def add(self, point: Cell, seconds: float) -> None:
        """Take a measured point; a second measurement of one replaces the first."""
        self._set(point, seconds)
        self._forget()

    def _set(self, point: Cell, seconds: float) -> None:
        self.points[point] = seconds
        self._rows[point[0]].add(point[1])

    def price(self, c_in: int, c_out: int) -> float | None:
        """Seconds at a point, measured where it was; None outside of what was measured."""
        measured = self.points.get((c_in, c_out))
        return self.interpolate(c_in, c_out) if measured is None else measured

    def interpolate(self, c_in: int, c_out: int) -> float | None:
        """Seconds inside the smallest measured cell around a point; None outside of all cells.

        Its corners are widths that the kernel treats like the point's (`alignments`), where there are such. Layers
        whose input and output are one width (depthwise, poolings, the middle of a bottleneck) are measured along the
        diagonal and interpolated along it, among widths that the kernel treats alike (`_alignment`).
        """
        for family in (self._alike(c_in, c_out), self):
            if family is not None and (cell := family._cell(c_in, c_out)):
                (a, b), (c, d) = cell
                at_c = _linear(c_in, a, b, self.points[a, c], self.points[b, c])
                at_d = _linear(c_in, a, b, self.points[a, d], self.points[b, d])
                return _linear(c_out, c, d, at_c, at_d)
        return self._along(self._diagonal(), c_in, self._alignment()) if c_in == c_out else None

    @property
    def alignments(self) -> Cell:
        """Numbers whose multiples, as input and as output, have a faster kernel: (1, 1) where none are seen to."""
        if self._aligned is None:
            self._aligned = alignments_of(self.points)
        return self._aligned

    @property
    def error(self) -> float | None:
        """About the share by which interpolated points are off; None where no measured point lies between two others.

        It is the mean by which measured points are off the lines between those beside them that the kernel treats
        alike, along inputs and along outputs together: rather too much, since these lines are twice as long.
        """
        if self._errors is None:
            self._errors = [mean(off) for off in self._off_lines() if off]
        return sum(self._errors) if self._errors else None

    def _off_lines(self) -> list[list[float]]:
        """Shares by which points are off, in either direction."""
        if len(diagonal := self._diagonal()) == len(self.points):
            alignment, points = self._alignment(), [(width, self.points[width, width]) for width in diagonal]
            halves = ([one for one in points if (one[0] % alignment == 0) is aligned] for aligned in (True, False))
            return [[off for half in halves for off in _off_line(half)]]
        found: list[list[float]] = [[], []]
        for family in self._kinds().values() or [self]:
            for axis, off in enumerate(found):
                lines = defaultdict[int, list[tuple[int, float]]](list)
                for point, seconds in family.points.items():
                    lines[point[1 - axis]].append((point[axis], seconds))
                off += (share for line in lines.values() for share in _off_line(sorted(line)))
        return found

    def _alike(self, c_in: int, c_out: int) -> "Family | None":
        """The points that are, or are not, aligned as this one is; None where no widths differ in that."""
        kinds = self._kinds()
        return kinds.get(self._class(c_in, c_out)) if kinds else None

    def _kinds(self) -> "dict[tuple[bool, bool], Family]":
        """The points by whether they are aligned; nothing where no widths differ in that."""
        if self.alignments != (1, 1) and not self._classes:
            classes = defaultdict[tuple[bool, bool], Family](Family)
            for point, seconds in self.points.items():
                classes[self._class(*point)]._set(point, seconds)
            self._classes = dict(classes)
        return self._classes

    def _class(self, c_in: int, c_out: int) -> tuple[bool, bool]:
        by_input, by_output = self.alignments
        return c_in % by_input == 0, c_out % by_output == 0

    def _along(self, widths: list[int], width: int, alignment: int) -> float | None:
        """Seconds between widths of the diagonal that are, or are not, multiples as this one is.

        Where such are on one side only, in proportion to the next of them; where there are none, between any.
        """
        alike = [other for other in widths if (other % alignment == 0) == (width % alignment == 0)]
        if side := _bracket(alike, width) or (None if alike else _bracket(widths, width)):
            low, high = side
            return _linear(width, low, high, self.points[low, low], self.points[high, high])
        if alike and widths[0] <= width <= widths[-1]:
            near = min(alike, key=lambda other: abs(other - width))
            return self.points[near, near] * width / near
        return None

    def _alignment(self) -> int:
        """The number whose multiples have a faster kernel: that with which measured widths are interpolated best."""
        if self._tied is None:
            widths = self._diagonal()[:NEAREST]
            self._tied = min(ALIGNMENTS, key=lambda alignment: self._left_out(widths, alignment))
        return self._tied

    def _left_out(self, widths: list[int], alignment: int) -> float:
        """Sum of the errors, as shares, of widths that are interpolated from the others."""
        error = 0.0
        for width in widths[1:-1]:
            found = self._along([other for other in widths if other != width], width, alignment)
            error += abs((found or 0.0) / self.points[width, width] - 1)
        return error

    def _cell(self, c_in: int, c_out: int) -> tuple[Cell, Cell] | None:
        """The smallest cell around a point whose four corners were measured, as its inputs and its outputs."""
        found, least = None, math.inf
        if (any_inputs := _bracket(self._every_output(), c_out)) is None:
            return None
        narrowest = any_inputs[1] - any_inputs[0] + 1
        for a, b in self._sides(c_in):
            if (b - a + 1) * narrowest >= least:
                break
            side = _bracket(self._common(a, b), c_out)
            if side and (area := (b - a + 1) * (side[1] - side[0] + 1)) < least:
                found, least = ((a, b), side), area
        return found

    def _sides(self, c_in: int) -> list[Cell]:
        """Pairs of measured inputs around an input, the narrowest first, of the `NEAREST` on either side."""
        if c_in not in self._pairs:
            below = heapq.nlargest(NEAREST, (i for i in self._rows if i <= c_in))
            above = heapq.nsmallest(NEAREST, (i for i in self._rows if i >= c_in))
            self._pairs[c_in] = sorted(product(below, above), key=lambda pair: (pair[1] - pair[0], pair))
        return self._pairs[c_in]

    def _every_output(self) -> list[int]:
        """Outputs that were measured with any input, sorted."""
        if self._all_outputs is None:
            self._all_outputs = sorted(set().union(*self._rows.values()))
        return self._all_outputs

    def _common(self, a: int, b: int) -> list[int]:
        """Outputs that were measured with both inputs, sorted."""
        if (a, b) not in self._outputs:
            self._outputs[a, b] = sorted(self._rows[a] & self._rows[b])
        return self._outputs[a, b]

    def _diagonal(self) -> list[int]:
        if self._tied_widths is None:
            self._tied_widths = sorted(i for i, o in self.points if i == o)
        return self._tied_widths


def alignments_of(points: Mapping[Cell, float]) -> Cell:
    """The alignments of input and output with which a smooth surface with steps explains points best.

    The surface is quadratic in logarithms; (1, 1) is one without steps.
    """
    if all(c_in == c_out for c_in, c_out in points):  # a line, not a surface
        return 1, 1
    (c_in, c_out), seconds = np.array(list(points)).T, np.log(np.maximum(list(points.values()), TINY))
    x, y = np.log(c_in), np.log(c_out)
    smooth = [np.ones(len(x)), x, y, x * y, x * x, y * y]
    errors = dict[Cell, float]()
    for by_input, by_output in product(ALIGNMENTS, ALIGNMENTS):
        inputs, outputs = c_in % by_input == 0, c_out % by_output == 0
        steps = [step for step in (inputs, outputs, inputs & outputs) if 0 < step.sum() < len(step)]
        surface = np.column_stack([*smooth, *steps])
        if len(seconds) > surface.shape[1]:
            weights, *_ = np.linalg.lstsq(surface, seconds, rcond=None)
            squared = np.square(surface @ weights - seconds).sum() / (len(seconds) - surface.shape[1])
            errors[by_input, by_output] = max(float(np.sqrt(squared)), LEAST_ERROR)
    if not errors or min(errors.values()) > (1 - LEAST_GAIN) * errors[1, 1]:
        return 1, 1
    return next(one for one, error in errors.items() if error <= ALIKE * min(errors.values()))


def _bracket(values: list[int], value: int) -> Cell | None:
    """The sorted values next to a value on either side, or the value twice where it is one of them."""
    at = bisect_left(values, value)
    if at == len(values):
        return None
    if values[at] == value:
        return value, value
    return (values[at - 1], values[at]) if at else None


def _off_line(line: list[tuple[int, float]]) -> list[float]:
    """Shares by which sorted points (width, seconds) are off the lines between their neighbours."""
    return [
        abs(_linear(width, low, high, at_low, at_high) / seconds - 1)
        for (low, at_low), (width, seconds), (high, at_high) in zip(line, line[1:], line[2:], strict=False)
    ]


def _linear(x: int, low: int, high: int, at_low: float, at_high: float) -> float:
    if low == high:
        return at_low
    share = (x - low) / (high - low)
    return (1 - share) * at_low + share * at_high
