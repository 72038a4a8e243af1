"""Random structures whose cost lies in a band: training samples near a budget, and the search's random candidates.

Drawing genes uniformly and rejecting what is too dear never ends for tight budgets (of 200,000 uniform MobileNetV1
genomes none is below 45 of 569 M multiply-adds). Here each draw is a random direction in the space, shifted by
bisection until its cost enters the band: multiply-adds grow with every gene, so one shift in 0..30 either side is all.

Directions are profiles over the network's depth with noise on every gene. Good structures are wider early, in the
middle or late, and independent genes hardly ever draw that: a linear profile over half of the choices lies more than
two deviations out. Worse, what they draw instead is networks with a layer or two of almost no channels, which learn
nothing and disturb a PruningNet's training (see LEAST_WIDTH).

Milliseconds do not grow with every gene: kernels are made for multiples of 4 or 16 channels, and depthwise layers of
other widths were seen to take 10 to 27 times as long. Hardly any random structure has such widths throughout, so that
those of a budget in milliseconds are far narrower than they need be. They are widened where that costs nothing
(`fill`): a network with a layer that could be wider and no slower is never the one to look for.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from latency_profiler.spaces.space import CHOICES

Genes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Cost = Callable[[Genes], Floats]
"""Encodings (n, g) → their cost (n,); on the whole it grows with every gene."""

MIDDLE = (CHOICES - 1) / 2
ROUNDS = 50
BARREN = 5
"""Rounds after which no more are drawn where all of what was mended is outside the band: for bounds on two devices that
no structure keeps together, 64 structures were looked for for more than two minutes, and that thirty times."""
BISECTIONS = 12
EVERY = np.arange(CHOICES)
PROFILES = (0.7, 0.4, 0.3)
"""Largest share of the choices by which a linear, a quadratic and a sine profile move a gene."""
LEAST_WIDTH = 3
"""Channels that every layer of what is drawn has, or a third of its channels where those are few. A third of
MobileNetV2's structures at an eighth had a layer of one channel; of 48 structures more than a tenth gave a PruningNet
gradients that were not finite, so that the step was lost, and a quarter some of a hundred times the usual norm.
Widening such layers to three channels instead of drawing anew helped less: seed 0's search ended at a loss of
1.23 instead of 1.19."""
SCARCE = 0.05
"""Where no larger share of what is drawn has enough channels, as in the tightest bands, layers are widened to them."""
NOISE = (0.1, 0.6)
"""The same for the noise, which has a size of its own in every draw."""


def numpy_generator(seed: int, *counters: int | str) -> np.random.Generator:
    """A generator that depends on nothing but its arguments, so that a resumed run needs only its counters."""
    words = [counter if isinstance(counter, int) else int.from_bytes(counter.encode(), "big") for counter in counters]
    return np.random.default_rng([seed, *words])


def sample(
    cost: Cost, low: float, high: float, depths: Sequence[float], count: int, rng: np.random.Generator,
    spread: float = 1.0, mend: Callable[[Genes], Genes] | None = None, least: float | None = None,
    narrowest: Genes | None = None,
) -> Genes:  # fmt: skip
    """Up to `count` encodings (n, g) with a cost in [low, high]; fewer where the band holds few.

    Args:
        depths: of every gene, from -1 to 1 (`Space.depths`).
        spread: below 1 it draws structures that are nearer to the uniform width.
        mend: changes what was drawn before its cost counts.
        least: cost of what is mended, where that may be below the band.
        narrowest: the smallest choice (g,) of every gene, unless that alone costs more than `low`.
    """
    if narrowest is not None and cost(narrowest[None])[0] > low:
        narrowest = None
    found = np.empty((0, len(depths)), dtype=np.int64)
    for turn in range(ROUNDS):
        if mend and turn == BARREN and not len(found):
            break
        directions = spread * _directions(depths, max(32, 2 * count), rng)
        drawn = _shifted(cost, low, high, directions, rng)
        if narrowest is not None:
            wide = drawn[(drawn >= narrowest).all(1)]
            scarce = len(wide) <= SCARCE * len(drawn)
            drawn = _shifted(cost, low, high, directions, rng, narrowest) if scarce else wide
        drawn = mend(drawn) if mend else drawn
        costs = cost(drawn)
        found = np.concatenate([found, drawn[(costs >= (low if least is None else least)) & (costs <= high)]])
        if len(found) >= count:
            break
    return found[:count]


def least_choices(widths: Genes) -> Genes:
    """The smallest choice (g,) of widths (g, choices) that gives a layer enough channels (`LEAST_WIDTH`)."""
    least = np.minimum(LEAST_WIDTH, widths[:, -1:] // 3)
    chosen: Genes = np.argmax(widths >= least, axis=1)
    return chosen


def repair(cost: Cost, low: float, high: float, encodings: Genes, rng: np.random.Generator) -> Genes:
    """Encodings (n, g) with those whose cost is outside [low, high] moved into it, as far as whole genes allow.

    All genes of an encoding are shifted alike, but each steps to the next choice at a random point of its own, so that
    no more of them change than the cost demands.
    """
    costs = cost(encodings)
    outside = (costs < low) | (costs > high)
    repaired = encodings.copy()
    if outside.any():
        between = rng.uniform(-0.5, 0.5, (int(outside.sum()), encodings.shape[1]))
        repaired[outside] = _shifted(cost, low, high, encodings[outside] - MIDDLE + between, rng)
    return repaired


def fill(cost: Cost, low: float, high: float, encodings: Genes, rng: np.random.Generator, *, up: bool = True) -> Genes:
    """Encodings (n, g) as wide as is free, narrowed where they cost more than `high`, and with `up` filled up to it."""
    encodings = _widened(cost, cost(encodings), encodings, rng)
    targets = np.where(cost(encodings) > high, rng.uniform(low, high, len(encodings)), high)
    encodings = _narrowed(cost, targets, encodings, rng)
    if up:
        for limits in (rng.uniform(low, high, len(encodings)), np.full(len(encodings), high)):
            encodings = _widened(cost, limits, encodings, rng)
    return encodings


def _widened(cost: Cost, limits: Floats, encodings: Genes, rng: np.random.Generator) -> Genes:
    """One gene after the other at its largest choice that costs no more than a limit (n,), or than it costs already."""
    widened, costs, rows = encodings.copy(), cost(encodings), np.arange(len(encodings))
    for genes in _orders(encodings, rng):
        prices, choice = _prices(cost, widened, genes), widened[rows, genes]
        allowed = (prices <= np.maximum(costs, limits)[:, None]) & (choice[:, None] <= EVERY)
        widened[rows, genes] = np.where(allowed, EVERY, choice[:, None]).max(1)
        costs = prices[rows, widened[rows, genes]]
    return widened


def _narrowed(cost: Cost, limits: Floats, encodings: Genes, rng: np.random.Generator) -> Genes:
    """One gene after the other at its next smaller choice that costs less, again and again, to a limit (n,)."""
    narrowed, costs, rows = encodings.copy(), cost(encodings), np.arange(len(encodings))
    for _ in range(CHOICES):
        before = narrowed.copy()
        for genes in _orders(encodings, rng):
            prices, choice = _prices(cost, narrowed, genes), narrowed[rows, genes]
            allowed = (prices < costs[:, None]) & (choice[:, None] > EVERY) & (costs > limits)[:, None]
            narrowed[rows, genes] = np.where(allowed.any(1), np.where(allowed, EVERY, 0).max(1), choice)
            costs = prices[rows, narrowed[rows, genes]]
        if (narrowed == before).all():
            break
    return narrowed


def _orders(encodings: Genes, rng: np.random.Generator) -> Genes:
    """All genes (g, n) in an order of its own for each of encodings (n, g), so that these become different."""
    return rng.permuted(np.tile(np.arange(encodings.shape[1]), (len(encodings), 1)), axis=1).T


def _prices(cost: Cost, encodings: Genes, genes: Genes) -> Floats:
    """Costs (n, choices) of encodings (n, g) with every choice of one gene (n,) of each."""
    tried = encodings.repeat(CHOICES, axis=0)
    tried[np.arange(len(tried)), genes.repeat(CHOICES)] = np.tile(EVERY, len(encodings))
    return cost(tried).reshape(-1, CHOICES)


def _directions(depths: Sequence[float], count: int, rng: np.random.Generator) -> Floats:
    """Random distances (count, g) of genes from the middle choice: a profile over depth, and noise."""
    at = np.asarray(depths)
    profiles = np.stack([at, 1.5 * at**2 - 0.5, np.sin(np.pi * at)])  # (3, g)
    smooth = rng.uniform(-1, 1, (count, len(profiles))) * PROFILES @ profiles
    noise = rng.uniform(*NOISE, (count, 1)) * rng.uniform(-1, 1, (count, len(at)))
    directions: Floats = MIDDLE * (smooth + noise)
    return directions


def _shifted(
    cost: Cost, low: float, high: float, directions: Floats, rng: np.random.Generator, narrowest: Genes | int = 0
) -> Genes:
    """Each direction shifted to a cost that is uniform in the band, as near as whole genes allow."""
    target = rng.uniform(low, high, len(directions))
    under, over = np.full(len(directions), -float(CHOICES)), np.full(len(directions), float(CHOICES))
    for _ in range(BISECTIONS):
        shift = (under + over) / 2
        dear = cost(_rounded(directions + shift[:, None], narrowest)) > target
        over, under = np.where(dear, shift, over), np.where(dear, under, shift)
    return _rounded(directions + under[:, None], narrowest)


def _rounded(genes: Floats, narrowest: Genes | int) -> Genes:
    """Choices from distances from the middle one."""
    return np.clip(np.rint(MIDDLE + genes), narrowest, CHOICES - 1).astype(np.int64)
