"""Gates: one factor per channel of a slot, 1 while the channel is kept and 0 when it is gone.

An *activation* gate stands where dense layers read a slot's maps, behind batch norm, addition and activation. A channel
is removed exactly when its gate is 0: whatever else happens to it (a depthwise layer, a pooling, a shortcut into the
same slot) stays within the channel. A *weight* gate multiplies the channel's rows of weights in dense layers, before
batch norm, as the publication of collaborative pruning does: at 0 the channel still passes on the constant that batch
norm makes of zero, which removal takes away. A depthwise layer behind them follows, so its weights have none. A
*centred* gate is an activation gate that leaves the channel's mean over the batch: it says what removal does once the
batch norms behind it are measured anew, as any training does, since they take the mean off again (up to the map's
border; no source: derived here).

All layers of a slot share its gate. Letters: b images, c channels of a slot.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from latency_profiler.layers import Op
from latency_profiler.spaces.space import Slot
from workers.networks import PlainNetwork

Gate = Literal["activation", "weight", "centred"]
DENSE = (Op.CONV, Op.LINEAR)


def gated(network: PlainNetwork, gates: Mapping[int, Tensor], kind: Gate) -> Callable[[int, Tensor], Tensor]:
    """What `run` applies to compute the network with gates (b or 1, c) of some slots, by slot index."""
    return _weights(network, gates) if kind == "weight" else _activations(network, gates, kind)


def passed(x: Tensor, slot: Slot, gates: Mapping[int, Tensor], kind: Gate) -> Tensor:
    """Maps (b, c, s, s), or features (b, c), of a slot as dense layers read them."""
    gate = of(slot, gates)
    if gate is None or kind == "weight":
        return x
    if kind == "activation":
        return x * _like(gate, x)
    mean = x.detach().mean([i for i in range(x.dim()) if i != 1], keepdim=True)
    return mean + (x - mean) * _like(gate, x)


def _activations(network: PlainNetwork, gates: Mapping[int, Tensor], kind: Gate) -> Callable[[int, Tensor], Tensor]:
    def compute(i: int, x: Tensor) -> Tensor:
        unit = network.space.units[i]
        return network.compute(i, passed(x, unit.source, gates, kind) if unit.op in DENSE else x)

    return compute


def _weights(network: PlainNetwork, gates: Mapping[int, Tensor]) -> Callable[[int, Tensor], Tensor]:
    def compute(i: int, x: Tensor) -> Tensor:
        unit, y = network.space.units[i], network.compute(i, x)
        gate = of(unit.target, gates)
        if unit.op not in DENSE or gate is None:
            return y
        silent = network.compute(i, torch.zeros_like(x[:1]))  # what a weight of zero gives: shift of the norm, or bias
        return silent + (y - silent) * _like(gate, y)

    return compute


def _like(gate: Tensor, x: Tensor) -> Tensor:
    return gate.reshape(*gate.shape, *(1,) * (x.dim() - 2))


def of(slot: Slot, tensors: Mapping[int, Tensor]) -> Tensor | None:
    """What there is for a slot in a mapping by slot index."""
    return None if slot.index is None else tensors.get(slot.index)
