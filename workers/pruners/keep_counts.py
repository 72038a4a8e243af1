"""How many channels every slot keeps, so that the pruned network is within a budget.

Widths are any integers from the smallest choice of a slot (so that lookup tables hold every layer: nothing is ever
extrapolated) up to the trained width, or only choices, whose layers tables have measured themselves. Given
*proportions* of widths, the largest network of these proportions is found by bisection on one factor, and what whole
channels then leave of the budget goes, channel by channel, to slots that were rounded down most. Every bound is
checked by the cost model itself, so the result keeps it exactly, and at least 99 % of the tightest one is used, or no
slot can have a channel more.

Milliseconds need not grow with widths: kernels are fast with multiples of 4, 8 or 16 channels, so that a wider network
may be faster, and the smallest too slow. There many factors are tried, with widths rounded to such multiples and
without, and slots grow to multiples, too.

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
FACTORS = 64
"""How many are tried where costs do not grow with widths."""
EVEN = (4, 8, 16)
"""Of whose multiples kernels are known to be faster."""
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
        InvalidInput: even the smallest of these widths break the budget, or in milliseconds the fastest that are found.
    """

    def __init__(
        self, budget: Budget, channels: Sequence[int], slots: Sequence[int], floor: float, grid: bool
    ) -> None:  # fmt: skip
        self.budget, self.channels, self.slots = budget, np.array(channels, dtype=np.int64), tuple(slots)
        self._allowed = [
            self._of(i, width, floor, grid) if i in self.slots else np.array([width])
            for i, width in enumerate(channels)
        ]
        self._multiples = {
            multiple: [_multiples(allowed, multiple) for allowed in self._allowed]
            for multiple in ((1, *EVEN) if budget.timed else (1,))
        }
        self.smallest: Ints = np.array([allowed[0] for allowed in self._allowed])
        self._least = self._fast()
        if (share := float(budget.shares(self._least[None])[0])) > 1:
            raise InvalidInput(
                f"the {'fastest' if budget.timed else 'smallest'} network that may be pruned to uses {share:.0%} of "
                f"the budget; allow fewer channels per layer than {floor:.0%}, or more layers to be pruned"
            )

    def within(self, proportions: Floats) -> tuple[int, ...]:
        """The widest network (s,) of these proportions (s,) within the budget, as near as whole channels allow."""
        most = float((self.channels / proportions).max())
        if self._fits(self.at(most * proportions)):
            return tuple(self.at(most * proportions).tolist())
        if self.budget.timed:
            widths, factor = self._scaled(proportions, most)
        else:
            factor = self._factor(proportions, most)
            widths = self.at(factor * proportions)
        return self._filled(widths, factor * proportions)

    def at(self, targets: Floats, multiple: int = 1) -> Ints:
        """The largest allowed widths (s,) that are no larger than targets (s,), or the smallest ones.

        Args:
            multiple: of which widths are multiples, where any of a slot's are.
        """
        of = self._multiples[multiple]
        places = [
            max(0, int(np.searchsorted(allowed, target + 1e-9, side="right")) - 1)
            for allowed, target in zip(of, targets, strict=True)
        ]
        return np.array([allowed[place] for allowed, place in zip(of, places, strict=True)])

    def _factor(self, proportions: Floats, most: float) -> float:
        """The largest on proportions (s,) with which the network is within the budget."""
        low, high = 0.0, most
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._fits(self.at(middle * proportions)) else (low, middle)
        return low

    def _scaled(self, proportions: Floats, most: float) -> tuple[Ints, float]:
        """The network (s,) within the milliseconds that falls least short of proportions (s,), and its factor.

        The mean square counts, so that no slot pays for others that are rounded to more than their proportion.
        """
        tried = [(most * i / FACTORS, multiple) for i in range(FACTORS, 0, -1) for multiple in self._multiples]
        networks = np.array([self.at(factor * proportions, multiple) for factor, multiple in tried])
        short = np.square(proportions / networks).mean(1)
        short[self.budget.shares(networks) > 1] = np.inf
        at = int(short.argmin())
        return (networks[at], tried[at][0]) if np.isfinite(short[at]) else (self._least, 0.0)

    def _fast(self) -> Ints:
        """The smallest widths (s,), or where others may be faster the fastest that changing slot after slot finds."""
        begins = np.array([self.at(np.zeros(len(self.channels)), multiple) for multiple in self._multiples])
        shares = self.budget.shares(begins)
        widths: Ints = begins[shares.argmin()]
        share = float(shares.min())
        while self.budget.timed and share > 1 and len(wider := self._wider(widths)):
            shares = self.budget.shares(wider)
            if shares.min() >= share:
                break
            widths, share = wider[shares.argmin()], float(shares.min())
        return widths

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
        """A wider allowed width of the slot that is furthest behind its target, until the budget is used up."""
        for _ in range(int(self.channels.sum())):
            if self.budget.shares(widths[None])[0] >= FULL:
                break
            if len(wider := self._wider(widths)):
                wider = wider[self.budget.shares(wider) <= 1]
            if not len(wider):
                break
            behind = ((targets - widths) / np.maximum(1, wider - widths))[wider > widths]
            widths = wider[behind.argmax()]
        return tuple(widths.tolist())

    def _wider(self, widths: Ints) -> Ints:
        """Networks (n, s) with one slot wider than in (s,): at its next allowed width of each kind of multiples."""
        steps = {
            (slot, int(allowed[place])): None
            for multiples in self._multiples.values()
            for slot, (allowed, width) in enumerate(zip(multiples, widths, strict=True))
            if (place := int(np.searchsorted(allowed, width, side="right"))) < len(allowed)
        }
        slots, following = np.array(list(steps), dtype=np.int64).reshape(-1, 2).T
        wider = widths[None].repeat(len(steps), axis=0)
        wider[np.arange(len(steps)), slots] = following
        return wider


def _multiples(allowed: Ints, of: int) -> Ints:
    """Those of some widths that are multiples of a number, or all where none is."""
    found = allowed[allowed % of == 0]
    return found if len(found) else allowed


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
