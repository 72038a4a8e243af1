"""Which channels to keep: the quadratic problem in 0 and 1 of collaborative pruning (CCP, sections 1 and 3).

With v = kept - 1, removing channels changes the loss by u^T v + v^T S v / 2. Over {0, 1}, with a given number of
channels, the problem is NP-hard; over [0, 1] it is convex, since S is positive semidefinite, and already the quadratic
programme that one iteration of SQP solves. Its optimum is rounded to the p largest entries, ties to the lower index,
and then channels are swapped one for one while that lowers the loss.

The programme is solved by PIQP, an interior-point method. `benchmarks/quadratic.py` compares: for 16 to 512 channels it
takes 0.1 to 57 ms and 7 to 12 iterations; accelerated projected gradient 3 to 72 ms and 80 to 670 iterations; OSQP and
Clarabel 2 to 16 times as long as PIQP; DAQP is as fast up to 256 channels and half as fast at 512; SciPy's SLSQP takes
0.4 s for 128. All find the same optimum. Letters: c channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import piqp
from scipy import sparse

from latency_profiler.errors import SecateursError

Floats = npt.NDArray[np.float64]
TOLERANCE = 1e-9
"""Of the programme, scaled so that its largest coefficient is 1."""
DECIMALS = 7
"""Entries of an optimum that differ by less are ties: the solver is not more exact."""
SLACK = 1e-12
"""A swap must gain more than this share of the largest coefficient, so that rounding errors swap nothing."""


class Unsolved(SecateursError):
    """The solver found no optimum; the statistics are not those of a network that has learnt."""


@dataclass(frozen=True, slots=True)
class Quadratic:
    """Linear terms u (c,) and joint terms S (c, c), symmetric."""

    u: Floats
    s: Floats

    def change(self, kept: Floats) -> float:
        """Change of the loss where channels are kept (c,) to these shares."""
        v = kept - 1
        return float(self.u @ v + 0.5 * v @ self.s @ v)

    def gradient(self, kept: Floats) -> Floats:
        """Derivatives (c,) of the change."""
        gradient: Floats = self.u + self.s @ (kept - 1)
        return gradient

    def diagonal(self) -> "Quadratic":
        """The same without the joint effects of different channels."""
        return Quadratic(self.u, np.diag(np.diag(self.s)))

    @property
    def scale(self) -> float:
        """The largest coefficient, or 1 where all are 0."""
        return float(max(np.abs(self.u).max(), np.abs(self.s).max())) or 1.0


@dataclass(frozen=True, slots=True)
class Relaxed:
    """An optimum over [0, 1]."""

    kept: Floats
    """(c,) of all parts, one after the other."""
    iterations: int
    gap: float
    """No other point of the relaxation changes the loss by this much less: the gap of Frank and Wolfe, 0 at a KKT
    point and only there."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The channels of a slot that stay, and how they were found."""

    kept: tuple[int, ...]
    relaxed: float
    """Change of the loss at the optimum of the relaxation: no choice of so many channels is predicted to be better."""
    rounded: float
    """The same after rounding."""
    change: float
    """The same after swaps: what is predicted of `kept`."""
    swaps: int
    iterations: int
    gap: float


def choose(quadratic: Quadratic, count: int) -> Choice:
    """The `count` channels, at least one, to keep."""
    relaxed = relax([quadratic], np.ones(len(quadratic.u)), count)
    rounded = binarise(relaxed.kept, count)
    kept, swaps = swap(quadratic, rounded)
    at_optimum, when_rounded, change = map(quadratic.change, (relaxed.kept, rounded, kept))
    found = tuple(np.flatnonzero(kept).tolist())
    return Choice(found, at_optimum, when_rounded, change, swaps, relaxed.iterations, relaxed.gap)


def relax(parts: Sequence[Quadratic], costs: Floats, total: float) -> Relaxed:
    """The least change of the loss over [0, 1] where what is kept costs `total`.

    Args:
        parts: problems that interact only through the cost.
        costs: positive, of every channel of all parts.

    Raises:
        Unsolved: the solver gave up.
    """
    ones = np.ones(len(costs))
    if total >= costs.sum():
        return Relaxed(ones, 0, 0.0)
    u, scale = np.concatenate([part.u for part in parts]), max(part.scale for part in parts)
    solver, s = _solver([part.s / scale for part in parts])
    row = costs[None] / total
    solver.setup(
        s, u / scale - s @ ones, row if len(parts) == 1 else sparse.csc_matrix(row), ones[:1], x_l=0 * ones, x_u=ones
    )
    if (status := solver.solve()) != piqp.PIQP_SOLVED:
        raise Unsolved(f"the quadratic programme of {len(u)} channels was not solved: {status}")
    kept = np.clip(solver.result.x, 0.0, 1.0)
    gradient = np.concatenate([part.gradient(one) for part, one in zip(parts, split(kept, parts), strict=True)])
    return Relaxed(kept, solver.result.info.iter, frank_wolfe_gap(gradient, kept, costs, total))


def _solver(blocks: list[Floats]) -> tuple[Any, Any]:
    """A solver, and the matrix of the quadratic terms as it takes it."""
    solver = piqp.DenseSolver() if len(blocks) == 1 else piqp.SparseSolver()
    settings = solver.settings
    settings.eps_abs = settings.eps_rel = settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = TOLERANCE
    return solver, np.asfortranarray(blocks[0]) if len(blocks) == 1 else sparse.block_diag(blocks, format="csc")


def swap(quadratic: Quadratic, kept: Floats) -> tuple[Floats, int]:
    """Kept channels (c,) after the best swaps of one for another, while there are any that gain; and their number."""
    kept, gradient, halves = kept.copy(), quadratic.gradient(kept), np.diag(quadratic.s) / 2
    least = -SLACK * quadratic.scale
    for done in range(len(kept) ** 2):
        stay, gone = np.flatnonzero(kept > 0.5), np.flatnonzero(kept < 0.5)
        changes = (halves - gradient)[stay, None] + (halves + gradient)[gone] - quadratic.s[np.ix_(stay, gone)]
        if not changes.size or changes.min() >= least:
            return kept, done
        i, j = (side[0] for side in np.unravel_index([changes.argmin()], changes.shape))
        kept[stay[i]], kept[gone[j]] = 0.0, 1.0
        gradient += quadratic.s[:, gone[j]] - quadratic.s[:, stay[i]]
    return kept, len(kept) ** 2


def split(kept: Floats, parts: Sequence[Quadratic]) -> list[Floats]:
    """What belongs to each of the parts (c,) that `relax` was given."""
    return np.split(kept, np.cumsum([len(part.u) for part in parts])[:-1])


def binarise(kept: Floats, count: int) -> Floats:
    """1 for the `count` largest entries (c,), ties to the lower index, and 0 for the others."""
    rounded = np.zeros_like(kept)
    rounded[np.argsort(-np.round(kept, DECIMALS), kind="stable")[:count]] = 1.0
    return rounded


def frank_wolfe_gap(gradient: Floats, kept: Floats, costs: Floats, total: float) -> float:
    """How far the gradient (c,) falls from what is kept to the best corner, which spends `total` on the steepest."""
    order = np.argsort(gradient / costs, kind="stable")
    before = np.cumsum(costs[order]) - costs[order]
    corner = np.empty_like(kept)
    corner[order] = np.clip((total - before) / costs[order], 0.0, 1.0)
    return float(gradient @ (kept - corner))
