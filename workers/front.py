"""Search for a front: at every cost of a range the most accurate structure (NSGA-II, Deb et al. 2002, after pymoo).

A generation's population is what survives of all that was judged, by rank of domination and then by how sparse its
place on the front is; parents win binary tournaments in it. All else, and the state, is `Evolution`'s.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from workers.evolution import Encoding, Evolution, Judged, Key, Proposal, genes_of

Floats = npt.NDArray[np.float64]
PROBLEM = Problem(n_var=1, n_obj=2)


class Front(Evolution):
    """One search of badness against the one bounded cost."""

    def front(self) -> list[Judged]:
        """Candidates than which none is both cheaper and better, the cheapest first; equals by age."""
        ranked = self.ranking()
        kept: list[Judged] = []
        for i in np.lexsort((np.arange(len(ranked)), *self._points(ranked).T)):
            if not kept or self._badness(ranked[i]) < self._badness(kept[-1]):
                kept.append(ranked[i])
        return kept

    def winner(self) -> Judged | None:
        """The best, and dearest, of the front."""
        return next(reversed(self.front()), None)

    def top(self, count: int, key: Key, without: Collection[object] = ()) -> list[Judged]:
        """So many of the front, evenly spread over its cost, the dearest first."""
        left = [one for one in self.front()[::-1] if key(one.proposal.encoding) not in without]
        chosen: list[Judged] = []
        costs = self._points(left)[:, 1].tolist() or [0.0]
        for cost in np.linspace(costs[0], costs[-1], count)[: len(left)]:
            nearest = int(np.argmin(np.abs(self._points(left)[:, 1] - cost)))
            chosen.append(left.pop(nearest))
        return sorted(chosen, key=self._badness)

    def hypervolume(self) -> float:
        """Share of the rectangle of error (0 to 1) and cost (0 to its bound) that the candidates dominate."""
        ranked = self.ranking()
        if not ranked:
            return 0.0
        errors = [1 - one.score.accuracy for one in ranked]
        return float(HV(ref_point=np.ones(2))(np.column_stack([errors, self._points(ranked)[:, 1]])))

    def _parents(self) -> list[Encoding]:
        random, ranked = self._generator("parents"), self.ranking()
        if not ranked:
            return []
        population = survivors(self._points(ranked), self.settings.population, random)
        won = random.integers(0, len(population), (self.settings.population, 2)).min(axis=1)
        return [ranked[population[i]].proposal.encoding for i in won]

    def _promising(self, born: list[Proposal], count: int) -> list[Proposal]:
        costs = self.limits.tightness(genes_of([one.encoding for one in born]))
        points = np.column_stack([self._guess(born), costs])
        return [born[i] for i in survivors(points, count, self._generator("screening"))]

    def _points(self, judged: Sequence[Judged]) -> Floats:
        """Badness and share of the cost's bound (n, 2)."""
        if not judged:
            return np.empty((0, 2))
        costs = self.limits.tightness(genes_of([one.proposal.encoding for one in judged]))
        return np.column_stack([[self._badness(one) for one in judged], costs])


def survivors(points: Floats, count: int, random: np.random.Generator) -> list[int]:
    """Places of up to `count` of points (n, 2), the best first: by rank of domination, then the most secluded."""
    population = Population.new(F=points, place=np.arange(len(points)))
    kept = RankAndCrowding().do(PROBLEM, population, n_survive=min(count, len(points)), random_state=random)
    order = np.lexsort((-kept.get("crowding").astype(float), kept.get("rank").astype(int)))
    return [int(kept[i].get("place")) for i in order]
