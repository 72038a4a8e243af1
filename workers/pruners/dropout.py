"""Dropout behind hidden fully-connected layers, less of it where connections were pruned (Han et al. 2015, 3.2)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latency_profiler.layers import Activation, Node, Op
from workers.datasets import generator
from workers.placement import place


def adjusted(original: float, kept: int, connections: int) -> float:
    """D_r = D_o * sqrt(C_r / C_o), equation (2): the rate that suits the connections that are left.

    Args:
        original: the rate of the dense layer.
        kept, connections: of the layer now, and of the dense one.
    """
    return float(original * (kept / connections) ** 0.5)


def rates(nodes: Sequence[Node], masks: Mapping[str, Tensor], original: float) -> dict[int, float]:
    """The rate for the neurons of every hidden fully-connected layer, by its node: as the layer's own weights say."""
    return {
        i: adjusted(original, int(masks[str(i)].sum()), masks[str(i)].numel())
        for i, node in enumerate(nodes)
        if node.layer.op is Op.LINEAR and node.layer.activation is not Activation.NONE
    }


def drop(x: Tensor, rate: float, batch: int, part: slice, seed: int, *counters: int) -> Tensor:
    """Neurons (b, c), of which some are zero and the others larger by 1 / (1 - rate).

    Which ones depends on seed and counters alone, and is drawn for the whole batch, of which x is a part.
    """
    drawn = torch.rand(batch, x.shape[1], generator=generator(seed, "dropout", *counters))[part]
    return x * place((drawn >= rate).to(x.dtype) / (1 - rate), x.device)
