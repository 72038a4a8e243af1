"""The constraints of one job over one space: what a structure costs, and whether it is allowed.

*Tightness* is the largest share of an upper bound that a structure uses: 1 is a structure that uses a budget to the
full, above 1 it breaks one. Latencies are predictions times a correction, which grows when a measurement breaks the
prediction; tables, corrections and seconds go by the name of a latency (`latency_name`).
"""

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from latency_profiler.cost import Constraint, CostModel, Ints, Metric
from latency_profiler.lookup_table import LatencyModel, LatencyTable
from latency_profiler.spaces.space import CHOICES, Space
from workers.sampling import Genes, fill, least_choices, numpy_generator, repair, sample

Floats = npt.NDArray[np.float64]
UNIFORM, UNIFORM_ROUNDS = 4096, 16
"""Encodings of uniform genes among which feasible ones are looked for at a time, and how often; the publication does so
until it has enough, and never ends where there are none."""
PUBLISHED_CHOICES = {"resnet50": (12, 24)}
"""Where uniform genes are not from all choices: from the first up to, and without, the second (the authors' code)."""
ROUNDS, DRAWN = 30, 64
"""How often, and how many, structures are drawn until a budget counts as empty."""
CROWD = 3
"""An enumeration holds so many times the structures that it looks for before it gives up."""
TIMED_SHARES = [share / 512 for share in range(1, 513)]
"""Shares of the uniform networks among which the widest that is fast enough is looked for."""
SMALLEST_SHARE = 0.10
"""The grid begins at a tenth of the base widths, and so does the uniform network."""


@dataclass(frozen=True)
class Costs:
    """FLOPs and parameters (n,), and corrected seconds (n,) per latency."""

    flops: Ints
    parameters: Ints
    seconds: dict[str, Floats]


class Budget:
    """Constraints, and the models that price them.

    Args:
        tables: lookup tables of every latency that is constrained or shall be reported.
        corrections: latency → factor on its predictions.
        least_share: candidates must use this share of the tightest upper bound.
        fills: whether candidates with a bound in milliseconds are as wide as it allows (`sampling.fill`). Otherwise
            random candidates have genes that are drawn uniformly, as published, as far as such are feasible.

    Raises:
        InfeasibleConstraint: no structure of the space satisfies all constraints.
    """

    def __init__(
        self, space: Space, constraints: Sequence[Constraint], tables: Mapping[str, LatencyTable],
        corrections: Mapping[str, float], least_share: float = 0.0, fills: bool = True,
    ) -> None:  # fmt: skip
        self.space, self.constraints, self.tables, self.corrections = space, constraints, tables, corrections
        self.timed = any(constraint.metric is Metric.LATENCY for constraint in constraints)
        self._fills, self._uniform = fills and self.timed, not fills
        self._costs = CostModel(space)
        self._latencies = {latency: LatencyModel(table, space) for latency, table in tables.items()}
        self._narrowest = least_choices(np.array(space.choices))
        self._first = np.array([[widths.index(width) for width in widths] for widths in space.choices])
        for bound in constraints:
            if bound.minimum > bound.maximum:  # by the margin that a maximum is lowered by
                bound.check(bound.minimum, bound.minimum)
        timed = (self._latencies[c.latency] for c in constraints if c.latency in self._latencies)
        ladder = self.costs(np.array([*(model.fastest for model in timed), *space.ladder]))
        rungs = _tightest(ladder, constraints)
        smallest, largest = float(rungs.min()), float(rungs.max())
        least = least_share * min(1.0, float(rungs[-1]))
        self.least = 0.0 if self._fills else least  # what is filled is as near as its widths allow
        self._floor = max(self.least, min(1.0, smallest), *(c.minimum / c.maximum for c in constraints))
        self._band = max(least, self._floor), min(1.0, largest)
        self._check(ladder)

    def channels(self, encodings: Genes) -> Ints:
        """Channels (n, s) of encodings (n, g)."""
        return self._costs.channels(encodings)

    def costs(self, encodings: Genes) -> Costs:
        """What encodings (n, g) cost."""
        channels = self.channels(encodings)
        seconds = {
            latency: model.seconds(channels) * self.corrections.get(latency, 1.0)
            for latency, model in self._latencies.items()
        }
        return Costs(self._costs.flops(channels), self._costs.parameters(channels), seconds)

    def tightness(self, encodings: Genes, of: Sequence[Constraint] = ()) -> Floats:
        """The largest share (n,) of an upper bound that encodings (n, g) use, of all constraints or of some."""
        return _tightest(self.costs(encodings), of or self.constraints)

    def feasible(self, encodings: Genes) -> npt.NDArray[np.bool_]:
        """Which of encodings (n, g) satisfy every bound and use enough of the budget."""
        costs = self.costs(encodings)
        allowed: npt.NDArray[np.bool_] = _tightest(costs, self.constraints) >= self.least
        for constraint in self.constraints:
            values = _values(costs, constraint)
            allowed &= (values >= constraint.minimum) & (values <= constraint.maximum)
        return allowed

    def sample(self, count: int, rng: np.random.Generator) -> Genes:
        """Up to `count` random feasible encodings, bounded in effort.

        Of equal widths they are always the same encoding, unless genes are drawn uniformly: those stay as drawn, since
        a PruningNet generates other weights for another gene.
        """
        uniform = self._drawn_uniformly(count if self._uniform else 0, rng)
        if len(uniform) == count:
            return uniform
        drawn = sample(
            self.tightness, *self._band, self.space.depths, count - len(uniform), rng,
            mend=(lambda genes: self._filled(genes, rng)) if self._fills else None,
            least=self._floor, narrowest=self._narrowest,
        )  # fmt: skip
        drawn = self._canonical(drawn)
        return np.concatenate([uniform, drawn[self.feasible(drawn)] if len(drawn) else drawn])

    def _drawn_uniformly(self, count: int, rng: np.random.Generator) -> Genes:
        """Up to `count` feasible encodings of uniform genes, as they were drawn; fewer where few are feasible."""
        among = PUBLISHED_CHOICES.get(self.space.name, (0, CHOICES))
        found = np.empty((0, len(self.space.genes)), dtype=np.int64)
        for _ in range(UNIFORM_ROUNDS):
            if len(found) >= count:
                break
            drawn = rng.integers(*among, (UNIFORM, len(self.space.genes)), dtype=np.int64)
            found = np.concatenate([found, drawn[self.feasible(drawn)]])
        return found[:count]

    def empty(self, seed: int) -> bool:
        """Whether no feasible structure is found, drawn (a third as often as a search tries to) or enumerated.

        What is filled is narrowed into the budget, so that one draw of some hundred structures tells.
        """
        draws = (self.sample(DRAWN, numpy_generator(seed, "empty", at)) for at in range(1 if self._fills else ROUNDS))
        if any(map(len, draws)):
            return False
        enumerated = self._enumerated(DRAWN)
        return enumerated is None or not len(enumerated)

    def repair(self, encodings: Genes, rng: np.random.Generator) -> Genes:
        """Encodings (n, g) moved into the budget where they are outside, with as few changes as that takes.

        Within milliseconds all of them are filled besides.
        """
        return self._canonical(self._filled(repair(self.tightness, *self._band, encodings, rng), rng))

    def _filled(self, encodings: Genes, rng: np.random.Generator) -> Genes:
        """As wide as is free, and, unless a range of costs is searched, as wide as the budget allows."""
        if not self._fills:
            return encodings
        up = all(bound.minimum == 0 for bound in self.constraints)
        return fill(self.tightness, *self._band, encodings, rng, up=up)

    def everything(self, most: int) -> Genes | None:
        """All feasible structures, one encoding each; None where there are more than `most`, or too many to count."""
        enumerated = self._enumerated(most)
        return enumerated if enumerated is not None and len(enumerated) <= most else None

    def _enumerated(self, most: int) -> Genes | None:
        """The same, or more than `most`; None where too many structures would have to be looked at.

        Genes are chosen one after the other; what is chosen so far is dropped where it breaks an upper bound even with
        the smallest widths behind it, or a lower one even with the largest. Of milliseconds, which need not grow with
        widths, only whole structures tell.
        """
        heads = np.empty((1, 0), dtype=np.int64)
        for gene, firsts in enumerate(self._first):
            choices = np.unique(firsts)
            heads = np.column_stack([heads.repeat(len(choices), axis=0), np.tile(choices, len(heads))])
            last = gene + 1 == len(self._first)
            heads = heads[self.feasible(heads) if last else self._promising(heads)]
            if not last and len(heads) > CROWD * most:
                return None
        return heads

    def _promising(self, heads: Genes) -> npt.NDArray[np.bool_]:
        """Which first genes (n, k) some other genes could make feasible, as far as costs that grow with genes tell."""
        small, large = (
            np.column_stack([heads, np.tile(np.array(end[heads.shape[1] :], dtype=np.int64), (len(heads), 1))])
            for end in (self.space.smallest, self.space.largest)
        )
        least, greatest = self.costs(small), self.costs(large)
        promising: npt.NDArray[np.bool_] = np.ones(len(heads), dtype=bool)
        if not self.timed:
            promising &= _tightest(greatest, self.constraints) >= self.least
        for bound in (one for one in self.constraints if one.metric is not Metric.LATENCY):
            promising &= (_values(least, bound) <= bound.maximum) & (_values(greatest, bound) >= bound.minimum)
        return promising

    def _canonical(self, encodings: Genes) -> Genes:
        """The smallest choices that give the same widths."""
        return self._first[np.arange(len(self._first)), encodings]

    def predict(self, channels: Sequence[int], latencies: Container[str | None] | None = None) -> dict[str, float]:
        """Corrected seconds of any channels, also off the grid, for every latency that has a table, or some of them."""
        wanted = {name: table for name, table in self.tables.items() if latencies is None or name in latencies}
        return predict(self.space, wanted, self.corrections, channels)

    def uniform(self, of: float = 1.0) -> tuple[int, ...]:
        """The largest uniform network within so much of the upper bounds: one share of every base width, also the last.

        Where none is within them, the smallest.
        """
        if self.timed:  # a wider one may be faster
            networks, used = self._timed_uniforms
            fast = np.flatnonzero(used <= of)
            return networks[fast[-1]] if len(fast) else self.space.uniform(SMALLEST_SHARE)
        shares = {width / slot.base for slot in self.space.slots for width in range(1, slot.base + 1)}
        networks = self._shares_of(shares | {SMALLEST_SHARE})
        at = bisect_left(networks, True, key=lambda one: not self._within(one, of))
        return networks[max(0, at - 1)]

    @cached_property
    def _timed_uniforms(self) -> tuple[list[tuple[int, ...]], Floats]:
        """Uniform networks from the smallest to the largest, and what share of the upper bounds each uses."""
        networks = self._shares_of(TIMED_SHARES)
        costs = self._priced(np.array(networks, dtype=np.int64), {bound.latency for bound in self.constraints})
        return networks, _tightest(costs, self.constraints)

    def _shares_of(self, shares: Iterable[float]) -> list[tuple[int, ...]]:
        """The uniform networks of some shares, from the smallest to the largest."""
        return list(dict.fromkeys(map(self.space.uniform, sorted(s for s in shares if s >= SMALLEST_SHARE))))

    def _within(self, channels: Sequence[int], of: float) -> bool:
        costs = self._priced(np.array([channels], dtype=np.int64), {bound.latency for bound in self.constraints})
        return all(_values(costs, bound)[0] <= of * bound.maximum for bound in self.constraints)

    def shares(self, channels: Ints) -> Floats:
        """The largest share (n,) of an upper bound that any channels (n, s) use, also off the grid."""
        return _tightest(self._priced(channels), self.constraints)

    def allows(self, channels: Sequence[int]) -> bool:
        """Whether any channels, also off the grid, are within all bounds."""
        costs = self._priced(np.array([channels], dtype=np.int64))
        return all(bound.allows(float(_values(costs, bound)[0])) for bound in self.constraints)

    def _priced(self, channels: Ints, latencies: Container[str | None] | None = None) -> Costs:
        rows = [self.predict(row, latencies) for row in channels.tolist()]
        seconds = {latency: np.array([row[latency] for row in rows]) for latency in rows[0]}
        return Costs(self._costs.flops(channels), self._costs.parameters(channels), seconds)

    def _check(self, costs: Costs) -> None:
        """See that some of the structures that cost so much can satisfy each constraint."""
        for constraint in self.constraints:
            values = _values(costs, constraint)
            constraint.check(float(values.min()), float(values.max()))


def predict(
    space: Space, tables: Mapping[str, LatencyTable], corrections: Mapping[str, float], channels: Sequence[int]
) -> dict[str, float]:
    """Corrected seconds of any channels for every table; no budget need be feasible for that."""
    return {name: table.price(space, channels).seconds * corrections.get(name, 1.0) for name, table in tables.items()}


def _tightest(costs: Costs, constraints: Sequence[Constraint]) -> Floats:
    shares = [_values(costs, constraint) / constraint.maximum for constraint in constraints]
    tightest: Floats = np.max(np.array(shares), axis=0)
    return tightest


def _values(costs: Costs, constraint: Constraint) -> Floats:
    match constraint.metric:
        case Metric.FLOPS:
            return costs.flops.astype(np.float64)
        case Metric.PARAMETERS:
            return costs.parameters.astype(np.float64)
        case Metric.LATENCY:
            return costs.seconds[constraint.latency or ""]
