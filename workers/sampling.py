"""Random structures whose cost lies in a band: training samples near a budget, and the search's random candidates.

Drawing genes uniformly and rejecting what is too dear never ends for tight budgets (of 200,000 uniform MobileNetV1
genomes none is below 45 of 569 M multiply-adds). Here each draw is a random direction in the space, shifted by
bisection until its cost enters the band: costs grow with every gene, so one shift in 0..30 either side suffices.

Directions are profiles over the network's depth with noise on every gene. Good structures are wider early, in the
middle or late, and independent genes hardly ever draw that: a linear profile over half of the choices lies more than
two deviations out. Worse, what they draw instead is networks with a layer or two of almost no channels, which learn
nothing and disturb a PruningNet's training.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from latency_profiler.spaces.space import CHOICES

Genes = npt.NDArray[np.int64]
Cost = Callable[[Genes], npt.NDArray[np.float64]]
"""Encodings (n, g) → their cost (n,); anything that does not fall when a gene grows."""

MIDDLE = (CHOICES - 1) / 2
ROUNDS = 50
BISECTIONS = 12
PROFILES = (0.7, 0.4, 0.3)
"""Largest share of the choices by which a linear, a quadratic and a sine profile move a gene."""
NOISE = (0.1, 0.6)
"""The same for the noise, which has a size of its own in every draw."""


def numpy_generator(seed: int, *counters: int | str) -> np.random.Generator:
    """A generator that depends on nothing but its arguments, so that a resumed run needs only its counters."""
    words = [counter if isinstance(counter, int) else int.from_bytes(counter.encode(), "big") for counter in counters]
    return np.random.default_rng([seed, *words])


def sample(
    cost: Cost, low: float, high: float, depths: Sequence[float], count: int, rng: np.random.Generator,
    spread: float = 1.0,
) -> Genes:  # fmt: skip
    """Up to `count` encodings (n, g) with a cost in [low, high]; fewer where the band holds few.

    Args:
        depths: of every gene, from -1 to 1 (`Space.depths`).
        spread: below 1 it draws structures that are nearer to the uniform width.
    """
    found = np.empty((0, len(depths)), dtype=np.int64)
    for _ in range(ROUNDS):
        drawn = _shifted(cost, low, high, spread * _directions(depths, max(32, 2 * count), rng), rng)
        costs = cost(drawn)
        found = np.concatenate([found, drawn[(costs >= low) & (costs <= high)]])
        if len(found) >= count:
            break
    return found[:count]


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


def _directions(depths: Sequence[float], count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Random distances (count, g) of genes from the middle choice: a profile over depth, and noise."""
    at = np.asarray(depths)
    profiles = np.stack([at, 1.5 * at**2 - 0.5, np.sin(np.pi * at)])  # (3, g)
    smooth = rng.uniform(-1, 1, (count, len(profiles))) * PROFILES @ profiles
    noise = rng.uniform(*NOISE, (count, 1)) * rng.uniform(-1, 1, (count, len(at)))
    directions: npt.NDArray[np.float64] = MIDDLE * (smooth + noise)
    return directions


def _shifted(
    cost: Cost, low: float, high: float, directions: npt.NDArray[np.float64], rng: np.random.Generator
) -> Genes:
    """Each direction shifted to a cost that is uniform in the band, as near as whole genes allow."""
    target = rng.uniform(low, high, len(directions))
    under, over = np.full(len(directions), -float(CHOICES)), np.full(len(directions), float(CHOICES))
    for _ in range(BISECTIONS):
        shift = (under + over) / 2
        dear = cost(_rounded(directions + shift[:, None])) > target
        over, under = np.where(dear, shift, over), np.where(dear, under, shift)
    return _rounded(directions + under[:, None])


def _rounded(genes: npt.NDArray[np.float64]) -> Genes:
    """Choices from distances from the middle one."""
    return np.clip(np.rint(MIDDLE + genes), 0, CHOICES - 1).astype(np.int64)
