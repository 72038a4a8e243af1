"""What a layer costs in a network, of what it costs by itself: the terms that a calibration weighs.

By itself a layer finds its input and its weights in the cache. In a network others have used the cache since, and which
kinds of layer gain or lose by their neighbours is up to the device. How much of this it pays, whole networks tell
(`calibration.fit_networks`): a term is a number of a layer, its weight is fitted and never negative, and a network's
latency is

    overhead + sum over layers of (slope * seconds + sum over terms of weight * term)

So no layer can make a network faster, however unlike the fitted networks it is. A term is called as in `BYTES`, or as a
family of layers (`Layer.family`): that one is the seconds of these layers, so that the family has a slope of its own.
"""

from collections.abc import Callable, Mapping

from latency_profiler.cost import layer_parameters
from latency_profiler.layers import Layer, Op

NUMBER = 4
"""Bytes of a number; what numbers of another size take, the weights tell."""


def _input_bytes(layer: Layer) -> float:
    return NUMBER * layer.c_in * (1 if layer.op is Op.LINEAR else layer.size**2)


def _output_bytes(layer: Layer) -> float:
    return NUMBER * layer.c_out * layer.out_size**2


def _weight_bytes(layer: Layer) -> float:
    return NUMBER * layer_parameters(layer)


BYTES: dict[str, Callable[[Layer], float]] = {
    "input_bytes": _input_bytes, "output_bytes": _output_bytes, "weight_bytes": _weight_bytes,
}  # fmt: skip


def is_term(term: str) -> bool:
    """Whether there can be a term of this name."""
    return term in BYTES or term.partition("-")[0] in list(Op)


def terms_of(layer: Layer, seconds: float) -> dict[str, float]:
    """All terms of a layer that takes so many seconds by itself."""
    return {name: count(layer) for name, count in BYTES.items()} | {layer.family: seconds}


def in_network(layer: Layer, seconds: float, slope: float, weights: Mapping[str, float]) -> float:
    """Seconds that a layer adds to a network, of the seconds that it takes by itself."""
    total = slope * seconds
    for name, value in terms_of(layer, seconds).items():
        if weight := weights.get(name):
            total += weight * value
    return total
