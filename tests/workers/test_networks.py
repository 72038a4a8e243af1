from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from latency_profiler.cost import flops, parameters
from latency_profiler.graphs import build_model
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.spaces.registry import SPACES, get_space
from latency_profiler.spaces.space import CHOICES, IMAGE
from latency_profiler.tensors import network_inputs
from tests.profiler.test_graphs import onnx_result
from workers import networks
from workers.networks import LARGE_MAP, ONEDNN_BLOCK, PlainNetwork, activate, convolve, folded_weights, run


@pytest.mark.parametrize("image_size", [32, 96])
@pytest.mark.parametrize("name", SPACES)
def test_analytic_costs_equal_torchs_own_counts(name: str, image_size: int) -> None:
    space = get_space(name, image_size, 0.25, 7, True)
    genes = np.random.default_rng(3).integers(0, CHOICES, (2, len(space.genes))).tolist()
    for encoding in (*map(tuple, genes), space.largest):
        channels = space.channels(encoding)
        network = PlainNetwork(space, channels).to("meta").eval()
        counter = FlopCounterMode(display=False)
        with counter:
            assert network(torch.empty(1, 3, image_size, image_size, device="meta")).shape == (1, 7)
        assert counter.get_total_flops() == 2 * flops(space.layers(channels))
        assert sum(p.numel() for p in network.parameters()) == parameters(space.layers(channels))


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet20", "resnet50", "vgg16"])
def test_what_a_gpu_computes_without_plans_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space = get_space(name, 32, 0.1, 7, True)
    network, images = PlainNetwork(space, space.uniform(0.5)).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    parameters, seen = [one for one in network.parameters() if one.requires_grad], set()
    expected = torch.autograd.grad(network(images).square().sum(), parameters)

    def convolved(layer: Layer, *arguments: Any, varied: bool = False) -> torch.Tensor:
        seen.add((layer.op, layer.kernel, layer.stride))
        return networks.without_plans(layer, *arguments)

    monkeypatch.setattr(networks, "convolve", convolved)
    found = torch.autograd.grad(network(images).square().sum(), parameters)
    assert seen
    assert all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_folded_weights_compute_what_the_network_computes(name: str) -> None:
    space = get_space(name, 16, 0.25, 7, True)
    network = PlainNetwork(space, space.uniform(0.5))
    images = torch.randn(8, 3, 16, 16)
    network(images)  # moves the statistics
    arrays = {key: torch.from_numpy(value) for key, value in folded_weights(network.eval()).items()}

    def compute(i: int, x: torch.Tensor) -> torch.Tensor:
        node = network.nodes[i]
        if node.layer.op in (Op.CONV, Op.DEPTHWISE):
            groups = node.layer.c_in if node.layer.op is Op.DEPTHWISE else 1
            weight, bias = arrays[f"{node.name}.weight"], arrays[f"{node.name}.bias"]
            return nn.functional.conv2d(x, weight, bias, node.layer.stride, node.layer.padding, groups=groups)
        if node.layer.op is Op.LINEAR:
            return nn.functional.linear(x.flatten(1), arrays[f"{node.name}.weight"], arrays[f"{node.name}.bias"])
        return nn.functional.adaptive_avg_pool2d(x, 1)

    with torch.no_grad():
        assert torch.allclose(run(network.nodes, images, compute), network(images), atol=1e-4)


def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    space = get_space("mobilenet_v1", 8, 0.25, 7)
    state = torch.get_rng_state()
    one, same, other = (PlainNetwork(space, space.uniform(1.0), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["convs.0.weight"], other["convs.0.weight"])
    weight = one["convs.0.weight"]
    assert weight.std().item() == pytest.approx((2 / (weight.shape[0] * 9)) ** 0.5, rel=0.2)


def test_depthwise_and_norms_are_not_decayed() -> None:
    space = get_space("mobilenet_v1", 8, 0.25, 7)
    network = PlainNetwork(space, space.uniform(1.0))
    decayed, others = network.decayed()
    assert sum(p.numel() for p in others) == sum(
        layer.c_out * (9 if layer.op is Op.DEPTHWISE else 0) + 2 * layer.c_out
        for layer in space.layers(space.uniform(1.0)) if layer.norm
    )  # fmt: skip
    assert sum(p.numel() for p in (*decayed, *others)) == parameters(space.layers(space.uniform(1.0)))


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet20"])
def test_folding_batch_norms_changes_only_rounding(name: str) -> None:
    space = get_space(name, 16, 0.25, 4, True)
    network = PlainNetwork(space, space.uniform(0.5), 3)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network.train()
    network(images)
    network.eval()
    with torch.inference_mode():
        plain, folded = network(images), network.folded()(images)
    assert not torch.equal(plain, network.train()(images))
    assert torch.allclose(plain, folded, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet_5"])
def test_a_lenet_reads_the_mean_over_colours_and_is_exported_with_its_biases(name: str) -> None:
    space = get_space(name, 16, 0.2, 4, True)
    network = PlainNetwork(space, space.uniform(0.5), 3).eval()
    for i, node in enumerate(network.nodes):
        if node.layer.op in (Op.CONV, Op.LINEAR):
            network.bias(i).data.normal_(generator=torch.Generator().manual_seed(i))
    assert not network.norms
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    grey = images.mean(1, keepdim=True)
    arrays = folded_weights(network)
    result = onnx_result(build_model(network.nodes, weights=arrays, batch=5), {IMAGE: entering(network, grey)})
    with torch.inference_mode():
        assert torch.equal(network(images), network(grey))
        np.testing.assert_allclose(result, network(images).numpy(), rtol=1e-4, atol=1e-5)


def entering(network: PlainNetwork, grey: torch.Tensor) -> np.ndarray:
    """As the graph reads it: a linear first layer takes the pixels of an image in a row."""
    (shape,) = network_inputs(network.nodes, len(grey)).values()
    return grey.reshape(shape).numpy()


def test_hidden_linear_layers_begin_with_hes_deviation_and_classifiers_with_a_small_one() -> None:
    space = get_space("lenet_300_100", 28, 1.0, 10)
    network = PlainNetwork(space, space.channels(space.largest), 0)
    deviations = [network.weight(i).std().item() for i in range(3)]
    assert deviations == pytest.approx([(2 / 784) ** 0.5, (2 / 300) ** 0.5, 0.01], rel=0.05)


def test_relu6_is_hardtanh_but_keeps_no_copy_of_its_input() -> None:
    given = (4 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 3).requires_grad_()
    given.data[0, 0, 0] = torch.tensor([0.0, 6.0, -0.0, torch.nan])
    weights = torch.arange(96.0).view(2, 3, 4, 4)
    found = []
    for compute in (lambda x: functional.hardtanh_(x, 0.0, 6.0), lambda x: activate(x, Activation.RELU6)):
        y = compute(1 * given)
        [gradient] = torch.autograd.grad((y * weights).nan_to_num().sum(), given)
        found.append((y, gradient))
    assert torch.equal(found[0][0].nan_to_num(-1), found[1][0].nan_to_num(-1))
    assert torch.equal(found[0][1], found[1][1])
    x = 1 * given
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        activate(x, Activation.RELU6)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


@pytest.mark.parametrize(("name", "without"), [
    ("mobilenet_v1", {"depthwise"}), ("mobilenet_v2", {"depthwise", "project"}), ("resnet50", {"shortcut"}),
    ("resnet20", set()),
])  # fmt: skip
def test_layers_are_decayed_as_in_the_authors_code(name: str, without: set[str]) -> None:
    space = get_space(name, 32, 0.25, 10, False)
    network = PlainNetwork(space, space.channels(space.largest))
    others = set(map(id, network.decayed()[1]))
    undecayed = {
        network.nodes[int(i)].name.rpartition(".")[2] for i in network.convs if id(network.weight(int(i))) in others
    }
    assert undecayed == without
    assert not any(id(linear.weight) in others for linear in network.linears.values())


def test_a_pointwise_convolution_of_few_channels_with_a_stride_is_a_matrix_product_on_large_maps_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN's gradient of such weights writes beyond a buffer, and may end the process."""
    layer = Layer(Op.CONV, 7, 14, 2 * LARGE_MAP, stride=2)
    x = torch.randn(2, 7, 2 * LARGE_MAP, 2 * LARGE_MAP).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(14, 7, 1, 1)
    wanted = functional.conv2d(x, weight, stride=2)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(functional, "conv2d", refuse)
    torch.testing.assert_close(convolve(layer, x, weight), wanted)
    with pytest.raises(AssertionError):
        convolve(replace(layer, c_in=ONEDNN_BLOCK), x, weight)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)])
def test_a_depthwise_convolution_of_a_tiny_map_is_the_convolution_and_its_gradients(
    size: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(Op.DEPTHWISE, 5, 5, size, kernel=3, stride=stride, padding=1)
    x, weight, bias = torch.randn(4, 5, size, size), torch.randn(5, 1, 3, 3), torch.randn(5)
    inputs = [one.double().requires_grad_() for one in (x, weight, bias)]
    wanted = functional.conv2d(*inputs, stride, 1, 1, 5)
    direction = torch.randn_like(wanted)
    of_wanted = torch.autograd.grad(wanted, inputs, direction)
    with monkeypatch.context() as patched:
        patched.setattr(functional, "conv2d", None)
        patched.setattr(networks, "TINY_MAP", 4)
        found = convolve(layer, *inputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, direction), of_wanted)


def test_only_training_computes_tiny_maps_by_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass alone is faster by oneDNN, and products in half precision would be added up in it."""
    layer = Layer(Op.DEPTHWISE, 5, 5, 2, kernel=3, padding=1)
    x, weight = torch.randn(4, 5, 2, 2), torch.randn(5, 1, 3, 3, requires_grad=True)
    monkeypatch.setattr(networks, "_by_pairs", None)
    convolve(layer, x.bfloat16(), weight.bfloat16())
    with torch.inference_mode():
        convolve(layer, x, weight)
    with pytest.raises(TypeError):
        convolve(layer, x, weight)
