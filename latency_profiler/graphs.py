"""Nodes → ONNX graph, with the runtime's view of a layer: batch norm folded, activation and addition fused behind.

Graphs are written directly: a layer takes about a millisecond, where an exporter that traces a torch module takes a
second. The same function builds what is measured (random weights) and what is delivered (trained, folded weights).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latency_profiler.errors import InvalidInput
from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.spaces.space import IMAGE
from latency_profiler.tensors import (
    SHORTCUT,
    Array,
    Shape,
    network_inputs,
    output_shape,
    random_weights,
    single,
    weight_shapes,
)

OPSET = 17
IR_VERSION = 8
"""Older than what is newest on purpose: devices run runtimes that are years old."""
INPUT_NAMES = {IMAGE: "image", SHORTCUT: "shortcut"}
OUTPUT_NAME = "output"
Kind = tuple[str, list[str], dict[str, Any]]
"""An operator: what it is called, its inputs after the first, its attributes."""


def build_model(
    nodes: Sequence[Node], *, weights: Mapping[str, Array] | None = None, batch: int = 1, seed: int = 0
) -> onnx.ModelProto:
    """The graph of a network from `image` (n, c, s, s), or (n, c * s * s) if its first layer is linear, to `output`.

    Args:
        nodes: the network; its last node is the output.
        weights: folded weights and biases as named and shaped by `tensors.weight_shapes`; None draws random ones.
        batch: images per run, fixed in the graph.
        seed: of the random weights.

    Raises:
        InvalidInput: a weight is missing or has another shape than its layer.
    """
    if weights is None:
        weights = random_weights(nodes, seed)
    _check(nodes, weights)
    graph = helper.make_graph(
        _operators(nodes),
        "secateurs",
        [_value(INPUT_NAMES[index], shape) for index, shape in sorted(network_inputs(nodes, batch).items())],
        [_value(OUTPUT_NAME, output_shape(nodes[-1].layer, batch))],
        _initializers(nodes, weights),
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="secateurs")


def layer_model(layer: Layer, batch: int = 1, seed: int = 0) -> onnx.ModelProto:
    """The graph of one layer with random weights; a residual layer takes a second input, `shortcut`."""
    return build_model(single(layer), batch=batch, seed=seed)


def empty_model() -> onnx.ModelProto:
    """The smallest graph there is: what a run costs before any layer is computed."""
    shape = (1, 1)
    operator = helper.make_node("Identity", [INPUT_NAMES[IMAGE]], [OUTPUT_NAME])
    graph = helper.make_graph([operator], "empty", [_value(INPUT_NAMES[IMAGE], shape)], [_value(OUTPUT_NAME, shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _operators(nodes: Sequence[Node]) -> list[onnx.NodeProto]:
    """The chains of all nodes. Node i's result is the tensor `<name>`, the last one's is `output`."""
    results = INPUT_NAMES | {index: node.name for index, node in enumerate(nodes)}
    results[len(nodes) - 1] = OUTPUT_NAME
    operators = []
    for index, node in enumerate(nodes):
        flat = node.input < 0 or nodes[node.input].layer.op is Op.LINEAR
        operators += _chain(node, results, results[index], flat)
    return operators


def _chain(node: Node, results: Mapping[int, str], result: str, flat: bool) -> list[onnx.NodeProto]:
    """A node's operator, with flattening before it and addition and activation behind it.

    `flat` says that the node's input is a vector per image already.
    """
    kinds: list[Kind] = []
    if node.layer.op is Op.LINEAR and not flat:
        kinds.append(("Flatten", [], {}))
    kinds.append(_kernel(node))
    if node.shortcut is not None:
        kinds.append(("Add", [results[node.shortcut]], {}))
    if node.layer.activation is Activation.RELU:
        kinds.append(("Relu", [], {}))
    elif node.layer.activation is Activation.RELU6:
        kinds.append(("Clip", ["zero", "six"], {}))

    operators, tensor = [], results[node.input]
    for place, (kind, others, attributes) in enumerate(kinds, start=1):
        target = result if place == len(kinds) else f"{node.name}/{kind}"
        operators.append(helper.make_node(kind, [tensor, *others], [target], f"{node.name}/{kind}", **attributes))
        tensor = target
    return operators


def _kernel(node: Node) -> Kind:
    layer, weights = node.layer, list(weight_shapes(node))
    window = {
        "kernel_shape": [layer.kernel] * 2,
        "strides": [layer.stride] * 2,
        "pads": [layer.padding] * 4,
    }
    match layer.op:
        case Op.CONV | Op.DEPTHWISE:
            group = layer.c_in if layer.op is Op.DEPTHWISE else 1
            return "Conv", weights, {**window, "group": group}
        case Op.MAX_POOL:
            return "MaxPool", [], dict(window)
        case Op.GLOBAL_POOL:
            return "GlobalAveragePool", [], {}
        case Op.LINEAR:
            return "Gemm", weights, {"transB": 1}


def _initializers(nodes: Iterable[Node], weights: Mapping[str, Array]) -> list[TensorProto]:
    constants = {name: weights[name] for node in nodes for name in weight_shapes(node)}
    if any(node.layer.activation is Activation.RELU6 for node in nodes):
        constants |= {"zero": np.array(0, dtype=np.float32), "six": np.array(6, dtype=np.float32)}
    return [numpy_helper.from_array(np.asarray(array, dtype=np.float32), name) for name, array in constants.items()]


def _check(nodes: Iterable[Node], weights: Mapping[str, Array]) -> None:
    for node in nodes:
        for name, shape in weight_shapes(node).items():
            if name not in weights:
                raise InvalidInput(f"the weight {name!r} is missing; {node.layer.key} needs one of shape {shape}")
            if weights[name].shape != shape:
                raise InvalidInput(
                    f"the weight {name!r} has shape {weights[name].shape}; {node.layer.key} needs {shape}"
                )


def _value(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
