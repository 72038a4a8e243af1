"""Channels that nothing enters or nothing reads are removed with all their connections (Han et al. 2015, section 3.5).

- A channel that no layer reads: the rows of all layers that write it are cleared. This is exact.
- A channel without inputs is not silent: it gives a constant, activation(bias). What its readers make of the constant
  is added to their biases (taken from batch norms' means where there are none), then their columns are cleared. This
  is exact but at the border of a zero-padded convolution, so there only a constant 0 is removed.

A slot's channel is unread only if all readers of the slot leave it out: shortcuts and depthwise convolutions share it.
Images and classes are never removed. Clearing one connection can only make more channels dead, so there is one result,
whatever the order.

Letters: c channels, o outputs, p columns of one channel (the pixels of a flattened map, 1 in a convolution).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from latency_profiler.layers import Op
from latency_profiler.spaces.space import IMAGE, WEIGHTED, Slot, Space, Unit
from workers.networks import PlainNetwork, activate, fold
from workers.pruners.masks import Masks, clear, kept, prunable
from workers.pruners.surgery import shrink

NOT_CONSTANT = math.nan
Offsets = dict[str, Tensor]
"""What is added to the outputs (o,) of every layer, before its batch norm."""


@torch.no_grad()
def remove(network: PlainNetwork, masks: Masks) -> int:
    """Clear dead channels in weights and masks until there are none; returns how many weights went.

    In eval mode the network computes what it did before, up to rounding.
    """
    left, offsets = _without(network, masks)
    gone = kept(masks) - kept(left)
    for name, mask in left.items():
        masks[name].copy_(mask)
        bias = network.bias(int(name))
        if bias is not None:
            bias.add_(offsets[name])
        else:
            network.norms[name].running_mean.sub_(offsets[name])  # type: ignore[operator]
    clear(network, masks)
    return gone


@torch.no_grad()
def without(network: PlainNetwork, masks: Masks) -> Masks:
    """What `remove` would leave of masks; nothing is changed."""
    return _without(network, masks)[0]


@torch.no_grad()
def shrunk(network: PlainNetwork, masks: Masks) -> tuple[PlainNetwork, Masks]:
    """Both without the channels that nobody reads; to be called after `remove`."""
    alive = living(network.space, masks)
    marked = PlainNetwork(network.space, network.channels).to(next(network.parameters()).device)
    for name, weight in prunable(marked).items():
        weight.copy_(masks[name])
    cut = prunable(shrink(marked, alive))
    return shrink(network, alive), {name: weight != 0 for name, weight in cut.items()}


def living(space: Space, masks: Masks) -> dict[int, Tensor]:
    """The channels of every slot that are read, by the slot's index; the first channel where none is."""
    found = {}
    for slot in space.slots:
        read = _read(space, slot, masks)
        assert slot.index is not None
        assert read is not None
        found[slot.index] = read.nonzero().flatten() if read.any() else torch.zeros(1, dtype=torch.int64)
    return found


def _without(network: PlainNetwork, masks: Masks) -> tuple[Masks, Offsets]:
    left = {name: mask.clone() for name, mask in masks.items()}
    offsets = {name: torch.zeros(len(mask), dtype=torch.float64, device=mask.device) for name, mask in left.items()}
    count = -1
    while (now := kept(left)) != count:  # ends: every round but the last clears a weight
        count = now
        _fold_constants(network, left, offsets)
        _clear_unread(network.space, left)
    return left, offsets


def _fold_constants(network: PlainNetwork, masks: Masks, offsets: Offsets) -> None:
    """From the image on: constants go into the biases of those who read them."""
    device = next(network.parameters()).device
    image = torch.full((network.space.image_channels,), NOT_CONSTANT, dtype=torch.float64, device=device)
    constants: dict[int, Tensor] = {IMAGE: image}  # of every node, (c,)
    for i, node in enumerate(network.nodes):
        value, name = constants[node.input], str(i)
        if node.layer.op in WEIGHTED:
            offsets[name] += _fold(network, masks[name], i, value)
            value = _constant(network, masks[name], offsets[name], i)
        if node.shortcut is not None:
            value = value + constants[node.shortcut]
        constants[i] = activate(value.clone(), node.layer.activation)


def _fold(network: PlainNetwork, mask: Tensor, i: int, read: Tensor) -> Tensor:
    """Clear the columns of constants (c,) that node i reads; returns what they gave to its outputs (o,)."""
    layer, weight = network.nodes[i].layer, network.weight(i)
    known = ~read.isnan() & ((read == 0) | (layer.padding == 0))
    if layer.op is Op.DEPTHWISE:  # a channel's column is its row
        shift = torch.where(known, (weight * mask).double().flatten(1).sum(1) * read, 0.0)
        mask[known] = False
        return shift
    columns = known.repeat_interleave(weight.shape[1] // len(read))
    values = read.repeat_interleave(weight.shape[1] // len(read))[columns]
    parts = (weight[:, columns] * mask[:, columns]).double()  # (o, c * p, k, k) or (o, c * p)
    mask[:, columns] = False
    return parts.reshape(*parts.shape[:2], math.prod(parts.shape[2:])).sum(2) @ values


def _constant(network: PlainNetwork, mask: Tensor, offset: Tensor, i: int) -> Tensor:
    """What each channel (o,) of a layer gives that has no inputs."""
    bias = network.bias(i)
    if bias is not None:
        value = bias + offset
    else:
        scale, shift = fold(offset[:, None, None, None], network.norms[str(i)])
        value = scale.flatten() + shift
    return value.masked_fill(mask.flatten(1).any(1), NOT_CONSTANT)


def _clear_unread(space: Space, masks: Masks) -> None:
    """From the classes back: the rows of channels that nobody reads."""
    for slot in dict.fromkeys(unit.target for unit in reversed(space.units)):
        read = _read(space, slot, masks)
        if read is None or read.all():
            continue
        for i, unit in enumerate(space.units):
            if unit.target == slot and unit.op in WEIGHTED:
                masks[str(i)][~read] = False


def _read(space: Space, slot: Slot, masks: Masks) -> Tensor | None:
    """Which channels (c,) of a slot some layer reads; None for the classes, which are the network's output."""
    found = [
        masks[str(i)].transpose(0, 1).flatten(1).any(1).view(-1, unit.features).any(1)
        for i, unit in _readers(space, slot)
    ]
    return torch.stack(found).any(0) if found else None


def _readers(space: Space, slot: Slot) -> Iterator[tuple[int, Unit]]:
    """Layers that mix the channels of a slot."""
    dense = (Op.CONV, Op.LINEAR)
    return ((i, unit) for i, unit in enumerate(space.units) if unit.source == slot and unit.op in dense)
