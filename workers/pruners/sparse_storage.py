"""Pruned weights as files: the non-zero numbers and the distances between them (Han et al. 2015, section 5).

A tensor is read in one row. Of every number that is not zero its value is stored, 32 bits, and its distance from the
one before, less 1, in b bits: 5 for fully-connected layers, 8 for convolutions. Where a distance is above 2^b,
*fillers* stand between: entries whose value is 0, 2^b apart. Zeros behind the last number are told by the tensor's
shape. A kept weight that is exactly 0 cannot be told from a pruned one.

Letters: n entries, b bits of a distance.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor

from workers.networks import PlainNetwork
from workers.pruners.masks import Masks, prunable

VALUE_BITS = 32
LINEAR_BITS, CONV_BITS = 5, 8
"""Of a distance, as published."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor as n entries: distances less 1 (n,), below 2^bits, and values (n,)."""

    distances: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    bits: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bits that the entries take."""
        return len(self.values) * (self.bits + VALUE_BITS)


def encode(tensor: Tensor, bits: int) -> Encoded:
    """The entries of a tensor, fillers included."""
    flat = tensor.detach().float().cpu().flatten().numpy()
    (places,) = np.nonzero(flat)
    gaps = np.diff(places, prepend=-1) - 1
    fillers, rest = np.divmod(gaps, 2**bits)
    ends = np.cumsum(fillers + 1) - 1  # where the numbers themselves stand among the entries
    count = int(ends[-1]) + 1 if len(ends) else 0
    distances, values = np.full(count, 2**bits - 1, dtype=np.int64), np.zeros(count, dtype=np.float32)
    distances[ends], values[ends] = rest, flat[places]
    return Encoded(distances, values, bits, tuple(tensor.shape))


def decode(encoded: Encoded) -> Tensor:
    """Inverse of `encode`."""
    flat = np.zeros(int(np.prod(encoded.shape)), dtype=np.float32)
    flat[np.cumsum(encoded.distances + 1) - 1] = encoded.values
    return torch.from_numpy(flat.reshape(encoded.shape))


def packed(distances: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    """Distances (n,) in n * bits bits, filled up to whole bytes."""
    columns = distances[:, None] >> np.arange(bits) & 1
    return np.packbits(columns.astype(np.uint8), bitorder="little")


def unpacked(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int64]:
    """Inverse of `packed`."""
    columns = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    distances: npt.NDArray[np.int64] = (columns.astype(np.int64) << np.arange(bits)).sum(axis=1)
    return distances


def write(network: PlainNetwork) -> bytes:
    """A network with pruned weights as a safetensors file.

    `<node>.values` and the packed `<node>.distances` of every pruned weight; all else as in the network's state.
    """
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name not in _weights(network).values()}
    for unit, weight in prunable(network).items():
        encoded = encode(weight, _bits(network, unit))
        tensors[f"{unit}.values"] = torch.from_numpy(encoded.values)
        tensors[f"{unit}.distances"] = torch.from_numpy(packed(encoded.distances, encoded.bits))
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


@torch.no_grad()
def read(data: bytes, network: PlainNetwork) -> Masks:
    """Give a network of the same structure what `write` has written; returns the masks of what is not zero."""
    tensors, bits = load(data), {unit: _bits(network, unit) for unit in prunable(network)}
    for unit, weight in prunable(network).items():
        values = tensors.pop(f"{unit}.values").numpy()
        distances = unpacked(tensors.pop(f"{unit}.distances").numpy(), bits[unit], len(values))
        weight.copy_(decode(Encoded(distances, values, bits[unit], tuple(weight.shape))))
    network.load_state_dict(tensors, strict=False)
    return {unit: weight != 0 for unit, weight in prunable(network).items()}


def _bits(network: PlainNetwork, unit: str) -> int:
    return LINEAR_BITS if unit in network.linears else CONV_BITS


def _weights(network: PlainNetwork) -> dict[str, str]:
    """Names of the prunable weights in the network's state, by node."""
    kinds = {unit: "linears" if unit in network.linears else "convs" for unit in prunable(network)}
    return {unit: f"{kind}.{unit}.weight" for unit, kind in kinds.items()}
