"""Sparse storage: invariant 7 of the specification."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latency_profiler.spaces.registry import get_space
from workers.networks import PlainNetwork
from workers.pruners import masks as m
from workers.pruners import sparse_storage as sparse


def with_gaps(*gaps: int, rest: int = 0) -> Tensor:
    """Zeros but for numbers so far from each other."""
    flat = torch.zeros(sum(gaps) + rest)
    flat[torch.tensor(gaps).cumsum(0) - 1] = torch.arange(1.0, len(gaps) + 1)
    return flat


def decoded_by_hand(encoded: sparse.Encoded) -> Tensor:
    """Entry after entry."""
    flat = torch.zeros(encoded.shape).flatten()
    place = -1
    for distance, value in zip(encoded.distances.tolist(), encoded.values.tolist(), strict=True):
        assert 0 <= distance < 2**encoded.bits
        place += distance + 1
        flat[place] = value
    return flat.reshape(encoded.shape)


@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 10_000))
def test_any_mask_survives_the_round_trip(bits: int, shape: list[int], density: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * (torch.rand(shape, generator=random) < density)
    encoded = sparse.encode(weight, bits)
    assert torch.equal(sparse.decode(encoded), weight)
    assert torch.equal(decoded_by_hand(encoded), weight)


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_fillers_stand_where_a_gap_is_above_two_to_the_bits(bits: int) -> None:
    most = 2**bits
    for gap, fillers in ((most - 1, 0), (most, 0), (most + 1, 1), (2 * most, 1), (2 * most + 1, 2), (9 * most, 8)):
        for weight in (with_gaps(gap), with_gaps(1, gap, rest=3 * most)):
            encoded = sparse.encode(weight, bits)
            numbers = int((weight != 0).sum())
            assert len(encoded.values) == numbers + fillers
            assert int((encoded.values == 0).sum()) == fillers
            assert encoded.size == (numbers + fillers) * (bits + 32)
            assert torch.equal(sparse.decode(encoded), weight)


def test_empty_and_full_tensors() -> None:
    empty, full = sparse.encode(torch.zeros(3, 50), 5), sparse.encode(torch.ones(3, 50), 5)
    assert (empty.size, full.size) == (0, 150 * 37)
    assert torch.equal(sparse.decode(empty), torch.zeros(3, 50))
    assert torch.equal(sparse.decode(full), torch.ones(3, 50))


def test_indices_of_fully_connected_layers_add_the_published_overhead() -> None:
    assert pytest.approx(0.156, abs=5e-4) == sparse.LINEAR_BITS / sparse.VALUE_BITS


@settings(max_examples=30)
@given(st.integers(1, 12), st.lists(st.integers(0, 2**12 - 1), max_size=40))
def test_distances_are_packed_to_the_bit(bits: int, values: list[int]) -> None:
    distances = np.array(values, dtype=np.int64) % 2**bits
    data = sparse.packed(distances, bits)
    assert len(data) == -(-len(values) * bits // 8)
    np.testing.assert_array_equal(sparse.unpacked(data, bits, len(values)), distances)


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet_5", "mobilenet_v1"])
def test_a_network_survives_its_file_whose_size_is_that_of_its_entries(name: str) -> None:
    space = get_space(name, 16, 0.5, 10, True)
    network, other = (PlainNetwork(space, space.channels(space.largest), seed) for seed in (0, 1))
    weights, random = m.prunable(network), torch.Generator().manual_seed(0)
    masks = {i: torch.rand(weight.shape, generator=random) < 0.08 for i, weight in weights.items()}
    m.clear(network, masks)
    data = sparse.write(network)
    read = sparse.read(data, other)
    assert all(torch.equal(read[i], masks[i]) for i in masks)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())

    entries = sum(sparse.encode(weight, 5 if i in network.linears else 8).size for i, weight in weights.items())
    numbers = sum(map(torch.numel, weights.values()))
    others = sum(value.nbytes for value in network.state_dict().values()) - 4 * numbers
    header = 160 * (len(network.state_dict()) + 2 * len(weights))
    assert entries / 8 + others <= len(data) <= entries / 8 + others + header
    if name == "lenet_300_100":
        assert len(data) < 0.12 * 4 * numbers
