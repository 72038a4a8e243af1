"""How far every round prunes: to a budget, to densities, or as far as the accuracy holds.

Letters: r the round, R their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from latency_profiler.layers import Node
from workers.pruners import masks as m

Metric = Literal["parameters", "flops"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Kept weights cost at most so much: themselves, or the multiply-adds that they take part in.

    What goes with dead channels costs nothing. Qualities only say how thresholds relate; their common factor is the
    least that fits. Round r may spend dense * (maximum / dense)^(r / R), so that every round keeps the same share (no
    source: chosen here).
    """

    metric: Metric
    maximum: int


@dataclass(frozen=True, slots=True)
class Densities:
    """Every layer named keeps this share of its weights at most, after round r this share to the power of r / R.

    A threshold is the (1 - density) quantile of the layer's |w|.
    """

    layers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Growth:
    """Qualities grow by `step` times themselves in every round, until retraining no longer brings the accuracy back.

    The last round that lost at most `tolerance` of the dense accuracy counts (section 3.4; step and tolerance have no
    source).
    """

    tolerance: float
    step: float = 0.25
    budget: Budget | None = None
    """What the result must fit in all the same."""


Goal = Budget | Densities | Growth


@dataclass(frozen=True, slots=True)
class Round:
    """Where a run stands when it prunes.

    `open` are the weights that this round has yet to prune, `scales` quality times deviation of each of them; `alive`
    gives masks without dead channels.
    """

    number: int
    rounds: int
    nodes: Sequence[Node]
    masks: Mapping[str, Tensor]
    open: Mapping[str, Tensor]
    scales: Mapping[str, float]
    alive: Callable[[m.Masks], m.Masks]

    @property
    def share(self) -> float:
        """How much of the way is done after this round."""
        return self.number / self.rounds


def thresholds(goal: Goal, at: Round) -> m.Thresholds:
    """The thresholds of the open layers."""
    match goal:
        case Budget():
            return _of_budget(goal, at)
        case Densities():
            named = {name: goal.layers[at.nodes[int(name)].name] for name in at.open
                     if at.nodes[int(name)].name in goal.layers}  # fmt: skip
            weights = {name: at.open[name] for name in named}
            return m.at_densities(weights, at.masks, {name: density**at.share for name, density in named.items()})
        case Growth():
            return {name: at.number * goal.step * scale for name, scale in at.scales.items()}


def _of_budget(goal: Budget, at: Round) -> m.Thresholds:
    prices = price(goal.metric, at.nodes, at.masks)
    dense = sum(mask.numel() * prices[name] for name, mask in at.masks.items())
    last = at.number == at.rounds
    allowed = goal.maximum if last else int(dense * min(1.0, goal.maximum / dense) ** at.share)
    return m.fitting(at.open, at.masks, at.scales, lambda masks: m.cost(at.alive(masks), prices) <= allowed)


def price(metric: Metric, nodes: Sequence[Node], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """What one weight of every layer costs."""
    return m.positions(nodes, masks) if metric == "flops" else dict.fromkeys(masks, 1)
