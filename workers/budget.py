"""The constraints of one job over one space: what a structure costs, and whether it is allowed.

*Tightness* is the largest share of an upper bound that a structure uses: 1 is a structure that uses a budget to the
full, above 1 it breaks one. Latencies are predictions times a device's correction, which grows when a measurement
breaks the prediction.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from latency_profiler.cost import Constraint, CostModel, Ints, Metric
from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.lookup_table import LatencyModel, LatencyTable
from latency_profiler.spaces.space import Space
from workers.sampling import Genes, sample

Floats = npt.NDArray[np.float64]
SMALLEST_SHARE = 0.10
"""The grid begins at a tenth of the base widths, and so does the uniform network."""


@dataclass(frozen=True)
class Costs:
    """FLOPs and parameters (n,), and corrected seconds (n,) per device."""

    flops: Ints
    parameters: Ints
    seconds: dict[str, Floats]


class Budget:
    """Constraints, and the models that price them.

    Args:
        tables: lookup tables of every device that is constrained or shall be reported.
        corrections: device → factor on its predictions.
        least_share: candidates must use this share of the tightest upper bound.

    Raises:
        InfeasibleConstraint: no structure of the space satisfies all constraints.
    """

    def __init__(
        self, space: Space, constraints: Sequence[Constraint], tables: Mapping[str, LatencyTable],
        corrections: Mapping[str, float], least_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.space, self.constraints, self.tables, self.corrections = space, constraints, tables, corrections
        self._costs = CostModel(space)
        self._latencies = {device: LatencyModel(table, space) for device, table in tables.items()}
        self._widths = np.array(space.choices)
        self._fixed = np.array([slot.base for slot in space.fixed], dtype=np.int64)
        largest = float(self.tightness(np.array([space.largest]))[0])
        self.least = least_share * min(1.0, largest)
        self._check()

    def channels(self, encodings: Genes) -> Ints:
        """Channels (n, s) of encodings (n, g)."""
        chosen = self._widths[np.arange(len(self._widths)), encodings]
        return np.concatenate([chosen, np.broadcast_to(self._fixed, (len(encodings), len(self._fixed)))], axis=1)

    def costs(self, encodings: Genes) -> Costs:
        """What encodings (n, g) cost."""
        channels = self.channels(encodings)
        seconds = {
            device: model.seconds(channels) * self.corrections.get(device, 1.0)
            for device, model in self._latencies.items()
        }
        return Costs(self._costs.flops(channels), self._costs.parameters(channels), seconds)

    def tightness(self, encodings: Genes, of: Sequence[Constraint] = ()) -> Floats:
        """The largest share (n,) of an upper bound that encodings (n, g) use, of all constraints or of some."""
        costs = self.costs(encodings)
        shares = [_values(costs, constraint) / constraint.maximum for constraint in of or self.constraints]
        tightest: Floats = np.max(np.array(shares), axis=0)
        return tightest

    def feasible(self, encodings: Genes) -> npt.NDArray[np.bool_]:
        """Which of encodings (n, g) satisfy every bound and use enough of the budget."""
        costs = self.costs(encodings)
        allowed = self.tightness(encodings) >= self.least
        for constraint in self.constraints:
            values = _values(costs, constraint)
            allowed &= (values >= constraint.minimum) & (values <= constraint.maximum)
        return allowed

    def sample(self, count: int, rng: np.random.Generator) -> Genes:
        """Up to `count` random feasible encodings, bounded in effort."""
        drawn = sample(self.tightness, self.least, 1.0, len(self.space.genes), count, rng)
        return drawn[self.feasible(drawn)] if len(drawn) else drawn

    def predict(self, channels: Sequence[int]) -> dict[str, float]:
        """Corrected seconds of any channels, also off the grid, on every device that has a table."""
        return {
            device: table.price(self.space, channels).seconds * self.corrections.get(device, 1.0)
            for device, table in self.tables.items()
        }

    def uniform(self) -> tuple[int, ...]:
        """The largest uniform network within the upper bounds: one share of every base width, the last one too."""
        widths = {width / slot.base for slot in self.space.slots for width in range(1, slot.base + 1)}
        shares = sorted(share for share in widths if share >= SMALLEST_SHARE)
        at = bisect_left(shares, True, key=lambda share: not self._within(self.space.uniform(share)))
        return self.space.uniform(shares[max(0, at - 1)])

    def _within(self, channels: Sequence[int]) -> bool:
        seconds = self.predict(channels) if self.tables else {}
        row = np.array([channels], dtype=np.int64)
        costs = Costs(
            self._costs.flops(row), self._costs.parameters(row), {d: np.array([s]) for d, s in seconds.items()}
        )
        return all(_values(costs, c)[0] <= c.maximum for c in self.constraints)

    def _check(self) -> None:
        ends = np.array([self.space.smallest, self.space.largest])
        costs = self.costs(ends)
        for constraint in self.constraints:
            smallest, largest = map(float, _values(costs, constraint))
            if constraint.maximum < smallest or constraint.minimum > largest:
                asked = constraint.maximum if constraint.maximum < smallest else constraint.minimum
                raise InfeasibleConstraint(constraint.metric, asked, smallest, largest, constraint.device)


def _values(costs: Costs, constraint: Constraint) -> Floats:
    match constraint.metric:
        case Metric.FLOPS:
            return costs.flops.astype(np.float64)
        case Metric.PARAMETERS:
            return costs.parameters.astype(np.float64)
        case Metric.LATENCY:
            return costs.seconds[constraint.device or ""]
