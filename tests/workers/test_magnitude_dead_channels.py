"""Dead channels: invariant 5 of the specification, on networks with and without padding, batch norm and shortcuts."""

import random

import pytest
import torch
from torch import Tensor

from latency_profiler.layers import Op
from latency_profiler.spaces.registry import get_space
from workers.networks import PlainNetwork
from workers.pruners import dead_channels
from workers.pruners import masks as m

NETWORKS = [
    ("lenet_300_100", 8, 0.06), ("lenet_5", 16, 0.3), ("lenet_5", 8, 0.3), ("vgg16", 8, 0.05), ("resnet20", 8, 0.4),
    ("mobilenet_v1", 8, 0.1), ("mobilenet_v2", 8, 0.1),
]  # fmt: skip


def random_network(name: str, size: int, width: float, seed: int) -> PlainNetwork:
    """Random numbers in biases and batch norms too."""
    space = get_space(name, size, width, 4, True)
    network = PlainNetwork(space, space.channels(space.largest), seed).eval()
    drawn = torch.Generator().manual_seed(seed)
    for key, tensor in network.state_dict().items():
        if key.endswith(("bias", "running_mean")):
            tensor.normal_(0.2, 0.5, generator=drawn)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=drawn)
    return network


def sparse_network(name: str, size: int, width: float, seed: int) -> tuple[PlainNetwork, m.Masks]:
    """With masks that leave some channels without inputs and some without readers."""
    network, drawn = random_network(name, size, width, seed), torch.Generator().manual_seed(seed)
    masks = {i: torch.rand(w.shape, generator=drawn) < 0.6 for i, w in m.prunable(network).items()}
    for mask in masks.values():
        mask[torch.rand(len(mask), generator=drawn) < 0.25] = False
        mask[:, torch.rand(mask.shape[1], generator=drawn) < 0.25] = False
    m.clear(network, masks)
    return network, masks


def outputs(network: PlainNetwork) -> Tensor:
    size = network.space.image_size
    with torch.inference_mode():
        return network(torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("name", "size", "width"), NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_removal_changes_only_rounding_and_is_done_once(name: str, size: int, width: float, seed: int) -> None:
    network, masks = sparse_network(name, size, width, seed)
    before, first = outputs(network), m.kept(masks)
    gone = dead_channels.remove(network, masks)
    assert gone == first - m.kept(masks) > 0
    torch.testing.assert_close(outputs(network), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for i, weight in m.prunable(network).items():
        assert not weight[~masks[i]].any()
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert dead_channels.remove(network, masks) == 0
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "size", "width"), NETWORKS)
def test_shrinking_changes_only_rounding(name: str, size: int, width: float) -> None:
    network, masks = sparse_network(name, size, width, 0)
    dead_channels.remove(network, masks)
    small, cut = dead_channels.shrunk(network, masks)
    before = outputs(network)
    torch.testing.assert_close(outputs(small), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert sum(small.channels) < sum(network.channels)
    assert m.kept(cut) == m.kept(masks)
    for i, weight in m.prunable(small).items():
        assert cut[i].shape == weight.shape
        assert not weight[~cut[i]].any()


def naive(masks: m.Masks, order: random.Random) -> m.Masks:
    """The specification's rule for fully-connected layers, neurons in any order."""
    left = {i: mask.clone() for i, mask in masks.items()}
    neurons = [(i, j) for i in range(len(left) - 1) for j in range(len(left[str(i)]))]
    before = -1
    while before != m.kept(left):
        before = m.kept(left)
        order.shuffle(neurons)
        for i, j in neurons:
            if not left[str(i + 1)][:, j].any():
                left[str(i)][j] = False
            if not left[str(i)][j].any():
                left[str(i + 1)][:, j] = False
    return left


@pytest.mark.parametrize("seed", range(4))
def test_the_result_is_the_one_fixpoint_whatever_the_order(seed: int) -> None:
    network, masks = sparse_network("lenet_300_100", 8, 0.06, seed)
    expected = [naive(masks, random.Random(order)) for order in range(3)]
    dead_channels.remove(network, masks)
    for other in expected:
        assert all(torch.equal(masks[i], other[i]) for i in masks)
    for i in range(2):
        written, read = masks[str(i)].any(1), masks[str(i + 1)].any(0)
        assert torch.equal(written, read), "no neuron has exactly one side empty"


@pytest.mark.parametrize(("name", "size", "reader"), [("lenet_300_100", 8, 1), ("lenet_5", 16, 2)])
def test_without_folding_the_constant_the_function_changes(name: str, size: int, reader: int) -> None:
    network, careless = (random_network(name, size, 0.3, 0) for _ in range(2))
    masks = m.full(network)
    masks["0"][0] = False
    for bias, same in ((-0.7, True), (0.7, False)):
        network.bias(0).data[0] = bias
        m.clear(network, masks)
        before = outputs(network)
        careless.load_state_dict(network.state_dict())
        careless.weight(reader).data[:, : network.space.units[reader].features] = 0.0
        assert torch.allclose(outputs(careless), before, rtol=1e-4) is same, "activation(-0.7) is 0: nothing to fold"
    dead_channels.remove(network, masks)
    assert not masks[str(reader)][:, 0].any()
    torch.testing.assert_close(outputs(network), before, rtol=1e-4, atol=1e-4)


def test_at_the_border_of_a_padded_convolution_only_zeros_are_removed() -> None:
    for bias, removed in ((0.7, False), (-0.7, True)):
        network = random_network("lenet_5", 8, 0.3, 0)
        masks = m.full(network)
        masks["0"][0] = False
        network.bias(0).data[0] = bias
        m.clear(network, masks)
        before = outputs(network)
        assert (dead_channels.remove(network, masks) > 0) is removed
        assert masks["2"][:, 0].any().item() is not removed
        torch.testing.assert_close(outputs(network), before, rtol=1e-4, atol=1e-4)


def test_a_channel_that_shortcuts_share_lives_as_long_as_anybody_reads_it() -> None:
    space = get_space("resnet20", 8, 0.4, 4, True)
    network = PlainNetwork(space, space.channels(space.largest), 0).eval()
    masks, stage = m.full(network), space.slots[0]
    readers = [i for i, unit in enumerate(space.units) if unit.source == stage and unit.op is not Op.GLOBAL_POOL]
    writers = [i for i, unit in enumerate(space.units) if unit.target == stage]
    assert len(readers) > 2
    for i in readers[:-1]:
        masks[str(i)][:, 1] = False
    dead_channels.remove(network, masks)
    assert all(masks[str(i)][1].any() for i in writers)
    masks[str(readers[-1])][:, 1] = False
    dead_channels.remove(network, masks)
    assert not any(masks[str(i)][1].any() for i in writers)
    assert len(dead_channels.living(space, masks)[0]) == stage.base - 1


def test_what_would_be_left_is_told_without_touching_the_network() -> None:
    network, masks = sparse_network("lenet_5", 16, 0.3, 0)
    state, given = {k: t.clone() for k, t in network.state_dict().items()}, {i: t.clone() for i, t in masks.items()}
    left = dead_channels.without(network, masks)
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert all(torch.equal(masks[i], given[i]) for i in masks)
    dead_channels.remove(network, masks)
    assert all(torch.equal(left[i], masks[i]) for i in masks)
