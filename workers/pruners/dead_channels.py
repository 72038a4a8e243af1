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
from copy import deepcopy

import torch
from torch import Tensor

from latency_profiler.layers import Op
from latency_profiler.spaces.space import IMAGE, WEIGHTED, Slot, Space, Unit
from workers.networks import PlainNetwork, activate, fold
from workers.pruners.masks import Masks, clear, kept, prunable

NOT_CONSTANT = math.nan


@torch.no_grad()
def remove(network: PlainNetwork, masks: Masks) -> int:
    """Clear dead channels in weights and masks until there are none; returns how many weights went.

    In eval mode the network computes what it did before, up to rounding.
    """
    first = left = kept(masks)
    while True:  # ends: every round but the last clears a weight
        _fold_constants(network, masks)
        _clear_unread(network, masks)
        if (now := kept(masks)) == left:
            return first - now
        left = now


def without(network: PlainNetwork, masks: Masks) -> Masks:
    """What `remove` would leave of other masks of a network; both stay as they are."""
    copy, left = deepcopy(network), {name: mask.clone() for name, mask in masks.items()}
    clear(copy, left)
    remove(copy, left)
    return left


def living(space: Space, masks: Masks) -> dict[int, Tensor]:
    """The channels of every slot that are read, by the slot's index; the first channel where none is."""
    found = {}
    for slot in space.slots:
        read = _read(space, slot, masks)
        assert slot.index is not None
        assert read is not None
        found[slot.index] = read.nonzero().flatten() if read.any() else torch.zeros(1, dtype=torch.int64)
    return found


def _fold_constants(network: PlainNetwork, masks: Masks) -> None:
    """From the image on: constants go into the biases of those who read them."""
    device = next(network.parameters()).device
    image = torch.full((network.space.image_channels,), NOT_CONSTANT, dtype=torch.float64, device=device)
    constants: dict[int, Tensor] = {IMAGE: image}  # of every node, (c,)
    for i, node in enumerate(network.nodes):
        value = constants[node.input]
        if node.layer.op in WEIGHTED:
            _fold(network, masks, i, value)
            value = _constant(network, masks, i)
        if node.shortcut is not None:
            value = value + constants[node.shortcut]
        constants[i] = activate(value.clone(), node.layer.activation)


def _fold(network: PlainNetwork, masks: Masks, i: int, read: Tensor) -> None:
    """Clear the columns of constants (c,) that node i reads, and add what they gave to its bias."""
    layer, weight, mask = network.nodes[i].layer, prunable(network)[str(i)], masks[str(i)]
    known = ~read.isnan() & ((read == 0) | (layer.padding == 0))
    sums = weight.double().flatten(2).sum(2) if weight.dim() == 4 else weight.double()  # (o, c * p)
    if layer.op is Op.DEPTHWISE:
        shift = torch.where(known, sums[:, 0] * read, 0.0)
        cleared: tuple[slice, Tensor] | Tensor = known
    else:
        pixels = weight.shape[1] // len(read)
        columns = known.repeat_interleave(pixels)
        shift = sums[:, columns] @ read.repeat_interleave(pixels)[columns]
        cleared = (slice(None), columns)
    weight[cleared] = 0.0
    mask[cleared] = False
    _shift(network, i, shift)


def _shift(network: PlainNetwork, i: int, shift: Tensor) -> None:
    """Add to the outputs (o,) of a layer, before its batch norm."""
    bias = network.bias(i)
    if bias is not None:
        bias.add_(shift)
    else:
        network.norms[str(i)].running_mean.sub_(shift)  # type: ignore[operator]


def _constant(network: PlainNetwork, masks: Masks, i: int) -> Tensor:
    """What each channel (o,) of a layer gives that has no inputs."""
    bias = network.bias(i)
    if bias is None:
        bias = fold(network.weight(i), network.norms[str(i)])[1]
    return bias.double().masked_fill(masks[str(i)].flatten(1).any(1), NOT_CONSTANT)


def _clear_unread(network: PlainNetwork, masks: Masks) -> None:
    """From the classes back: the rows of channels that nobody reads."""
    weights = prunable(network)
    for slot in dict.fromkeys(unit.target for unit in reversed(network.space.units)):
        read = _read(network.space, slot, masks)
        if read is None:
            continue
        for i, unit in enumerate(network.space.units):
            if unit.target == slot and unit.op in WEIGHTED:
                weights[str(i)][~read] = 0.0
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
