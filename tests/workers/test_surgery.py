import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latency_profiler.cost import flops, parameters
from latency_profiler.errors import InvalidChannels
from latency_profiler.layers import Op
from latency_profiler.spaces.registry import get_space
from workers.networks import PlainNetwork, run
from workers.pruners.gates import gated
from workers.pruners.surgery import shrink

FAMILIES = [
    ("mobilenet_v1", 16, 0.25), ("mobilenet_v2", 16, 0.25), ("resnet20", 8, 0.5), ("resnet50", 16, 0.125),
    ("resnet50", 96, 0.125), ("vgg16", 32, 0.125), ("vgg16", 96, 0.05),
]  # fmt: skip


def trained(name: str, image_size: int, width: float) -> PlainNetwork:
    """A network in float64 whose batch norms are no identities, in eval mode."""
    space = get_space(name, image_size, width, 5, True)
    network = PlainNetwork(space, space.uniform(1.0), 1).double()
    random = torch.Generator().manual_seed(0)
    for norm in network.norms.values():
        assert isinstance(norm, nn.BatchNorm2d)
        for tensor, low, high in (
            (norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.3, 0.3), (norm.running_var, 0.5, 2),
        ):  # fmt: skip
            tensor.data.uniform_(low, high, generator=random)
    return network.eval()


def some(network: PlainNetwork, seed: int) -> dict[int, Tensor]:
    """A random part of the channels of every slot."""
    random = np.random.default_rng(seed)
    return {
        i: torch.from_numpy(np.sort(random.permutation(width)[: random.integers(1, width + 1)]))
        for i, width in enumerate(network.channels)
    }


def masks(network: PlainNetwork, kept: dict[int, Tensor]) -> dict[int, Tensor]:
    zeros = {i: torch.zeros(1, network.channels[i], dtype=torch.float64) for i in kept}
    return {i: mask.index_fill(1, kept[i], 1.0) for i, mask in zeros.items()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removal_equals_the_gates_of_activations(family: tuple[str, int, float]) -> None:
    network = trained(*family)
    images = torch.randn(3, 3, family[1], family[1], dtype=torch.float64)
    for seed in range(2):
        kept = some(network, seed)
        smaller = shrink(network, kept)
        masked = run(network.nodes, images, gated(network, masks(network, kept), "activation"))
        assert torch.allclose(smaller(images), masked, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(smaller(images), network(images), rtol=1e-3)
        assert smaller.channels == tuple(len(kept[i]) for i in range(len(network.channels)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_left_costs_what_the_analytic_counter_says(family: tuple[str, int, float]) -> None:
    network = trained(*family)
    smaller = shrink(network, some(network, 3))
    layers = network.space.layers(smaller.channels)
    with FlopCounterMode(display=False) as counter:
        smaller(torch.zeros(1, 3, family[1], family[1], dtype=torch.float64))
    assert counter.get_total_flops() == 2 * flops(layers)
    assert sum(p.numel() for p in smaller.parameters()) == parameters(layers)


@torch.no_grad()
def test_two_cuts_are_one() -> None:
    network = trained("mobilenet_v2", 16, 0.25)
    first = some(network, 0)
    between = shrink(network, first)
    second = some(between, 1)
    once = shrink(network, {i: first[i][second[i]] for i in first}).state_dict()
    assert all(torch.equal(value, once[key]) for key, value in shrink(between, second).state_dict().items())


def test_what_is_not_named_stays_and_nothing_is_shared() -> None:
    network = trained("resnet20", 8, 0.5).train()
    same = shrink(network, {})
    assert same.training
    assert same.channels == network.channels
    ours = same.state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(value, ours[key])
        assert value.data_ptr() != ours[key].data_ptr()


@pytest.mark.parametrize("wrong", [[], [1, 0], [0, 0], [-1, 2], [0, 8]])
def test_indices_must_be_channels_in_order(wrong: list[int]) -> None:
    network = trained("resnet20", 8, 0.5)
    with pytest.raises(InvalidChannels, match="stage1"):
        shrink(network, {0: torch.tensor(wrong, dtype=torch.int64)})


@torch.no_grad()
def test_centred_gates_are_removal_with_batch_norms_that_take_the_mean_off() -> None:
    """Exactly where 1x1 convolutions read: their norms' means lose what the removed channels' means gave."""
    network = trained("mobilenet_v1", 16, 0.25)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    slot = 5
    kept = {slot: some(network, 1)[slot]}
    gone = torch.tensor([i for i in range(network.channels[slot]) if i not in kept[slot]])
    reader = next(i for i, u in enumerate(network.space.units) if u.source.index == slot and u.op is Op.CONV)
    read: list[Tensor] = []
    run(network.nodes, images, lambda i, x: (read.append(x) if i == reader else None, network.compute(i, x))[1])
    means = network.weight(reader)[:, gone, 0, 0] @ read[0].mean((0, 2, 3))[gone]
    smaller = shrink(network, kept)
    smaller.norms[str(reader)].running_mean -= means
    masked = run(network.nodes, images, gated(network, masks(network, kept), "centred"))
    assert len(gone)
    assert torch.allclose(smaller(images), masked, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_gates_of_weights_leave_the_constant_of_the_batch_norm() -> None:
    """Equal to setting the channel's rows of dense weights to zero."""
    network = trained("mobilenet_v1", 16, 0.25)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    kept = some(network, 0)
    gates = masks(network, kept)
    weight = run(network.nodes, images, gated(network, gates, "weight"))
    removed = shrink(network, kept)(images)
    for i, unit in enumerate(network.space.units):
        if unit.op is Op.CONV and unit.target.index is not None:
            network.weight(i).mul_(gates[unit.target.index][0][:, None, None, None])
    assert torch.allclose(weight, network(images), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weight, removed, rtol=1e-2)
