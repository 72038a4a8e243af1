import numpy as np
import pytest
import torch
from torch import nn

from latency_profiler.errors import NoPruningNet
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import CHOICES, Space, scale, width_of
from workers.networks import PlainNetwork
from workers.pruning_net import SHARED, ChoiceNorm, Generator, PruningNet

SMALL = {"mobilenet_v1": 0.25, "mobilenet_v2": 0.25, "resnet20": 1.0, "resnet50": 0.1, "vgg16": 0.125}


def space_of(name: str, free_last: bool = True) -> Space:
    return get_space(name, 16, SMALL[name], 5, free_last)


def encodings(space: Space, count: int) -> list[tuple[int, ...]]:
    drawn = np.random.default_rng(1).integers(0, CHOICES, (count, len(space.genes)))
    return [space.largest, space.smallest, *(tuple(genes) for genes in drawn.tolist())]


@pytest.mark.parametrize("hidden", [None, SHARED])
@pytest.mark.parametrize("free_last", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_eval_equals_the_cropped_plain_network_bitwise(name: str, free_last: bool, hidden: int | None) -> None:
    space = space_of(name, free_last)
    net = PruningNet(space, hidden, normalised=hidden == SHARED)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for encoding in encodings(space, 3):
        net.train()
        net(images * 3 + 1, encoding)  # so that the statistics are not those of a new network
        net.eval()
        plain = net.crop(encoding)
        with torch.no_grad():
            assert torch.equal(net(images, encoding), plain(images))
        assert plain.channels == space.channels(encoding)


@pytest.mark.parametrize("hidden", [None, SHARED])
@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet20", "vgg16"])
def test_gradients_are_zero_outside_the_crop_and_other_norms_keep_still(name: str, hidden: int | None) -> None:
    space = space_of(name)
    net = PruningNet(space, hidden)
    encoding = encodings(space, 1)[2]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net(torch.randn(4, 3, 16, 16), encoding).sum().backward()
    for unit_name, crop in net.crops(encoding).items():
        block = net.generators[unit_name]
        c_out, c_in = crop.bias.shape[:2]
        grad = block.bias.grad if hidden == SHARED else block.weight.grad
        assert grad[:c_out, :c_in].abs().sum() > 0
        grad[:c_out, :c_in] = 0
        assert grad.abs().sum() == 0
        unit = space.units[int(unit_name)]
        chosen = encoding[unit.norm_slot.index]
        for tensor in ("mean", "variance"):
            now, then = getattr(net.norms[unit_name], tensor), before[f"norms.{unit_name}.{tensor}"]
            moved = (now != then).any(dim=1)
            assert moved.nonzero().flatten().tolist() == [chosen]
            assert torch.equal(now[chosen, crop.bias.shape[0] :], then[chosen, crop.bias.shape[0] :])


def test_shared_weights_are_the_leading_block_of_one_plain_weight() -> None:
    space = space_of("mobilenet_v2")
    net = PruningNet(space, SHARED, seed=3)
    largest, smaller = net.crop(space.largest), net.crop(encodings(space, 1)[2])
    for name, conv in largest.convs.items():
        block, crop = net.generators[name], smaller.convs[name].weight
        assert torch.equal(conv.weight.flatten(2), block.bias)
        assert torch.equal(crop, conv.weight[: crop.shape[0], : crop.shape[1]])
        bound = conv.weight[0].numel() ** -0.5
        assert 0.5 * bound < conv.weight.abs().max() <= bound
        assert sum(p.numel() for p in block.parameters()) == conv.weight.numel()
    assert not torch.equal(PruningNet(space, SHARED, seed=4).generators["0"].bias, net.generators["0"].bias)


def test_a_generated_weight_is_the_leading_part_of_two_linear_layers() -> None:
    """Independently: the whole second layer as torch's Linear, reshaped and cropped afterwards, as the authors do."""
    space = space_of("mobilenet_v2")
    net = PruningNet(space)
    encoding = encodings(space, 1)[2]
    i = next(i for i, unit in enumerate(space.units) if unit.name == "bottleneck3.project")
    unit, block = space.units[i], net.generators[str(i)]
    scales = torch.tensor([scale(encoding[slot.index]) for slot in unit.encoding])
    assert [slot.name for slot in unit.encoding] == ["middle3", "stage2", "stage3"]
    first, second = nn.Linear(3, 64), nn.Linear(64, block.bias.numel())
    first.load_state_dict({"weight": block.first_weight.data, "bias": block.first_bias.data})
    second.load_state_dict({"weight": block.weight.data.flatten(0, 2), "bias": block.bias.data.flatten()})
    whole = second(torch.relu(first(scales))).view(unit.target.base, unit.source.base, 1, 1)
    layer = space.layers(space.channels(encoding))[i]
    assert torch.allclose(net.generate(encoding)[str(i)], whole[: layer.c_out, : layer.c_in], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "millions", "norms", "affine"), [("mobilenet_v1", 106.3, 837, 434), ("mobilenet_v2", 242.0, 1643, 0)]
)
def test_sizes_of_the_published_networks(name: str, millions: float, norms: int, affine: int) -> None:
    """Parameters and batch norms of the authors' PruningNets for ImageNet (hidden layers 32 and 64)."""
    with torch.device("meta"):
        net = PruningNet(get_space(name))
    generators = [module for module in net.modules() if isinstance(module, Generator)]
    choice_norms = [module for module in net.modules() if isinstance(module, ChoiceNorm)]
    size = sum(p.numel() for part in (*generators, net.classifiers) for p in part.parameters())
    affines = [norm for norm in choice_norms if norm.weight is not None]
    size += sum(2 * width_of(norm.mean.shape[1], i) for norm in affines for i in range(31))
    assert round(size / 1e6, 1) == millions
    # One norm of ours has no choice (the last block's output is fixed); the authors store all 31 there as well.
    assert len(choice_norms) * 31 == norms
    assert 31 * len(affines) == affine


def test_crop_is_independent_of_the_net() -> None:
    space = space_of("resnet20")
    net = PruningNet(space)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plain = net.crop(space.largest)
    assert isinstance(plain, PlainNetwork)
    plain.train()
    plain(torch.randn(8, 3, 16, 16)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_spaces_without_batch_norm_are_refused() -> None:
    with pytest.raises(NoPruningNet, match="lenet_5 has layers without batch norm"):
        PruningNet(get_space("lenet_5", 8))
