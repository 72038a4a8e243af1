"""ncnn: a small runtime for phones and boards. Its models are written directly: a text, and all weights in a row.

ncnn has no batches: the images of one are computed one after the other, as everybody does who deploys it.
Numbers of parameters (`0=`, `9=`, …) are explained in ncnn's docs/developer-guide/operators.md.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import ncnn
import numpy as np

from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.runtimes.base import Loaded, Settings
from latency_profiler.spaces.space import IMAGE
from latency_profiler.tensors import (
    SHORTCUT,
    Array,
    Shape,
    network_inputs,
    output_shape,
    random_inputs,
    random_weights,
    single,
    weight_shapes,
)

MAGIC = "7767517"
"""First line of a model in text form."""
OUTPUT = "output"
FLOAT32 = bytes(4)
"""In front of weights: they are stored in float32."""
BLOBS = {IMAGE: "image", SHORTCUT: "shortcut"}
FUSED = {Activation.NONE: "", Activation.RELU: " 9=1", Activation.RELU6: " 9=3 -23310=2,0.0,6.0"}
"""Activations as parameters of the layer before them."""
ACTIVATIONS = {Activation.NONE: [], Activation.RELU: [("ReLU", "")], Activation.RELU6: [("Clip", "0=0.0 1=6.0")]}
"""Activations as layers."""


class Row(NamedTuple):
    """One of ncnn's layers: what it reads, what it writes, its parameters."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    parameters: str = ""


class Ncnn:
    """Nets on `settings.threads` threads of the CPU, with packed layouts, Winograd and fused activations."""

    name = "ncnn"
    version: str = ncnn.__version__
    framed = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def dtypes(self) -> tuple[str, ...]:
        """float16 where the processor has it: elsewhere ncnn would silently convolve in float32."""
        return ("float32", "bfloat16", "float16") if _convolves_in("float16") else ("float32", "bfloat16")

    def load_layer(self, layer: Layer) -> Loaded:
        """One layer as a net of its own; an addition, and an activation behind it, are kernels of their own."""
        return self.load_network(single(layer))

    def load_network(self, nodes: Sequence[Node]) -> Loaded:
        """A whole network."""
        weights = random_weights(nodes)
        net = self._net(_text(list(_layers(nodes))), b"".join(_binary(node, weights) for node in nodes))
        batch = random_inputs(nodes, self.settings.batch)
        images = [
            {BLOBS[index]: ncnn.Mat(array[i]).clone() for index, array in batch.items()}
            for i in range(self.settings.batch)
        ]
        shape = output_shape(nodes[-1].layer, self.settings.batch)
        return _ready(net, images, OUTPUT, shape)

    def empty_run(self) -> Loaded:
        """A net that gives its input back."""
        net = self._net(_text([Row("Input", "image", (), "image")]), b"")
        images = [{"image": ncnn.Mat(np.ones(1, dtype=np.float32)).clone()}] * self.settings.batch
        return _ready(net, images, "image", (self.settings.batch, 1))

    def _net(self, text: str, weights: bytes) -> ncnn.Net:
        net, half, brain = ncnn.Net(), self.settings.dtype == "float16", self.settings.dtype == "bfloat16"
        net.opt.num_threads = self.settings.threads
        net.opt.use_vulkan_compute = False
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = half
        net.opt.use_bf16_packed = net.opt.use_bf16_storage = brain
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights"
            file.write_bytes(weights)
            if net.load_param_mem(text) != 0 or net.load_model(str(file)) != 0:
                raise OSError("ncnn cannot load the model")
        return net


@cache
def _convolves_in(dtype: str) -> bool:
    """Whether a convolution gives other numbers than in float32."""
    layer = Layer(Op.CONV, 16, 16, 8, 3, 1, 1)
    exact, less = (Ncnn(Settings(dtype=one)).load_layer(layer).output() for one in ("float32", dtype))
    return not np.array_equal(exact, less)


def _ready(net: ncnn.Net, images: Sequence[Mapping[str, ncnn.Mat]], output: str, shape: Shape) -> Loaded:
    def run() -> list[ncnn.Mat]:
        return _run(net, images, output)

    return Loaded(run, output=lambda: np.stack([np.array(result) for result in run()]).reshape(shape))


def _run(net: ncnn.Net, images: Sequence[Mapping[str, ncnn.Mat]], output: str) -> list[ncnn.Mat]:
    results = []
    for blobs in images:
        extractor = net.create_extractor()
        for name, blob in blobs.items():
            extractor.input(name, blob)
        status, result = extractor.extract(output)
        if status != 0:
            raise OSError(f"ncnn cannot compute: {status}")
        results.append(result)
    return results


def _layers(nodes: Sequence[Node]) -> Iterator[Row]:
    """A network as ncnn's layers: inputs first, then every node's operator, addition and activation."""
    results = BLOBS | {index: node.name for index, node in enumerate(nodes)}
    results[len(nodes) - 1] = OUTPUT
    for index in network_inputs(nodes, 1):
        yield Row("Input", BLOBS[index], (), BLOBS[index])
    for index, node in enumerate(nodes):
        yield from _chain(node, results, results[index])


def _chain(node: Node, results: Mapping[int, str], result: str) -> Iterator[Row]:
    """A node's operator with the activation fused; behind an addition it is a layer of its own."""
    layer = node.layer
    kind, parameters = _kernel(layer)
    rest: list[tuple[str, tuple[str, ...], str]] = []
    if node.shortcut is not None:
        rest.append(("BinaryOp", (results[node.shortcut],), "0=0"))
    if rest or not weight_shapes(node):
        rest += [(name, (), numbers) for name, numbers in ACTIVATIONS[layer.activation]]
    else:
        parameters += FUSED[layer.activation]
    steps, tensor = [(kind, (), parameters), *rest], results[node.input]
    for place, (step, others, numbers) in enumerate(steps, start=1):
        target = result if place == len(steps) else f"{node.name}/{step}"
        yield Row(step, target, (tensor, *others), target, numbers)
        tensor = target


def _kernel(layer: Layer) -> tuple[str, str]:
    """Kind and parameters of a layer's operator."""
    window = f"1={layer.kernel} 3={layer.stride} 4={layer.padding} 5=1"
    match layer.op:
        case Op.CONV:
            return "Convolution", f"0={layer.c_out} {window} 6={layer.c_out * layer.c_in * layer.kernel**2}"
        case Op.DEPTHWISE:
            return "ConvolutionDepthWise", f"0={layer.c_out} {window} 6={layer.c_out * layer.kernel**2} 7={layer.c_in}"
        case Op.MAX_POOL:
            return "Pooling", f"0=0 1={layer.kernel} 2={layer.stride} 3={layer.padding} 5=1"
        case Op.GLOBAL_POOL:
            return "Pooling", "0=1 4=1"
        case Op.LINEAR:
            return "InnerProduct", f"0={layer.c_out} 1=1 2={layer.c_out * layer.c_in}"


def _binary(node: Node, weights: Mapping[str, Array]) -> bytes:
    return b"".join(
        (FLOAT32 if len(shape) > 1 else b"") + weights[name].tobytes() for name, shape in weight_shapes(node).items()
    )


def _text(layers: Sequence[Row]) -> str:
    """A model in text form; what is read more than once is split first, as ncnn wants it."""
    reads = Counter(blob for layer in layers for blob in layer.inputs)
    seen: Counter[str] = Counter()
    lines, blobs = [], 0
    for layer in layers:
        inputs = [f"{blob}/{seen[blob]}" if reads[blob] > 1 else blob for blob in layer.inputs]
        seen.update(layer.inputs)
        lines.append(" ".join([layer.kind, layer.name, f"{len(inputs)} 1", *inputs, layer.output, layer.parameters]))
        if (copies := reads[layer.output]) > 1:
            names = [f"{layer.output}/{i}" for i in range(copies)]
            lines.append(" ".join(["Split", f"{layer.output}/split", f"1 {copies}", layer.output, *names]))
            blobs += copies
    return "\n".join([MAGIC, f"{len(lines)} {len(layers) + blobs}", *lines]) + "\n"
