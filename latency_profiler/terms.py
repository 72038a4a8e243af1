"""What a layer may cost in a network that it does not cost alone: the terms that a calibration weighs.

Alone, a layer finds its input and its weights in the cache. In a network others have used the cache since. How much of
this a device pays, whole networks tell (`calibration.fit_networks`): a term is a number of a layer, its weight is
fitted and never negative, and a network's latency is

    overhead + sum over layers of (slope * seconds + sum over terms of weight * term)

So no layer can make a network faster, however unlike the fitted networks it is. Terms of some layers' own seconds (of
widths that are multiples of a block, of single operators) lowered the error on networks like the fitted ones, and gave
others a time below zero.
"""

from collections.abc import Callable, Mapping

from latency_profiler.cost import layer_parameters
from latency_profiler.layers import Layer, Op

BYTES = 4
"""Of a number; what numbers of another size take, the weights tell."""


def _input_bytes(layer: Layer) -> float:
    return BYTES * layer.c_in * (1 if layer.op is Op.LINEAR else layer.size**2)


def _output_bytes(layer: Layer) -> float:
    return BYTES * layer.c_out * layer.out_size**2


def _weight_bytes(layer: Layer) -> float:
    return BYTES * layer_parameters(layer)


TERMS: dict[str, Callable[[Layer], float]] = {
    "input_bytes": _input_bytes, "output_bytes": _output_bytes, "weight_bytes": _weight_bytes,
}  # fmt: skip


def in_network(layer: Layer, seconds: float, slope: float, weights: Mapping[str, float]) -> float:
    """Seconds that a layer adds to a network, of the seconds that it takes alone."""
    total = slope * seconds
    for name, weight in weights.items():
        total += weight * TERMS[name](layer)
    return total
