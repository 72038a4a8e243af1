"""How many channels every slot keeps, so that the pruned network is within a budget.

Widths are any integers from the smallest choice of a slot (so that lookup tables hold every layer: nothing is ever
extrapolated) up to the trained width, or only choices, whose layers tables have measured themselves. Given
*proportions* of widths, the largest network of these proportions is found by bisection on one factor, and what whole
channels then leave of the budget goes, channel by channel, to slots that were rounded down most. Every bound is
checked by the cost model itself, so the result keeps it exactly, and at least 99 % of the tightest one is used, or no
slot can have a channel more.

Proportions are those of the trained network, given ratios, or come from one problem over all slots (`spread`). There
the budget is a knapsack, but FLOPs are bilinear in widths and latencies are tables. So the cost is linearised at the
present widths, by the slope between a slot's neighbouring widths, which is exact for FLOPs in one slot; the quadratic
programme under that line is solved; and so on from the widths that it gives: sequential quadratic programming, of
which every iteration but the first few changes less than a channel. Letters: s slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latency_profiler.cost import Ints
from latency_profiler.errors import InvalidInput
from workers.budget import Budget
from workers.pruners.quadratic import Floats, Quadratic, relax, split

BISECTIONS = 50
FULL = 0.99
"""A budget of which this share is used is used up: filling it to the brim would only make cheap layers wide."""
ROUNDS = 20
"""Linearisations after which the widths are taken as they are."""
SETTLED = 0.5
"""Channels by which no width may change in the last round."""
SLOPE_SPAN = 0.06
"""Share of a width over which its slope is taken, so that a table's steps at multiples of 4 or 8 do not decide it."""
LEAST_SLOPE = 1e-3
"""Of the mean slope: no channel is free of charge, even where a table says that a wider layer is faster."""


class Widths:
    """The widths that a network may be pruned to.

    Args:
        channels: of the trained network.
        slots: indices of those that may be pruned.
        floor: share of its channels that every slot keeps at least.
        grid: whether only the space's choices are allowed.

    Raises:
        InvalidInput: even the smallest of these widths break the budget.
    """

    def __init__(
        self, budget: Budget, channels: Sequence[int], slots: Sequence[int], floor: float, grid: bool
    ) -> None:  # fmt: skip
        self.budget, self.channels, self.slots = budget, np.array(channels, dtype=np.int64), tuple(slots)
        self._allowed = [
            self._of(i, width, floor, grid) if i in self.slots else np.array([width])
            for i, width in enumerate(channels)
        ]
        self.smallest: Ints = np.array([allowed[0] for allowed in self._allowed])
        if (share := float(budget.shares(self.smallest[None])[0])) > 1:
            raise InvalidInput(
                f"the smallest network that may be pruned to uses {share:.0%} of the budget; "
                f"allow fewer channels per layer than {floor:.0%}, or more layers to be pruned"
            )

    def within(self, proportions: Floats) -> tuple[int, ...]:
        """The widest network (s,) of these proportions (s,) within the budget, as near as whole channels allow."""
        low, high = 0.0, float((self.channels / proportions).max())
        if self._fits(self.at(high * proportions)):
            return tuple(self.at(high * proportions).tolist())
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._fits(self.at(middle * proportions)) else (low, middle)
        return self._filled(self.at(low * proportions), low * proportions)

    def at(self, targets: Floats) -> Ints:
        """The largest allowed widths (s,) that are no larger than targets (s,), or the smallest ones."""
        places = [
            max(0, int(np.searchsorted(allowed, target + 1e-9, side="right")) - 1)
            for allowed, target in zip(self._allowed, targets, strict=True)
        ]
        return np.array([allowed[place] for allowed, place in zip(self._allowed, places, strict=True)])

    def slopes(self, widths: Ints) -> Floats:
        """Share of the budget (s,) that a channel more of each slot costs at these widths; 0 where none can be pruned.

        Slots are looked at one by one, each between neighbouring widths on both sides.
        """
        span = np.maximum(1, np.rint(SLOPE_SPAN * self.channels / 2)).astype(np.int64)
        high = np.where(self.smallest < self.channels, np.minimum(widths + span, self.channels), widths)
        low = np.where(self.smallest < self.channels, np.maximum(widths - span, self.smallest), widths)
        above, below = (
            self.budget.shares(np.where(np.eye(len(widths), dtype=bool), end, widths)) for end in (high, low)
        )
        slopes: Floats = (above - below) / np.maximum(1, high - low)
        return np.where(high > low, np.maximum(slopes, LEAST_SLOPE * slopes[high > low].mean()), 0.0)

    def _of(self, slot: int, width: int, floor: float, grid: bool) -> Ints:
        space = self.budget.space
        choices = space.choices[slot]
        least = min(width, max(choices[0], int(np.ceil(floor * width - 1e-9))))
        every = {*choices, width} if grid else set(range(least, width + 1))
        return np.array(sorted(one for one in every if least <= one <= width))

    def _fits(self, widths: Ints) -> bool:
        return bool(self.budget.shares(widths[None])[0] <= 1)

    def _filled(self, widths: Ints, targets: Floats) -> tuple[int, ...]:
        """One allowed width more of the slot that is furthest behind its target, until the budget is used up."""
        for _ in range(int(self.channels.sum())):
            if self.budget.shares(widths[None])[0] >= FULL:
                break
            following = self._next(widths)
            steps = np.where(np.eye(len(widths), dtype=bool), following, widths)
            fits = (following > widths) & (self.budget.shares(steps) <= 1)
            if not fits.any():
                break
            behind = np.where(fits, (targets - widths) / np.maximum(1, following - widths), -np.inf)
            widths = steps[behind.argmax()]
        return tuple(widths.tolist())

    def _next(self, widths: Ints) -> Ints:
        """The next allowed widths (s,), or the same where there is none."""
        places = [
            int(np.searchsorted(allowed, width, side="right"))
            for allowed, width in zip(self._allowed, widths, strict=True)
        ]
        return np.array([allowed[min(i, len(allowed) - 1)] for allowed, i in zip(self._allowed, places, strict=True)])


@dataclass(frozen=True, slots=True)
class Spread:
    """Widths (s,) of the global problem, before they are rounded, and after how many linearisations."""

    widths: Floats
    rounds: int


def spread(quadratics: Mapping[int, Quadratic], widths: Widths) -> Spread:
    """Widths that cost the budget and are predicted to raise the loss least, of all slots together.

    A slot whose widths fall below the smallest one stays at it, and the others share what is left.
    """
    at = np.array(widths.within(widths.channels.astype(np.float64)), dtype=np.float64)
    free = [i for i in quadratics if widths.smallest[i] < widths.channels[i]]
    for done in range(ROUNDS):
        if not free:
            return Spread(at, done)
        whole = np.rint(at).astype(np.int64)
        slopes = widths.slopes(whole)
        left = 1.0 - float(widths.budget.shares(whole[None])[0]) + sum(slopes[i] * whole[i] for i in free)
        following = at.copy()
        costs = np.concatenate([np.full(len(quadratics[i].u), slopes[i]) for i in free])
        least = sum(slopes[i] * widths.smallest[i] for i in free)
        parts = [quadratics[i] for i in free]
        for i, kept in zip(free, split(relax(parts, costs, max(left, least)).kept, parts), strict=True):
            following[i] = max(kept.sum(), widths.smallest[i])
        free = [i for i in free if following[i] > widths.smallest[i]]
        moved = np.abs(following - at).max()
        at = following
        if moved < SETTLED:
            return Spread(at, done + 1)
    return Spread(at, ROUNDS)
