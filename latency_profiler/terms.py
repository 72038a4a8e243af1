"""What a layer may cost in a network that it does not cost alone: the terms that a calibration weighs.

Alone, a layer finds its input and its weights in the cache and its channels in whatever order its kernel likes best.
In a network others have used the cache since, and a runtime that keeps channels in blocks (of 8 or 16 floats) reorders
them where a width is no multiple of a block. Which of this a device pays, and how much, whole networks tell
(`calibration.fit_networks`): a term is a number of a layer, its weight is fitted, and a network's latency is

    overhead + sum over layers of (slope * seconds + sum over terms of weight * term)
"""

from collections.abc import Callable, Mapping

from latency_profiler.cost import layer_parameters
from latency_profiler.layers import Layer, Op

BLOCK = 8
"""Floats of a vector unit, and the least block in which runtimes keep channels."""
BYTES = 4
Term = Callable[[Layer, float], float]
"""Of a layer and its seconds alone."""


def _input_bytes(layer: Layer, _: float) -> float:
    return BYTES * layer.c_in * (1 if layer.op is Op.LINEAR else layer.size**2)


def _output_bytes(layer: Layer, _: float) -> float:
    return BYTES * layer.c_out * layer.out_size**2


def _weight_bytes(layer: Layer, _: float) -> float:
    return BYTES * layer_parameters(layer)


def _blocked_seconds(layer: Layer, seconds: float) -> float:
    return seconds if layer.op is Op.CONV and not (layer.c_in % BLOCK or layer.c_out % BLOCK) else 0.0


def _ragged_seconds(layer: Layer, seconds: float) -> float:
    return seconds if layer.op is Op.DEPTHWISE and layer.c_in % BLOCK else 0.0


def _ragged_input_bytes(layer: Layer, seconds: float) -> float:
    return _input_bytes(layer, seconds) if layer.c_in % BLOCK else 0.0


def _ragged_output_bytes(layer: Layer, seconds: float) -> float:
    return _output_bytes(layer, seconds) if layer.c_out % BLOCK else 0.0


def _seconds_of(*ops: Op) -> Term:
    return lambda layer, seconds: seconds if layer.op in ops else 0.0


CACHE: dict[str, Term] = {
    "input_bytes": _input_bytes, "output_bytes": _output_bytes, "weight_bytes": _weight_bytes,
}  # fmt: skip
BLOCKS: dict[str, Term] = {
    "blocked_convolution_seconds": _blocked_seconds, "ragged_depthwise_seconds": _ragged_seconds,
    "ragged_input_bytes": _ragged_input_bytes, "ragged_output_bytes": _ragged_output_bytes,
}  # fmt: skip
OPERATORS: dict[str, Term] = {
    "depthwise_seconds": _seconds_of(Op.DEPTHWISE), "linear_seconds": _seconds_of(Op.LINEAR),
    "pool_seconds": _seconds_of(Op.MAX_POOL, Op.GLOBAL_POOL),
}  # fmt: skip
TERMS: dict[str, Term] = CACHE | BLOCKS | OPERATORS


def in_network(layer: Layer, seconds: float, slope: float, weights: Mapping[str, float]) -> float:
    """Seconds that a layer adds to a network, of the seconds that it takes alone."""
    total = slope * seconds
    for name, weight in weights.items():
        total += weight * TERMS[name](layer, seconds)
    return total
