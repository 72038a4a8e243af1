"""Masks on a network's weights, and the thresholds that they come from (Han et al. 2015, section 3).

A mask is true where a weight is kept. Masks, weights, thresholds and all else that belongs to a layer are dicts by the
index of its node, as a string. Weights of convolutions and linear layers are prunable; biases and batch norms are not.

A layer's threshold is t = q * std(W), its *quality* q times the deviation of its weights; a weight is kept if
|w| >= t, and what was pruned before stays pruned.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from latency_profiler.cost import layer_flops
from latency_profiler.layers import Node
from latency_profiler.spaces.space import WEIGHTED
from workers.networks import PlainNetwork

Masks = dict[str, Tensor]
Thresholds = dict[str, float]
StdOver = Literal["survivors", "all", "initial"]


def prunable(network: PlainNetwork) -> dict[str, Tensor]:
    """The weights that masks are on; not copies."""
    return {str(i): network.weight(i).detach() for i, node in enumerate(network.nodes) if node.layer.op in WEIGHTED}


def full(network: PlainNetwork) -> Masks:
    """Masks that keep everything."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(network).items()}


def clear(network: PlainNetwork, masks: Mapping[str, Tensor]) -> None:
    """Set what is pruned to zero."""
    for name, weight in prunable(network).items():
        weight.masked_fill_(~masks[name], 0.0)


def pruned(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> Masks:
    """Masks of the weights that are still kept; layers without a threshold keep theirs."""
    return {
        name: mask & (weights[name].abs().double() >= thresholds[name]) if name in thresholds else mask.clone()
        for name, mask in masks.items()
    }


def deviations(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Standard deviation of every layer's weights, of the survivors alone where masks are given.

    The mean is subtracted and nothing is corrected (ddof 0). A layer without weights has 0.
    """
    found = {}
    for name, weight in weights.items():
        values = (weight if masks is None else weight[masks[name]]).double()
        found[name] = float(values.std(correction=0)) if values.numel() else 0.0
    return found


def fitting(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], scales: Mapping[str, float],
    fits: Callable[[Masks], bool],
) -> Thresholds:  # fmt: skip
    """The least thresholds whose masks fit, each the same multiple of its layer's scale.

    Survivors of all layers are ranked by |w| / scale, and the longest beginning that fits is kept, or nothing. Weights
    of equal rank stay or go together, so that `pruned` keeps exactly these; where scales are 0 all of them rank first.

    Args:
        weights: the layers to prune.
        scales: quality times deviation of every layer.
        fits: whether masks of all layers may be; fewer weights fit wherever more do.
    """
    sizes = {name: weight.abs().double() for name, weight in weights.items()}
    ranks = {name: size / max(scales[name], math.ulp(0.0)) for name, size in sizes.items()}
    levels: Tensor = torch.unique(torch.cat([rank[masks[name]] for name, rank in ranks.items()]))

    def chosen(place: int) -> Masks:
        level = levels[place] if place < len(levels) else math.nan  # which no rank reaches
        return {name: mask & (ranks[name] >= level) if name in ranks else mask for name, mask in masks.items()}

    least = chosen(bisect_left(range(len(levels)), True, key=lambda place: fits(chosen(place))))
    return {name: _least(sizes[name], least[name]) for name in weights}


def _least(sizes: Tensor, chosen: Tensor) -> float:
    """The least of the chosen sizes; more than every size where none is."""
    if chosen.any():
        return float(sizes[chosen].min())
    return math.nextafter(float(sizes.max()), math.inf)


def at_densities(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], densities: Mapping[str, float]
) -> Thresholds:  # fmt: skip
    """Thresholds at the (1 - density) quantile of every layer's |w|: as much is kept as the density allows."""
    thresholds: Thresholds = {}
    for name, weight in weights.items():
        most = round(densities[name] * weight.numel())
        thresholds |= fitting({name: weight}, {name: masks[name]}, {name: 1.0}, _at_most(most))
    return thresholds


def _at_most(count: int) -> Callable[[Masks], bool]:
    return lambda masks: kept(masks) <= count


def positions(nodes: Sequence[Node], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-adds that one weight of every layer takes part in: the pixels of the layer's output."""
    return {name: layer_flops(nodes[int(name)].layer) // mask.numel() for name, mask in masks.items()}


def cost(masks: Mapping[str, Tensor], prices: Mapping[str, int]) -> int:
    """What kept weights cost together."""
    return sum(int(mask.count_nonzero()) * prices[name] for name, mask in masks.items())


def sparse_flops(nodes: Sequence[Node], masks: Mapping[str, Tensor]) -> int:
    """Multiply-adds of the kept weights for one image."""
    return cost(masks, positions(nodes, masks))


def kept(masks: Mapping[str, Tensor]) -> int:
    """How many weights are kept."""
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def emptied(nodes: Sequence[Node], masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have no weights left."""
    return [nodes[int(name)].name for name, mask in masks.items() if not mask.any()]
