"""What runtimes execute, against a plain numpy computation of the same nodes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from latency_profiler.errors import InvalidInput
from latency_profiler.graphs import INPUT_NAMES, build_model, layer_model
from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.runtimes.torch import network
from latency_profiler.spaces.registry import get_space
from latency_profiler.tensors import Array, network_inputs, random_inputs, random_weights, single, weight_shapes

STRUCTURES = [
    ("mobilenet_v1", 8), ("mobilenet_v2", 16), ("resnet20", 16), ("resnet50", 8), ("resnet50", 72), ("vgg16", 8),
    ("vgg16", 32), ("lenet_300_100", 8), ("lenet_5", 8), ("lenet_5", 28),
]  # fmt: skip


def reference(nodes: Sequence[Node], weights: Mapping[str, Array], inputs: Mapping[int, Array]) -> Array:
    """Every layer written out with windows and sums, in float64."""
    results = {index: array.astype(np.float64) for index, array in inputs.items()}
    for index, node in enumerate(nodes):
        y = operator(node, results[node.input], weights)
        if node.shortcut is not None:
            y = y + results[node.shortcut]
        if node.layer.activation is not Activation.NONE:
            y = np.maximum(y, 0)
        if node.layer.activation is Activation.RELU6:
            y = np.minimum(y, 6)
        results[index] = y
    return results[len(nodes) - 1]


def operator(node: Node, x: Array, weights: Mapping[str, Array]) -> Array:
    layer = node.layer
    if layer.op is Op.LINEAR:
        return x.reshape(len(x), -1) @ weights[f"{node.name}.weight"].T + weights[f"{node.name}.bias"]
    if layer.op is Op.GLOBAL_POOL:
        return x.mean((2, 3), keepdims=True)
    fill = -np.inf if layer.op is Op.MAX_POOL else 0.0
    padded = np.pad(x, ((0, 0), (0, 0), (layer.padding,) * 2, (layer.padding,) * 2), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (layer.kernel, layer.kernel), (2, 3))
    windows = windows[:, :, :: layer.stride, :: layer.stride]  # (n, c, s, s, k, k)
    if layer.op is Op.MAX_POOL:
        return windows.max((4, 5))
    terms = "nchwij,cij->nchw" if layer.op is Op.DEPTHWISE else "nchwij,ocij->nohw"
    weight = weights[f"{node.name}.weight"]
    weight = weight[:, 0] if layer.op is Op.DEPTHWISE else weight
    return np.einsum(terms, windows, weight, optimize=True) + weights[f"{node.name}.bias"][:, None, None]


def onnx_result(model: onnx.ModelProto, inputs: Mapping[int, Array]) -> Array:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {INPUT_NAMES[index]: array for index, array in inputs.items()})
    return result


def trained(nodes: Sequence[Node]) -> dict[str, Array]:
    """Weights with biases that are not zero."""
    rng = np.random.default_rng(7)
    weights = random_weights(nodes, seed=1)
    return {name: rng.normal(0, 0.3, w.shape).astype(np.float32) if w.ndim == 1 else w for name, w in weights.items()}


@pytest.mark.parametrize(("name", "size"), STRUCTURES)
def test_graph_and_eager_network_compute_what_the_nodes_say(name: str, size: int) -> None:
    space = get_space(name, size, 0.1, 10, free_last=True)
    genes = np.random.default_rng(size).integers(0, 31, len(space.genes)).tolist()
    nodes = space.nodes(space.channels(genes))
    weights, inputs = trained(nodes), random_inputs(nodes, 2, seed=3)
    expected = reference(nodes, weights, inputs)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(np.abs(expected).max())}
    np.testing.assert_allclose(onnx_result(build_model(nodes, weights=weights, batch=2), inputs), expected, **close)

    torch.set_num_threads(1)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    eager = network(nodes, tensors, {index: torch.from_numpy(array) for index, array in inputs.items()})
    np.testing.assert_allclose(eager().numpy(), expected, **close)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_alone_reads_its_shortcut_from_a_second_input(activation: Activation, residual: bool) -> None:
    layer = Layer(Op.CONV, 5, 7, 9, 3, 2, 1, activation, norm=True, residual=residual)
    nodes = single(layer)
    inputs = random_inputs(nodes, 1)
    assert set(network_inputs(nodes, 1).values()) == ({(1, 5, 9, 9), (1, 7, 5, 5)} if residual else {(1, 5, 9, 9)})
    result = onnx_result(layer_model(layer), inputs)
    np.testing.assert_allclose(result, reference(nodes, random_weights(nodes), inputs), rtol=1e-4, atol=1e-5)


def optimized(model: onnx.ModelProto, folder: Path) -> set[str]:
    """Kinds of operators that the runtime executes, without those that move its blocked layout."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node} - {
        "ReorderInput",
        "ReorderOutput",
    }


@pytest.mark.parametrize("activation", [Activation.RELU, Activation.RELU6])
@pytest.mark.parametrize("op", [Op.CONV, Op.DEPTHWISE])
@pytest.mark.parametrize("channels", [7, 16])
def test_runtime_executes_a_layer_as_one_kernel(op: Op, channels: int, activation: Activation, tmp_path: Path) -> None:
    layer = Layer(op, channels, channels, 8, 3, 1, 1, activation, norm=True)
    kinds = optimized(layer_model(layer), tmp_path)
    assert len(kinds) == 1
    assert kinds <= {"Conv", "FusedConv"}


def test_runtime_fuses_additions_inside_a_network(tmp_path: Path) -> None:
    space = get_space("resnet20", 32, 1.0, 10)
    kinds = optimized(build_model(space.nodes(space.channels(space.largest))), tmp_path)
    assert kinds <= {"Conv", "FusedConv", "GlobalAveragePool", "Flatten", "Gemm"}


def test_random_weights_keep_activations_in_range() -> None:
    """Neither denormal numbers, which are slow, nor infinities, 56 layers deep."""
    space = get_space("resnet56", 16, 0.5, 10)
    nodes = space.nodes(space.channels(space.largest))
    result = onnx_result(build_model(nodes), random_inputs(nodes, 1))
    assert np.isfinite(result).all()
    assert 1e-3 < np.abs(result).max() < 1e15


def test_same_seed_same_graph() -> None:
    nodes = single(Layer(Op.CONV, 3, 4, 8, 3))
    assert build_model(nodes, seed=1) == build_model(nodes, seed=1)
    assert build_model(nodes, seed=1) != build_model(nodes, seed=2)


def test_wrong_weights_are_named() -> None:
    nodes = single(Layer(Op.CONV, 3, 4, 8, 3))
    weights = random_weights(nodes)
    with pytest.raises(InvalidInput, match=r"'layer\.bias' is missing"):
        build_model(nodes, weights={"layer.weight": weights["layer.weight"]})
    with pytest.raises(InvalidInput, match=r"has shape \(4, 3, 3\); .* needs \(4, 3, 3, 3\)"):
        build_model(nodes, weights={**weights, "layer.weight": weights["layer.weight"][..., 0]})


def test_weights_hold_the_counted_parameters() -> None:
    """A folded layer has its weights and one bias per channel; batch norm's two numbers per channel become one."""
    layer = Layer(Op.DEPTHWISE, 6, 6, 8, 3, 1, 1, norm=True)
    assert weight_shapes(single(layer)[0]) == {"layer.weight": (6, 1, 3, 3), "layer.bias": (6,)}
