import json
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from latency_profiler.cost import Constraint, Metric, flops
from latency_profiler.errors import NothingFeasible
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import CHOICES
from workers.budget import Budget
from workers.datasets import Data
from workers.evaluation import Scorer
from workers.evolution import (
    BARREN,
    ROUNDS,
    Encoding,
    Evolution,
    Nursery,
    Proposal,
    Score,
    Settings,
    children,
    mutants,
)
from workers.front import Front, survivors
from workers.pruning_net import PruningNet
from workers.sampling import Genes, numpy_generator, repair, sample
from workers.screening import guess
from workers.steps.searching import best_of

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
        return sample(self.tightness, self.low / self.high, 1, np.linspace(-1, 1, self.genes).tolist(), count, rng)

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


def judged(search: Any) -> Any:
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
    search = ran(0)
    chosen, changed = dict[int, set[Encoding]](), list[float]()
    born = {one.proposal.encoding: one.generation for one in search.judged}
    for one in search.judged:
        genes, parents = np.array(one.proposal.encoding), np.array(one.proposal.parents)
        assert all(born[parent] < one.generation for parent in one.proposal.parents)
        chosen.setdefault(one.generation, set()).update(one.proposal.parents)
        if one.proposal.birth == "crossover":
            assert ((genes == parents[0]) | (genes == parents[1])).all()
        if one.proposal.birth == "mutation":
            changed.append((genes != parents[0]).mean())
    assert max(map(len, chosen.values())) <= SMALL.parents
    assert np.mean(changed) < 0.25, "one in ten is asked for, and some at least"


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
    assert [one.proposal.encoding for one in search.judged] == [tuple(genes) for genes in everything.tolist()]
    assert {one.proposal.birth for one in search.judged} == {"enumeration"}
    assert search.winner().score.loss == min(fitness(genes).loss for genes in everything.tolist())


@pytest.mark.parametrize("genes", [3, GENES])
def test_nothing_feasible_is_an_error(genes: int) -> None:
    search = Evolution(SMALL, 0, Weight(250, 241, genes=genes))
    with pytest.raises(NothingFeasible, match="widen a bound"):
        search.propose()


def test_a_draw_that_finds_nothing_feasible_does_not_end_the_drawing() -> None:
    class Unlucky(Weight):
        draws = 0

        def sample(self, count: int, rng: np.random.Generator) -> Genes:
            self.draws += 1
            return super().sample(count if self.draws % 3 == 0 else 0, rng)[: 5 if self.draws % 3 == 0 else 0]

    limits = Unlucky(120)
    assert len(Evolution(SMALL, 0, limits).propose()) == SMALL.population
    assert limits.draws >= 3


@pytest.mark.parametrize(("barren", "born", "rounds"), [(BARREN, ROUNDS // BARREN, ROUNDS), (BARREN + 1, 0, BARREN)])
def test_breeding_ends_after_some_rounds_that_bear_nothing(barren: int, born: int, rounds: int) -> None:
    """Every round gives the same, but for one of so many."""
    done: list[int] = []

    def breed() -> list[Proposal]:
        done.append(len(done) + 1)
        return [Proposal((done[-1] // barren,), "random")]

    nursery = Nursery({(0,)}, lambda genes: np.full(len(genes), True))
    nursery.fill(ROUNDS, breed)
    assert (len(nursery.born), len(done)) == (born, rounds)


def test_candidates_apart_are_the_best_and_those_least_like_one_another() -> None:
    search = judged(Evolution(SMALL, 0, LIMITS))
    best = search.top(len(search.judged), lambda encoding: encoding)
    found = search.apart(4, lambda encoding: encoding, lambda encoding: [gene + 1 for gene in encoding])
    assert found[0] == best[0]
    places = [best.index(one) for one in found]
    assert places == sorted(places)
    assert places[-1] < 10 * 4

    def least(ones: list[Any]) -> float:
        logs = np.log(np.array([one.proposal.encoding for one in ones]) + 1)
        return min(float(np.square(one - other).mean()) for one, other in combinations(logs, 2))

    assert least(found) > 2 * least(best[:4])
    few = search.apart(len(best), lambda encoding: encoding, lambda encoding: encoding)
    assert few == best


def test_reopened_under_a_tighter_budget() -> None:
    search = ran(0)
    loose = search.winner()
    saved = search.to_json()
    saved["generations"] += 3
    search = Evolution.from_json(saved, Weight(90))
    kept = search.ranking()
    assert all(sum(one.proposal.encoding) <= 90 for one in kept)
    before = len(search.judged)
    while proposals := search.propose():
        assert Weight(90).feasible(np.array([one.encoding for one in proposals])).all()
        search.tell([fitness(one.encoding) for one in proposals])
    assert len(search.judged) == before + 3 * 20
    assert sum(search.winner().proposal.encoding) <= 90 < sum(loose.proposal.encoding)


SCREENED = Settings(population=20, generations=6, parents=6, repair=True, screening=4)


def test_screened_search_keeps_every_promise_and_resumes() -> None:
    search = ran(0, SCREENED)
    encodings = [one.proposal.encoding for one in search.judged]
    assert len(encodings) == len(set(encodings)) == 20 * 6
    assert LIMITS.feasible(np.array(encodings)).all()
    resumed = Evolution(SCREENED, 0, LIMITS)
    while proposals := resumed.propose():
        resumed.tell([fitness(one.encoding) for one in proposals])
        resumed = Evolution.from_json(json.loads(json.dumps(resumed.to_json())), LIMITS)
    assert resumed.judged == search.judged


def test_random_search_judges_as_many_and_breeds_none() -> None:
    search = ran(0, Settings(population=20, generations=6, strategy="random"))
    assert len({one.proposal.encoding for one in search.judged}) == 20 * 6
    assert {one.proposal.birth for one in search.judged} == {"random"}


def test_the_guess_ranks_what_was_never_judged() -> None:
    drawn = Weight(120, 90).sample(400, numpy_generator(0, "guess"))
    losses = np.array([fitness(genes).loss for genes in drawn.tolist()])
    order = np.argsort(np.argsort(losses[100:]))
    guessed = np.argsort(np.argsort(guess(drawn[:100], losses[:100], drawn[100:])))
    assert np.corrcoef(order, guessed)[0, 1] > 0.8
    assert guess(drawn[:1], losses[:1], drawn[:3]).shape == (3,)
    assert np.isfinite(guess(np.repeat(drawn[:1], 5, axis=0), np.ones(5), drawn[:3])).all()


class Landscape:
    """A rugged score over a real space and budget: smooth shares of widths, waves, narrow places, and a fixed noise."""

    def __init__(self, seed: int, budget: Budget) -> None:
        random, genes, self.seed = numpy_generator(seed, "landscape"), len(budget.space.genes), seed
        self.weights, self.powers = random.uniform(0.3, 1.5, genes), random.uniform(0.2, 0.8, genes)
        self.phases, self.pairs = random.uniform(0, 6, genes), random.uniform(0, 1, genes - 1)
        self.scale = float(self.smooth(budget.sample(500, random)).std())

    def smooth(self, encodings: Genes) -> np.ndarray:
        widths = (10 + 3 * encodings) / 100
        waves = 0.05 * np.sin(12 * widths + self.phases)
        narrow = 0.15 * self.pairs * np.abs(np.log(widths[:, 1:] / widths[:, :-1]))
        return (self.weights * widths**self.powers + waves).sum(axis=1) - narrow.sum(axis=1)

    def losses(self, encodings: Sequence[Encoding]) -> np.ndarray:
        noise = np.array([numpy_generator(self.seed, *map(int, one)).normal() for one in encodings])
        return -self.smooth(np.array(encodings)) / self.scale - 0.3 * noise


def evaluations(search: Evolution, landscape: Landscape, goal: float) -> int:
    """How many until one is as good as the goal; all if none is."""
    while proposals := search.propose():
        losses = landscape.losses([one.encoding for one in proposals])
        if losses.min() <= goal:
            return len(search.judged) + int(np.argmax(losses <= goal)) + 1
        search.tell([Score(0.5, float(loss)) for loss in losses])
    return len(search.judged)


def test_a_fifth_of_random_searchs_evaluations_suffice() -> None:
    space = get_space("mobilenet_v1", 32, 0.5, 10, free_last=True)
    full = flops(space.layers(space.channels(space.largest)))
    budget = Budget(space, [Constraint(Metric.FLOPS, full / 8)], {}, {}, least_share=0.97)
    settings = Settings(40, 15, 10, rank_by="loss", repair=True, screening=4)
    needed, random = [], numpy_generator(0, "goal")
    for seed in range(6):
        landscape = Landscape(seed, budget)
        goal = landscape.losses(list(map(tuple, budget.sample(1000, random).tolist()))).min()
        needed.append(evaluations(Evolution(settings, seed, budget), landscape, goal))
    assert np.mean(needed) < 200


def test_evolution_finds_the_true_optimum_of_a_small_pruning_net(data: Data) -> None:
    space = get_space("mobilenet_v1", 8, 0.1, 4, free_last=True)
    least = flops(space.layers(space.channels(space.smallest)))
    budget = Budget(space, [Constraint(Metric.FLOPS, 1.015 * least)], {}, {})
    scorer = Scorer(
        PruningNet(space, seed=1, normalised=True), data, recalibration_images=32, seed=0, device=torch.device("cpu")
    )
    everything = budget.everything(1000)
    assert everything is not None
    scores = {tuple(genes): scorer.score(genes) for genes in everything.tolist()}
    optimum = min(score.loss for score in scores.values())

    def winner(generations: int, exhaustive: bool | None) -> Any:
        search = Evolution(Settings(8, generations, 4, rank_by="loss", repair=True, screening=2), 0, budget)
        search.exhaustive = exhaustive
        while proposals := search.propose():
            search.tell([scores[one.encoding] for one in proposals])
        return search

    assert 20 < len(everything) < 60
    complete, evolved = winner(10, None), winner(2, False)
    assert complete.exhaustive
    assert len(complete.judged) == len(everything)
    assert complete.winner().score.loss == optimum
    assert len(evolved.judged) <= 16 < len(everything)
    better = sum(score.loss < evolved.winner().score.loss for score in scores.values())
    assert better <= 2


FRONT = Weight(200, 40)


def searched_front(seed: int = 0, settings: Settings = SCREENED, generations: int = 10) -> Front:
    search = Front(settings, seed, FRONT)
    search.generations = generations
    return judged_by_sum(search)


def judged_by_sum(search: Any) -> Any:
    """More genes are better, unevenly so, as more channels are."""
    while proposals := search.propose():
        genes = np.array([one.encoding for one in proposals])
        values = (np.sqrt(genes / 30) * np.linspace(0.2, 2, GENES)).mean(axis=1) / 1.1
        search.tell([Score(float(value), float(1 - value)) for value in values])
    return search


@pytest.mark.parametrize("settings", [SCREENED, SMALL])
def test_a_front_is_not_dominated_covers_the_range_and_beats_random(settings: Settings) -> None:
    search = searched_front(0, settings)
    front = search.front()
    points = [(sum(one.proposal.encoding), one.score.accuracy) for one in front]
    assert points == sorted(points)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points))
    for one in search.judged:
        cost, accuracy = sum(one.proposal.encoding), one.score.accuracy
        assert 40 <= cost <= 200
        assert any(c <= cost and a >= accuracy for c, a in points)
    assert points[0][0] < 60
    assert points[-1][0] > 180
    assert len(points) > 15
    random = judged_by_sum(Front(Settings(20, 10, strategy="random"), 0, FRONT))
    assert random.hypervolume() > 0
    assert settings is SMALL or search.hypervolume() > random.hypervolume()
    assert search.winner() == front[-1]


def test_members_of_a_front_are_spread_over_its_cost() -> None:
    search = searched_front()
    for count in (1, 2, 3, 5):
        costs = [sum(one.proposal.encoding) for one in search.top(count, lambda encoding: encoding)]
        assert costs == sorted(set(costs), reverse=True)
        assert len(costs) == count
        assert costs[0] == sum(search.front()[-1].proposal.encoding)
        assert count == 1 or costs[-1] == sum(search.front()[0].proposal.encoding)
        assert count < 3 or max(np.diff(costs[::-1])) < 2 * (costs[0] - costs[-1]) / (count - 1)
    assert len(search.top(1000, lambda encoding: encoding)) == len(search.front())
    assert Front(SMALL, 0, FRONT).top(3, lambda encoding: encoding) == []


def test_what_is_trained_of_a_front_is_spread_over_its_cost_and_within_the_budget() -> None:
    search = searched_front()
    dearest, *_, cheapest = reversed(search.front())
    trained = best_of(search, str, 3, [], [])
    assert trained == search.top(3, str)
    assert (trained[0], trained[-1]) == (dearest, cheapest)
    without = best_of(search, str, 3, [], [str(dearest.proposal.encoding)])
    assert dearest not in without
    assert (len(without), without[-1]) == (3, cheapest)


def test_what_has_held_the_budget_is_trained_before_what_nobody_has_measured() -> None:
    search = judged(Evolution(SMALL, 0, Weight(80)))
    first, second, third, *_ = search.top(10, str)
    tell = [str(one.proposal.encoding) for one in (first, third)]
    assert best_of(search, str, 2, [], []) == [first, second]
    assert best_of(search, str, 2, tell[1:], tell[:1]) == [third, second]


def test_a_front_resumes_as_if_never_interrupted() -> None:
    search = Front(SCREENED, 3, FRONT)
    while proposals := search.propose():
        search = Front.from_json(json.loads(json.dumps(search.to_json())), FRONT)
        assert search.propose() == proposals
        search.tell([fitness(one.encoding) for one in proposals])
    assert isinstance(search, Front)
    assert search.judged == judged(Front(SCREENED, 3, FRONT)).judged
    assert Front(SCREENED, 3, FRONT).hypervolume() == 0.0


def test_survivors_are_the_undominated_first() -> None:
    points = np.array([[1, 3], [3, 3], [2, 2], [3, 1], [2.5, 2.5]])
    best = survivors(points, 4, numpy_generator(0))
    assert set(best[:3]) == {0, 2, 3}
    assert best[3] == 4
    assert len(survivors(points, 9, numpy_generator(0))) == 5


def test_hypervolume_is_the_share_that_is_dominated() -> None:
    search = Front(Settings(2, 1), 0, FRONT)
    first, second = search.propose()
    search.tell([Score(0.9, 0.1), Score(0.4, 0.6)])
    shares = FRONT.tightness(np.array([first.encoding, second.encoding]))
    expected = 0.9 * (1 - shares[0]) + 0.4 * max(0.0, shares[0] - shares[1])
    assert search.hypervolume() == pytest.approx(expected)
