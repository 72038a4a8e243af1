"""Evolutionary search over encodings (MetaPruning, Algorithm 1; the authors' `search.py`).

A generation is proposed, scored by the caller, and told back. Everything random comes from (seed, generation, phase),
so the JSON state holds no generator, and a search that is resumed proposes what it would have proposed.

Unlike the authors' script the last generation is scored too, no encoding is scored twice in a run, and proposals are
bounded in number: where a budget leaves fewer structures than asked for, a generation is smaller, and the search ends
when there is none left. Letters: n encodings, g genes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from latency_profiler.errors import NothingFeasible
from latency_profiler.spaces.space import CHOICES
from workers.sampling import Genes, numpy_generator

Encoding = tuple[int, ...]
Feasible = Callable[[Genes], npt.NDArray[np.bool_]]
"""Which of encodings (n, g) satisfy every constraint."""
Draw = Callable[[int, np.random.Generator], Genes]
"""Up to so many random encodings (n, g), most of them feasible, found with bounded effort (`Budget.sample`)."""
Key = Callable[[Encoding], object]
ROUNDS = 100
DIVERGED = 1e9
"""Loss of a network that gives no finite one: worse than any other, and still a number in JSON."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`parents` best candidates breed; half of a generation are mutants, half children, random ones fill gaps."""

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutation_probability: float = 0.1
    rank_by: Literal["accuracy", "loss"] = "accuracy"


@dataclass(frozen=True, slots=True)
class Score:
    """How good a network is on some images: share of right answers and mean cross entropy."""

    accuracy: float
    loss: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """An encoding to be scored, how it was born (`random`, `mutation`, `crossover`) and of which encodings."""

    encoding: Encoding
    birth: str
    parents: tuple[Encoding, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """A proposal with its score and generation."""

    proposal: Proposal
    score: Score
    generation: int


class Evolution:
    """One search: alternate `propose` and `tell` until `done`.

    All proposals are feasible, also for a search that was reopened or read back under other constraints.
    """

    def __init__(self, settings: Settings, seed: int, draw: Draw, feasible: Feasible) -> None:
        self.settings, self.seed = settings, seed
        self.generation, self.generations = 0, settings.generations
        self.judged: list[Judged] = []
        self.exhausted = False
        self._draw, self._feasible = draw, feasible
        self._pending: list[Proposal] | None = None

    @property
    def done(self) -> bool:
        """Whether no generation is left to score."""
        return self.exhausted or self.generation >= self.generations

    def propose(self) -> list[Proposal]:
        """The next generation; the same again until it is told. Empty, with `exhausted`, when nothing is left.

        Raises:
            NothingFeasible: the first generation found no feasible structure at all.
        """
        if self.done:
            return []
        if self._pending is None:
            self._pending = self._breed()
            self.exhausted = not self._pending
        return list(self._pending)

    def tell(self, scores: Sequence[Score]) -> None:
        """Scores of the proposals, in their order; the next generation begins.

        Raises:
            ValueError: not one score for each proposal.
        """
        proposals = self.propose()
        if len(scores) != len(proposals):
            raise ValueError(f"generation {self.generation} has {len(proposals)} proposals, got {len(scores)} scores")
        pairs = zip(proposals, scores, strict=True)
        self.judged += [Judged(proposal, score, self.generation) for proposal, score in pairs]
        self.generation += 1
        self._pending = None

    def reopen(self, draw: Draw, feasible: Feasible, generations: int) -> None:
        """Search on under other constraints: judged candidates that satisfy them stay, more generations follow."""
        self._draw, self._feasible, self._pending = draw, feasible, None
        self.generations, self.exhausted = self.generation + generations, False

    def ranking(self) -> list[Judged]:
        """Feasible candidates, best first; ties by age."""
        if not self.judged:
            return []
        keep = self._feasible(np.asarray([one.proposal.encoding for one in self.judged], dtype=np.int64))
        return sorted((one for one, kept in zip(self.judged, keep, strict=True) if kept), key=self._badness)

    def winner(self) -> Judged | None:
        """The best feasible candidate."""
        return next(iter(self.ranking()), None)

    def top(self, count: int, key: Key) -> list[Judged]:
        """The best candidates that differ in `key` (encodings with equal widths are one structure)."""
        best: dict[object, Judged] = {}
        for one in self.ranking():
            best.setdefault(key(one.proposal.encoding), one)
        return list(best.values())[:count]

    def diversity(self) -> float:
        """Mean share of genes in which two candidates of the last generation differ."""
        last = [one.proposal.encoding for one in self.judged if one.generation == self.generation - 1]
        if len(last) < 2:
            return 0.0
        genes = np.asarray(last)
        differ = (genes[:, None] != genes[None]).mean(axis=2)  # (n, n), diagonal 0
        return float(differ.sum() / (len(last) * (len(last) - 1)))

    def to_json(self) -> dict[str, Any]:
        """All of the search's state."""
        return {
            "settings": asdict(self.settings), "seed": self.seed, "generation": self.generation,
            "generations": self.generations, "exhausted": self.exhausted,
            "judged": [
                [one.generation, one.proposal.encoding, one.proposal.birth, one.proposal.parents,
                 one.score.accuracy, one.score.loss] for one in self.judged
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, state: dict[str, Any], draw: Draw, feasible: Feasible) -> "Evolution":
        """Inverse of `to_json`."""
        search = cls(Settings(**state["settings"]), state["seed"], draw, feasible)
        search.generation, search.generations = state["generation"], state["generations"]
        search.exhausted = state["exhausted"]
        for generation, encoding, birth, parents, accuracy, loss in state["judged"]:
            proposal = Proposal(tuple(encoding), birth, tuple(tuple(parent) for parent in parents))
            search.judged.append(Judged(proposal, Score(accuracy, loss), generation))
        return search

    def _badness(self, one: Judged) -> float:
        return one.score.loss if self.settings.rank_by == "loss" else -one.score.accuracy

    def _breed(self) -> list[Proposal]:
        """Mutants, then children, then random structures; all new and feasible."""
        parents = [one.proposal.encoding for one in self.ranking()[: self.settings.parents]]
        nursery = Nursery({one.proposal.encoding for one in self.judged}, self._feasible)
        population, half = self.settings.population, self.settings.population // 2
        if parents:
            mutation = numpy_generator(self.seed, "evolution", self.generation, "mutation")
            nursery.fill(half, lambda: mutants(mutation, parents, half, self.settings.mutation_probability))
        if len(parents) > 1:
            crossover = numpy_generator(self.seed, "evolution", self.generation, "crossover")
            nursery.fill(half + len(nursery.born), lambda: children(crossover, parents, half))
        fresh = numpy_generator(self.seed, "evolution", self.generation, "random")
        nursery.fill(population, lambda: self._strangers(fresh, population))
        if not nursery.born and not self.judged:
            raise NothingFeasible
        return nursery.born

    def _strangers(self, generator: np.random.Generator, count: int) -> list[Proposal]:
        return [Proposal(tuple(genes), "random") for genes in self._draw(count, generator).tolist()]


class Nursery:
    """Collects proposals that are feasible and were never judged nor proposed."""

    def __init__(self, known: set[Encoding], feasible: Feasible) -> None:
        self.born: list[Proposal] = []
        self._known, self._feasible = known, feasible

    def fill(self, size: int, breed: Callable[[], list[Proposal]]) -> None:
        """Breed until `size` are born, a bounded number of rounds."""
        for _ in range(ROUNDS):
            if len(self.born) >= size:
                return
            litter = breed()
            if not litter:
                return
            keep = self._feasible(np.asarray([one.encoding for one in litter], dtype=np.int64))
            for one, kept in zip(litter, keep, strict=True):
                if kept and one.encoding not in self._known and len(self.born) < size:
                    self._known.add(one.encoding)
                    self.born.append(one)


def mutants(
    generator: np.random.Generator, parents: Sequence[Encoding], count: int, probability: float
) -> list[Proposal]:
    """Each gene of a random parent changes with `probability`, to any of the 30 other choices alike."""
    genes = np.asarray(parents, dtype=np.int64)
    chosen = generator.integers(0, len(genes), count)
    flagged = generator.random((count, genes.shape[1])) < probability
    steps = generator.integers(1, CHOICES, flagged.shape)
    changed = np.where(flagged, (genes[chosen] + steps) % CHOICES, genes[chosen])
    return [
        Proposal(tuple(child), "mutation", (parents[i],)) for child, i in zip(changed.tolist(), chosen, strict=True)
    ]


def children(generator: np.random.Generator, parents: Sequence[Encoding], count: int) -> list[Proposal]:
    """Each gene comes from one of two different parents, with equal chance."""
    genes = np.asarray(parents, dtype=np.int64)
    first = generator.integers(0, len(genes), count)
    second = (first + generator.integers(1, len(genes), count)) % len(genes)
    mixed = np.where(generator.random((count, genes.shape[1])) < 0.5, genes[first], genes[second])
    return [
        Proposal(tuple(child), "crossover", (parents[i], parents[j]))
        for child, i, j in zip(mixed.tolist(), first, second, strict=True)
    ]
