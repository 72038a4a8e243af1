"""Evolutionary search over encodings (MetaPruning, Algorithm 1; the authors' `search.py`).

A generation is proposed, scored by the caller, and told back. Everything random comes from (seed, generation, phase),
so the JSON state holds no generator, and a search that is resumed proposes what it would have proposed.

Unlike the authors' script the last generation is scored too, no encoding is scored twice in a run, and proposals are
bounded in number: where a budget leaves fewer structures than asked for, a generation is smaller, and the search ends
when there is none left. Where it leaves no more than the search may judge, all of them are judged, in order. Random
search is the same without parents. Letters: n encodings, g genes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from latency_profiler.errors import NothingFeasible
from latency_profiler.spaces.space import CHOICES
from workers.sampling import Genes, numpy_generator
from workers.screening import guess

Encoding = tuple[int, ...]
Key = Callable[[Encoding], object]
ROUNDS, BARREN = 100, 20
"""Litters that are bred for a part of a generation, and those in a row that may bear nothing new and feasible."""
AMONG = 10
"""Finalists are chosen among so many times their number of the best candidates."""
MOST_KNOWN = 2000
"""A guess is from so many judged structures, the last ones: it takes their number cubed."""
MOST_ENUMERATED = 50_000
"""Feasible structures beyond which a space is not judged completely, however many may be judged."""
DIVERGED = 1e9
"""Loss of a network that gives no finite one: worse than any other, and still a number in JSON."""


class Limits(Protocol):
    """What a search asks of its constraints (`Budget`); every effort is bounded."""

    def feasible(self, encodings: Genes, /) -> npt.NDArray[np.bool_]:
        """Which of encodings (n, g) satisfy every constraint."""

    def sample(self, count: int, rng: np.random.Generator, /) -> Genes:
        """Up to `count` random encodings, most of them feasible."""

    def repair(self, encodings: Genes, rng: np.random.Generator, /) -> Genes:
        """The encodings, those outside the constraints changed a little so that most of them are inside."""

    def everything(self, most: int, /) -> Genes | None:
        """All feasible structures, one encoding of each, in a fixed order; None where there are more than `most`."""

    def tightness(self, encodings: Genes, /) -> npt.NDArray[np.float64]:
        """The share (n,) of the upper bound that encodings (n, g) use."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`parents` best candidates breed; half of a generation are mutants, half children, random ones fill gaps."""

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutation_probability: float = 0.1
    rank_by: Literal["accuracy", "loss"] = "accuracy"
    strategy: Literal["evolution", "random"] = "evolution"
    """`random` is random search: the same without parents."""
    repair: bool = False
    """Whether offspring that miss the budget are moved into it; as published they are dropped."""
    screening: int = 1
    """Offspring bred for each that is judged; the most promising are chosen by `screening.guess`."""


@dataclass(frozen=True, slots=True)
class Score:
    """How good a network is on some images: share of right answers and mean cross entropy."""

    accuracy: float
    loss: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """An encoding to be scored, how it was born (`random`, `mutation`, `crossover` or `enumeration`) and of whom."""

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

    All proposals are feasible, also for a search that was read back under other constraints.
    """

    def __init__(self, settings: Settings, seed: int, limits: Limits) -> None:
        self.settings, self.seed, self.limits = settings, seed, limits
        self.generation, self.generations = 0, settings.generations
        self.judged: list[Judged] = []
        self.exhausted = False
        """Nothing is left to judge."""
        self.exhaustive: bool | None = None
        """Whether all feasible structures are judged; None until the first proposal under the limits of now."""
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

    def ranking(self) -> list[Judged]:
        """Feasible candidates, best first; ties by age."""
        if not self.judged:
            return []
        keep = self.limits.feasible(genes_of([one.proposal.encoding for one in self.judged]))
        return sorted((one for one, kept in zip(self.judged, keep, strict=True) if kept), key=self._badness)

    def winner(self) -> Judged | None:
        """The best feasible candidate."""
        return next(iter(self.ranking()), None)

    def top(self, count: int, key: Key, without: Collection[object] = ()) -> list[Judged]:
        """The best candidates that differ in `key` (encodings with equal widths are one structure), without some."""
        best: dict[object, Judged] = {}
        for one in self.ranking():
            best.setdefault(key(one.proposal.encoding), one)
        return [one for structure, one in best.items() if structure not in without][:count]

    def apart(self, count: int, key: Key, widths: Callable[[Encoding], Sequence[int]]) -> list[Judged]:
        """The best candidate, and of the best `AMONG` times `count` those that are least like one another, best first.

        The best of a search differ in little but their last bits of loss, and trained they would differ in nothing
        that a short training could tell. Distances are those of the logarithms of `widths`.
        """
        best = self.top(AMONG * count, key)
        if len(best) <= count:
            return best
        logs = np.log([widths(one.proposal.encoding) for one in best])
        chosen, distance = [0], np.full(len(best), np.inf)
        while len(chosen) < count:
            distance = np.minimum(distance, np.square(logs - logs[chosen[-1]]).mean(1))
            chosen.append(int(distance.argmax()))
        return [best[at] for at in sorted(chosen)]

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
            "generations": self.generations, "exhausted": self.exhausted, "exhaustive": self.exhaustive,
            "judged": [
                [one.generation, one.proposal.encoding, one.proposal.birth, one.proposal.parents,
                 one.score.accuracy, one.score.loss] for one in self.judged
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, state: dict[str, Any], limits: Limits) -> Self:
        """Inverse of `to_json`."""
        search = cls(Settings(**state["settings"]), state["seed"], limits)
        search.generation, search.generations = state["generation"], state["generations"]
        search.exhausted, search.exhaustive = state["exhausted"], state.get("exhaustive", False)
        for generation, encoding, birth, parents, accuracy, loss in state["judged"]:
            proposal = Proposal(tuple(encoding), birth, tuple(tuple(parent) for parent in parents))
            search.judged.append(Judged(proposal, Score(accuracy, loss), generation))
        return search

    def _badness(self, one: Judged) -> float:
        return one.score.loss if self.settings.rank_by == "loss" else -one.score.accuracy

    def _breed(self) -> list[Proposal]:
        """Mutants, then children, then random structures; all new and feasible."""
        known = {one.proposal.encoding for one in self.judged}
        if (left := self._left(known)) is not None:
            return [Proposal(encoding, "enumeration") for encoding in left[: self.settings.population]]
        nursery, half = Nursery(known, self.limits.feasible), self.settings.population // 2
        parents = self._parents() if self.settings.strategy == "evolution" else []
        bred = half * self.settings.screening
        if parents:
            mutation = self._generator("mutation")
            probability = self.settings.mutation_probability
            nursery.fill(bred, lambda: self._repaired(mutants(mutation, parents, bred, probability), mutation))
        if len(parents) > 1:
            crossover = self._generator("crossover")
            nursery.fill(
                bred + len(nursery.born), lambda: self._repaired(children(crossover, parents, bred), crossover)
            )
        if len(nursery.born) > 2 * half:
            nursery.born = self._promising(nursery.born, 2 * half)
        fresh = self._generator("random")
        nursery.fill(self.settings.population, lambda: self._strangers(fresh))
        if not nursery.born and not self.judged:
            raise NothingFeasible
        return nursery.born

    def _parents(self) -> list[Encoding]:
        """Who breeds."""
        return [one.proposal.encoding for one in self.ranking()[: self.settings.parents]]

    def _promising(self, born: list[Proposal], count: int) -> list[Proposal]:
        """Those that are expected to be best."""
        return [born[i] for i in np.argsort(self._guess(born), kind="stable")[:count]]

    def _guess(self, born: Sequence[Proposal]) -> npt.NDArray[np.float64]:
        """Expected badness."""
        known = self.judged[-MOST_KNOWN:]
        judged = genes_of([one.proposal.encoding for one in known])
        badness = np.array([self._badness(one) for one in known])
        return guess(judged, badness, genes_of([one.encoding for one in born]))

    def _left(self, known: set[Encoding]) -> list[Encoding] | None:
        """What is left to judge of all feasible structures; None where that is more than the search may judge."""
        if self.exhaustive is False or self.settings.strategy == "random":
            return None
        evaluations = (self.generations - self.generation) * self.settings.population
        everything = self.limits.everything(min(len(known) + evaluations, MOST_ENUMERATED))
        left = None if everything is None else [one for one in map(tuple, everything.tolist()) if one not in known]
        self.exhaustive = left is not None and (len(left) <= evaluations or bool(self.exhaustive))
        if not self.exhaustive:
            return None
        if not left and not self.judged:
            raise NothingFeasible
        return left

    def _generator(self, phase: str) -> np.random.Generator:
        return numpy_generator(self.seed, "evolution", self.generation, phase)

    def _strangers(self, generator: np.random.Generator) -> list[Proposal]:
        drawn = self.limits.sample(self.settings.population, generator)
        return [Proposal(tuple(genes), "random") for genes in drawn.tolist()]

    def _repaired(self, litter: list[Proposal], generator: np.random.Generator) -> list[Proposal]:
        if not self.settings.repair:
            return litter
        encodings = self.limits.repair(genes_of([one.encoding for one in litter]), generator)
        return [replace(one, encoding=tuple(genes)) for one, genes in zip(litter, encodings.tolist(), strict=True)]


class Nursery:
    """Collects proposals that are feasible and were never judged nor proposed."""

    def __init__(self, known: set[Encoding], feasible: Callable[[Genes], npt.NDArray[np.bool_]]) -> None:
        self.born: list[Proposal] = []
        self._known, self._feasible = known, feasible

    def fill(self, size: int, breed: Callable[[], list[Proposal]]) -> None:
        """Breed until `size` are born, a bounded number of rounds, of which so many bore nothing in a row."""
        barren = 0
        for _ in range(ROUNDS):
            if len(self.born) >= size or barren == BARREN:
                return
            barren += 1
            if not (litter := breed()):
                continue
            keep = self._feasible(genes_of([one.encoding for one in litter]))
            for one, kept in zip(litter, keep, strict=True):
                if kept and one.encoding not in self._known and len(self.born) < size:
                    self._known.add(one.encoding)
                    self.born.append(one)
                    barren = 0


def genes_of(encodings: Sequence[Encoding]) -> Genes:
    """Encodings as one array (n, g)."""
    return np.asarray(encodings, dtype=np.int64)


def mutants(
    generator: np.random.Generator, parents: Sequence[Encoding], count: int, probability: float
) -> list[Proposal]:
    """Each gene of a random parent changes with `probability`, to any of the 30 other choices alike."""
    genes = genes_of(parents)
    chosen = generator.integers(0, len(genes), count)
    flagged = generator.random((count, genes.shape[1])) < probability
    steps = generator.integers(1, CHOICES, flagged.shape)
    changed = np.where(flagged, (genes[chosen] + steps) % CHOICES, genes[chosen])
    return [
        Proposal(tuple(child), "mutation", (parents[i],)) for child, i in zip(changed.tolist(), chosen, strict=True)
    ]


def children(generator: np.random.Generator, parents: Sequence[Encoding], count: int) -> list[Proposal]:
    """Each gene comes from one of two different parents, with equal chance."""
    genes = genes_of(parents)
    first = generator.integers(0, len(genes), count)
    second = (first + generator.integers(1, len(genes), count)) % len(genes)
    mixed = np.where(generator.random((count, genes.shape[1])) < 0.5, genes[first], genes[second])
    return [
        Proposal(tuple(child), "crossover", (parents[i], parents[j]))
        for child, i, j in zip(mixed.tolist(), first, second, strict=True)
    ]
