"""Shapes of a network's tensors, and seeded contents for them where no trained numbers are needed.

What a runtime measures is the same graph with any weights, as long as no number becomes denormal (denormals are
many times slower) and none overflows: weights are He-scaled, so that activations keep their size from layer to layer.
Letters: n batch, c channels, s side in pixels, k kernel side, g groups.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from latency_profiler.layers import Layer, Node, Op
from latency_profiler.spaces.space import IMAGE

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
SHORTCUT = -2
"""Index of the second input of a network that is one residual layer (`IMAGE` is the first one's)."""

BIAS = 0.1
"""Standard deviation of random biases."""


def single(layer: Layer) -> tuple[Node, ...]:
    """A network of one layer; a residual layer reads its shortcut from a second input."""
    return (Node("layer", layer, IMAGE, SHORTCUT if layer.residual else None),)


def input_shape(layer: Layer, batch: int) -> Shape:
    """(n, c, s, s), or (n, c) for a linear layer."""
    return (batch, layer.c_in) if layer.op is Op.LINEAR else (batch, layer.c_in, layer.size, layer.size)


def output_shape(layer: Layer, batch: int) -> Shape:
    """(n, c, s, s), or (n, c) for a linear layer."""
    return (batch, layer.c_out) if layer.op is Op.LINEAR else (batch, layer.c_out, layer.out_size, layer.out_size)


def network_inputs(nodes: Iterable[Node], batch: int) -> dict[int, Shape]:
    """Index (`IMAGE`, `SHORTCUT`) → shape of every tensor that enters a network."""
    shapes: dict[int, Shape] = {}
    for node in nodes:
        if node.input < 0:
            shapes[node.input] = input_shape(node.layer, batch)
        if node.shortcut is not None and node.shortcut < 0:
            shapes[node.shortcut] = output_shape(node.layer, batch)
    return shapes


def weight_shapes(node: Node) -> dict[str, Shape]:
    """Name → shape of a node's folded weights: `<name>.weight` (c_out, c_in/g, k, k) or (c_out, c_in), and its bias."""
    layer = node.layer
    match layer.op:
        case Op.CONV:
            weight: Shape = (layer.c_out, layer.c_in, layer.kernel, layer.kernel)
        case Op.DEPTHWISE:
            weight = (layer.c_out, 1, layer.kernel, layer.kernel)
        case Op.LINEAR:
            weight = (layer.c_out, layer.c_in)
        case _:
            return {}
    return {f"{node.name}.weight": weight, f"{node.name}.bias": (layer.c_out,)}


def random_weights(nodes: Iterable[Node], seed: int = 0) -> dict[str, Array]:
    """He-scaled weights and small biases of a network."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for node in nodes:
        for name, shape in weight_shapes(node).items():
            weights[name] = _he(shape, rng) if len(shape) > 1 else _normal(shape, rng, BIAS)
    return weights


def random_inputs(nodes: Sequence[Node], batch: int, seed: int = 0) -> dict[int, Array]:
    """Index → standard normal numbers, for every tensor that enters a network."""
    rng = np.random.default_rng(seed)
    shapes = network_inputs(nodes, batch)
    return {index: rng.standard_normal(shape, dtype=np.float32) for index, shape in shapes.items()}


def _he(shape: Shape, rng: np.random.Generator) -> Array:
    fan_in = int(np.prod(shape[1:]))
    return _normal(shape, rng, (2.0 / fan_in) ** 0.5)


def _normal(shape: Shape, rng: np.random.Generator, scale: float) -> Array:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
