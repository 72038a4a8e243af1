"""Physical removal: a network without some of its channels.

The channels of a slot go together: the rows of every layer that ends in the slot, batch norm included, and the columns
of every dense layer that begins there. A depthwise layer has a row per channel and no columns; a linear layer that
reads a flattened map has a column per pixel of a channel.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latency_profiler.errors import InvalidChannels
from latency_profiler.layers import Op
from latency_profiler.spaces.space import Unit
from workers.networks import PlainNetwork


def shrink(network: PlainNetwork, kept: Mapping[int, Tensor]) -> PlainNetwork:
    """A new network that has only the `kept` channels of some slots: slot index → sorted indices.

    Slots that are not named stay whole. The new network does, up to rounding, what the old one does if all its dense
    layers read zeros in place of the channels that are gone.

    Raises:
        InvalidChannels: indices that are none, not ascending, or outside the slot.
    """
    example = next(network.parameters())
    indices = [
        _checked(slot.name, width, kept[i]).to(example.device) if i in kept else None
        for i, (slot, width) in enumerate(zip(network.space.slots, network.channels, strict=True))
    ]
    widths = [width if one is None else len(one) for width, one in zip(network.channels, indices, strict=True)]
    smaller = PlainNetwork(network.space, widths).to(example.device, example.dtype)
    state = network.state_dict()
    smaller.load_state_dict({key: _cut(key, state[key], network.space.units, indices) for key in state})
    return smaller.train(network.training)


def _checked(name: str, width: int, kept: Tensor) -> Tensor:
    ascending = bool((kept.diff() > 0).all())
    if not len(kept) or not ascending or kept[0] < 0 or kept[-1] >= width:
        raise InvalidChannels(f"the channels kept of {name!r} must be ascending and from 0 to {width - 1}: {kept}")
    return kept


def _cut(key: str, tensor: Tensor, units: Sequence[Unit], indices: Sequence[Tensor | None]) -> Tensor:
    """What remains of a tensor of the state: (c_out, ...), or (c_out, c_in, ...) in a dense layer's weight."""
    unit = units[int(key.split(".")[1])]
    rows = None if unit.target.index is None else indices[unit.target.index]
    columns = None if unit.source.index is None else indices[unit.source.index]
    if rows is not None and tensor.dim():
        tensor = tensor[rows]
    if columns is not None and tensor.dim() > 1 and unit.op is not Op.DEPTHWISE:
        tensor = tensor[:, _pixels(columns, unit.features)]
    return tensor


def _pixels(channels: Tensor, features: int) -> Tensor:
    """The flattened columns of channels that have so many pixels each."""
    return (channels[:, None] * features + torch.arange(features, device=channels.device)).flatten()
