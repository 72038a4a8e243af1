import json
from collections.abc import Sequence

import numpy as np
import pytest

from latency_profiler.errors import NothingFeasible
from latency_profiler.spaces.space import CHOICES
from workers.evolution import Encoding, Evolution, Score, Settings, children, mutants
from workers.sampling import Genes, numpy_generator, repair, sample

GENES = 8
GOAL = np.array([3, 28, 10, 17, 5, 22, 14, 9])
SMALL = Settings(population=20, generations=6, parents=6, mutation_probability=0.1)


class Weight:
    """A budget: genes may sum to `low` up to `high`."""

    def __init__(self, high: float, low: float = 0, genes: int = GENES) -> None:
        self.low, self.high, self.genes = low, high, genes

    def tightness(self, encodings: Genes) -> np.ndarray:
        return encodings.sum(axis=1) / self.high

    def feasible(self, encodings: Genes) -> np.ndarray:
        total = encodings.sum(axis=1)
        return (total >= self.low) & (total <= self.high)

    def sample(self, count: int, rng: np.random.Generator) -> Genes:
        return sample(self.tightness, self.low / self.high, 1, self.genes, count, rng)

    def repair(self, encodings: Genes, rng: np.random.Generator) -> Genes:
        return repair(self.tightness, self.low / self.high, 1, encodings, rng)

    def everything(self, most: int) -> Genes | None:
        if CHOICES**self.genes > 100_000:
            return None
        grid = np.indices((CHOICES,) * self.genes).reshape(self.genes, -1).T
        kept = grid[self.feasible(grid)]
        return kept if len(kept) <= most else None


LIMITS = Weight(120)


def fitness(encoding: Sequence[int]) -> Score:
    miss = float(np.abs(np.array(encoding) - GOAL[: len(encoding)]).sum())
    return Score(1 - miss / 240, miss)


def judged(search: Evolution) -> Evolution:
    while proposals := search.propose():
        search.tell([fitness(one.encoding) for one in proposals])
    return search


def ran(seed: int, settings: Settings = SMALL) -> Evolution:
    return judged(Evolution(settings, seed, LIMITS))


def test_every_generation_is_full_feasible_new_and_scored() -> None:
    search = ran(0)
    encodings = [one.proposal.encoding for one in search.judged]
    assert len(encodings) == len(set(encodings)) == 20 * 6
    assert LIMITS.feasible(np.array(encodings)).all()
    assert [sum(one.generation == g for one in search.judged) for g in range(6)] == [20] * 6
    assert {one.proposal.birth for one in search.judged if one.generation == 0} == {"random"}
    births = [one.proposal.birth for one in search.judged if one.generation == 3]
    assert births.count("mutation") == births.count("crossover") == 10
    best = [max(one.score.accuracy for one in search.judged if one.generation <= g) for g in range(6)]
    assert best == sorted(best)
    assert 0 < search.diversity() < 1


def test_children_come_from_their_parents() -> None:
    known = {one.proposal.encoding for one in ran(0).judged}
    for one in ran(0).judged:
        genes, parents = np.array(one.proposal.encoding), np.array(one.proposal.parents)
        assert set(one.proposal.parents) <= known
        if one.proposal.birth == "crossover":
            assert ((genes == parents[0]) | (genes == parents[1])).all()


def test_operators() -> None:
    parent: Encoding = (0, 5, 30, 12)
    for probability, share in ((1.0, 1.0), (0.25, 0.25)):
        born = np.array([one.encoding for one in mutants(numpy_generator(0), [parent], 4000, probability)])
        assert (born != parent).mean() == pytest.approx(share, abs=0.02)
        assert born.min() >= 0
        assert born.max() < CHOICES
    assert len(set(born[born[:, 2] != 30][:, 2])) == 30  # any of the other choices
    assert all(one.encoding == parent for one in children(numpy_generator(0), [parent, parent], 50))
    mixed = np.array([one.encoding for one in children(numpy_generator(0), [(0,) * 4, (1,) * 4], 2000)])
    assert mixed.mean(axis=0) == pytest.approx([0.5] * 4, abs=0.05)


def test_same_seed_same_trace_and_another_seed_another() -> None:
    assert ran(1).judged == ran(1).judged
    assert ran(1).judged != ran(2).judged


def test_interrupted_after_every_call_equals_uninterrupted() -> None:
    search = Evolution(SMALL, 4, LIMITS)
    while proposals := search.propose():
        search = Evolution.from_json(json.loads(json.dumps(search.to_json())), LIMITS)
        assert search.propose() == proposals == search.propose()
        search.tell([fitness(one.encoding) for one in proposals])
        search = Evolution.from_json(json.loads(json.dumps(search.to_json())), LIMITS)
    assert search.judged == ran(4).judged


def test_beats_random_search_with_the_same_budget() -> None:
    def best_of_random(seed: int) -> float:
        return max(fitness(one).accuracy for one in LIMITS.sample(120, numpy_generator(seed, "random")))

    found = [ran(seed).winner().score.accuracy for seed in range(8)]
    random = [best_of_random(seed) for seed in range(8)]
    assert np.mean(found) > np.mean(random) + 0.03
    assert sum(f > r for f, r in zip(found, random, strict=True)) >= 7


@pytest.mark.parametrize("rank_by", ["accuracy", "loss"])
def test_ranking_breaks_ties_by_age(rank_by: str) -> None:
    search = Evolution(Settings(4, 1, 2, rank_by=rank_by), 0, LIMITS)
    proposals = search.propose()
    scores = {"accuracy": [Score(a, 1.0) for a in (0.1, 0.9, 0.9, 0.2)], "loss": [Score(0.5, b) for b in (3, 1, 1, 2)]}
    search.tell(scores[rank_by])
    assert [one.proposal for one in search.ranking()] == [proposals[i] for i in (1, 2, 3, 0)]
    assert search.winner().proposal == proposals[1]
    assert len(search.top(3, lambda encoding: 0)) == 1
    assert [one.proposal for one in search.top(2, lambda encoding: encoding)] == proposals[1:3]


def test_wrong_number_of_scores() -> None:
    search = Evolution(SMALL, 0, LIMITS)
    with pytest.raises(ValueError, match="20 proposals, got 1"):
        search.tell([Score(1, 0)])


def test_a_small_space_is_judged_completely_and_its_optimum_found() -> None:
    limits = Weight(7, 3, genes=3)
    search = judged(Evolution(SMALL, 0, limits))
    everything = limits.everything(10_000)
    assert search.exhaustive
    assert search.exhausted or search.done
    assert [one.proposal.encoding for one in search.judged] == [tuple(genes) for genes in everything.tolist()]
    assert {one.proposal.birth for one in search.judged} == {"enumeration"}
    assert search.winner().score.loss == min(fitness(genes).loss for genes in everything.tolist())


@pytest.mark.parametrize("genes", [3, GENES])
def test_nothing_feasible_is_an_error(genes: int) -> None:
    search = Evolution(SMALL, 0, Weight(250, 241, genes=genes))
    with pytest.raises(NothingFeasible, match="widen a bound"):
        search.propose()


def test_reopened_under_a_tighter_budget() -> None:
    search = ran(0)
    loose = search.winner()
    search.reopen(Weight(90), 3)
    kept = search.ranking()
    assert all(sum(one.proposal.encoding) <= 90 for one in kept)
    before = len(search.judged)
    while proposals := search.propose():
        assert Weight(90).feasible(np.array([one.encoding for one in proposals])).all()
        search.tell([fitness(one.encoding) for one in proposals])
    assert len(search.judged) == before + 3 * 20
    assert sum(search.winner().proposal.encoding) <= 90 < sum(loose.proposal.encoding)
