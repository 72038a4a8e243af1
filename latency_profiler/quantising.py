"""A graph in float32 → one that computes in int8, as runtimes take it: quantise and dequantise around every operator.

Runtimes fuse what stands between two such pairs into one integer kernel. Activations are unsigned with one scale for a
tensor, weights signed with a scale for every output channel, biases have 32 bits. What is measured has random weights
whose activations keep their size from layer to layer (`tensors`), so their range is known without calibration; it is
no way to deploy trained weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Floats = npt.NDArray[np.float32]
REACH = 8.0
"""Activations beyond this are clipped: eight standard deviations of random ones."""
LEVELS, MIDDLE, LARGEST = 255, 128, 127
ACTIVATIONS = {"Relu": REACH, "Clip": 6.0}
PASSING = ("Flatten", "MaxPool", "GlobalAveragePool")
"""Operators whose outputs are numbers of their inputs' range."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A number x is stored as round(x / step) + zero."""

    step: float
    zero: int


SIGNED = Scale(2 * REACH / LEVELS, MIDDLE)


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in int8; inputs and outputs stay float32. Made for what `graphs.build_model` builds."""
    return helper.make_model(
        _Graph(model.graph).graph, opset_imports=model.opset_import, ir_version=model.ir_version,
        producer_name=model.producer_name,
    )  # fmt: skip


class _Graph:
    """A graph while it is rewritten; `scales` are those of tensors that were quantised."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._floats = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        self._constants: dict[str, TensorProto] = {}
        self._operators: list[onnx.NodeProto] = []
        self._scales: dict[str, Scale] = {}
        ends = {one.name for one in graph.output}
        activated = {node.input[0] for node in graph.node if node.op_type in ACTIVATIONS}
        for image in graph.input:
            self._quantise(image.name, image.name, f"{image.name}/int8", SIGNED)
        for node in graph.node:
            self._add(node, node.output[0] in activated, ends)
        self.graph = helper.make_graph(
            self._operators, graph.name, graph.input, graph.output, list(self._constants.values())
        )

    def _add(self, node: onnx.NodeProto, activated: bool, ends: set[str]) -> None:
        """An operator whose inputs are dequantised and whose output is quantised, unless an activation follows."""
        copy, result = onnx.NodeProto(), node.output[0]
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(self._inputs(node))
        self._operators.append(copy)
        if activated:
            return
        copy.output[0] = f"{result}/float"
        end = result if result in ends else f"{result}/int8"
        self._quantise(result, copy.output[0], end, self._scale(node))

    def _inputs(self, node: onnx.NodeProto) -> Iterator[str]:
        first = node.input[0]
        for place, name in enumerate(node.input):
            if name in self._scales:
                yield f"{name}/int8"
            elif name in self._floats and node.op_type in ("Conv", "Gemm"):
                yield self._weights(name, self._scales[first].step, node.input[1] if place == 2 else None)
            else:
                if name in self._floats:
                    self._constants[name] = numpy_helper.from_array(self._floats[name], name)
                yield name

    def _scale(self, node: onnx.NodeProto) -> Scale:
        if node.op_type in PASSING:
            return self._scales[node.input[0]]
        reach = ACTIVATIONS.get(node.op_type)
        return SIGNED if reach is None else Scale(reach / LEVELS, 0)

    def _quantise(self, name: str, tensor: str, end: str, scale: Scale) -> None:
        """Quantise and dequantise a tensor; what reads `name` from now on reads the latter, `end`."""
        step = self._constant(f"{name}/step", np.array(scale.step, dtype=np.float32))
        zero = self._constant(f"{name}/zero", np.array(scale.zero, dtype=np.uint8))
        stored = f"{name}/stored"
        self._operators.append(helper.make_node("QuantizeLinear", [tensor, step, zero], [stored]))
        self._operators.append(helper.make_node("DequantizeLinear", [stored, step, zero], [end]))
        self._scales[name] = scale

    def _weights(self, name: str, step: float, weight: str | None) -> str:
        """Dequantised weights, or a bias in the steps of its input times those of its `weight`."""
        steps = weight_steps(self._floats, weight or name)
        if weight is None:
            rows = steps.reshape(-1, *[1] * (self._floats[name].ndim - 1))
            stored = np.rint(self._floats[name] / rows).astype(np.int8)
        else:
            steps = (steps * step).astype(np.float32)
            stored = np.rint(self._floats[name] / steps).astype(np.int32)
        zeros = self._constant(f"{name}/zeros", np.zeros(len(steps), dtype=stored.dtype))
        inputs = [self._constant(f"{name}/stored", stored), self._constant(f"{name}/steps", steps), zeros]
        self._operators.append(helper.make_node("DequantizeLinear", inputs, [f"{name}/int8"], axis=0))
        return f"{name}/int8"

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        self._constants[name] = numpy_helper.from_array(array, name)
        return name


def weight_steps(weights: Mapping[str, Floats], name: str) -> Floats:
    """Step (c_out,) of every output channel of a weight (c_out, ...)."""
    weight = weights[name]
    largest = np.abs(weight.reshape(len(weight), -1)).max(1)
    steps: Floats = (np.maximum(largest, np.finfo(np.float32).tiny) / LARGEST).astype(np.float32)
    return steps
