"""How much of a network a mask may keep, and the masks that keep just that.

Theta are all weights of convolutions and linear layers, in a basis or not; D is their number. Biases, batch norms and
bases are never pruned and not counted (Interspace Pruning, equation 9). An entry of a layer whose output has p pixels
is used in p multiply-adds, so a bound on sparse FLOPs counts it p times, and one on parameters once.

Tensors of the entries of Theta are mappings from a node's index, as a string, to a tensor in its weight's shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latency_profiler.cost import Constraint, Metric, layer_flops
from latency_profiler.errors import InfeasibleConstraint, InvalidInput
from latency_profiler.layers import Layer, Node
from latency_profiler.spaces.space import WEIGHTED
from workers.pruners.masks import Masks


def positions(layer: Layer) -> int:
    """Multiply-adds in which each weight of a layer is used: the pixels of its output."""
    return layer.out_size**2


def sizes(nodes: Sequence[Node]) -> dict[str, int]:
    """Entries of Theta, by node."""
    pruned = {str(i): node.layer for i, node in enumerate(nodes) if node.layer.op in WEIGHTED}
    return {name: layer_flops(layer) // positions(layer) for name, layer in pruned.items()}


@dataclass(frozen=True)
class Allowance:
    """The most that masks may keep: their entries, counted by `prices`, sum to at most `maximum`."""

    sizes: dict[str, int]
    """Entries of each layer."""
    prices: dict[str, int]
    """What one kept entry of each layer counts."""
    maximum: int

    @classmethod
    def at_rate(cls, nodes: Sequence[Node], rate: float) -> "Allowance":
        """Exactly round((1 - p) D) entries, for a pruning rate p from 0 up to, and without, 1.

        Raises:
            InvalidInput: the rate is outside this range.
        """
        if not 0.0 <= rate < 1.0:
            raise InvalidInput(f"the pruning rate is {rate:g}; it must be at least 0 and less than 1")
        entries = sizes(nodes)
        return cls(entries, dict.fromkeys(entries, 1), round((1 - rate) * sum(entries.values())))

    @classmethod
    def within(cls, nodes: Sequence[Node], constraint: Constraint) -> "Allowance":
        """The entries, or the sparse FLOPs, that a job's constraint allows.

        Raises:
            InfeasibleConstraint: not one entry is allowed in any layer.
            InvalidInput: a latency, which masks do not change in a dense runtime.
        """
        entries = sizes(nodes)
        match constraint.metric:
            case Metric.PARAMETERS:
                prices = dict.fromkeys(entries, 1)
            case Metric.FLOPS:
                prices = {name: positions(nodes[int(name)].layer) for name in entries}
            case Metric.LATENCY:
                raise InvalidInput("a mask changes no latency; bound the parameters or the flops that are kept")
        made = cls(entries, prices, int(constraint.maximum))
        if made.maximum < min(prices.values()):
            raise InfeasibleConstraint(
                constraint.metric, constraint.maximum, float(min(prices.values())), float(made.total)
            )
        return replace(made, maximum=min(made.maximum, made.total))

    @property
    def total(self) -> int:
        """What the dense network counts."""
        return sum(self.sizes[name] * price for name, price in self.prices.items())

    @property
    def share(self) -> float:
        """What may be kept, of all."""
        return self.maximum / self.total

    def relaxed(self, share: float) -> "Allowance":
        """At least this share of all: a stop on the way to the maximum."""
        return replace(self, maximum=max(self.maximum, round(share * self.total)))

    def best(self, scores: Mapping[str, Tensor], among: Mapping[str, Tensor] | None = None) -> Masks:
        """The entries above one threshold of all layers, as many as are allowed; of equal scores the first.

        Args:
            among: entries that were pruned before stay pruned.

        Raises:
            InvalidInput: a score is not a number.
        """
        flat = torch.cat([scores[name].flatten() for name in self.sizes])
        if flat.isnan().any():
            raise InvalidInput("a score is not a number: the network that was scored has diverged")
        left = torch.ones_like(flat, dtype=torch.bool)
        if among is not None:
            left = torch.cat([among[name].flatten() for name in self.sizes])
        candidates = left.nonzero().squeeze(1)
        order = candidates[torch.argsort(flat[candidates], descending=True, stable=True)]
        mask = torch.zeros_like(left)
        mask[order[: self._fitting(order)]] = True
        parts = torch.split(mask, list(self.sizes.values()))
        return {name: part.view_as(scores[name]) for name, part in zip(self.sizes, parts, strict=True)}

    def _fitting(self, order: Tensor) -> int:
        """The most first entries of an order whose sum is allowed, found by bisection."""
        sums = torch.cat([
            torch.full((size,), self.prices[name], device=order.device) for name, size in self.sizes.items()
        ])[order].cumsum(0)  # fmt: skip
        return int(torch.searchsorted(sums, self.maximum, right=True))


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of so many largest scores; of equal ones the first."""
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view_as(scores)
