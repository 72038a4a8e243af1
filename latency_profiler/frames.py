"""A layer between others, as it stands in a network.

Runtimes that keep channels in blocks bring a lone layer's input into their order and its output back. In a network only
its ends pay for that; alone, layers take up to twice as long. So for such a runtime (`Runtime.framed`) two frames are
measured, with the layer and without it. Its seconds are the difference.

    with      image -> stem -> layer -> pool        without      image -> stem -> pool

The pool reads the layer's output in the one frame and its input in the other. Along a network these cancel, but for the
pool at its end, which therefore counts nothing.
"""

from dataclasses import dataclass
from itertools import pairwise

from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.spaces.space import IMAGE

STEM_CHANNELS = 4
"""Of a stem's input: few, so that bringing them into an order costs little, and one block of every runtime."""
IMAGE_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """Networks that differ by one layer; `without` is None where nothing is left."""

    around: tuple[Node, ...]
    without: tuple[Node, ...] | None


def frame(layer: Layer) -> Frame | None:
    """What a layer is measured in; None where it is measured alone.

    Linear layers have no order of channels to keep, and nothing stands in front of a network's first convolution.
    """
    if layer.op is Op.LINEAR or (layer.residual and layer.out_size != layer.size):
        return None
    stems = _stems(layer)
    shortcut = 0 if layer.residual else None
    around = [*stems, Node("layer", layer, len(stems) - 1 if stems else IMAGE, shortcut)]
    if layer.op is not Op.GLOBAL_POOL:
        around.append(_pool(layer.c_out, layer.out_size, len(around) - 1))
    without = (*stems, _pool(layer.c_in, layer.size, len(stems) - 1)) if stems else None
    return Frame(tuple(around), without)


def _stems(layer: Layer) -> tuple[Node, ...]:
    """What makes a layer's input, and before that its shortcut where it has one of another width."""
    if layer.op is Op.CONV and layer.c_in == IMAGE_CHANNELS and layer.kernel > 1 and not layer.residual:
        return ()
    widths = [layer.c_out, layer.c_in] if layer.residual and layer.c_out != layer.c_in else [layer.c_in]
    return tuple(
        Node(f"stem{at}", _pointwise(c_in, c_out, layer.size), at - 1 if at else IMAGE, None)
        for at, (c_in, c_out) in enumerate(pairwise([STEM_CHANNELS, *widths]))
    )


def _pointwise(c_in: int, c_out: int, size: int) -> Layer:
    return Layer(Op.CONV, c_in, c_out, size, activation=Activation.RELU, norm=True)


def _pool(channels: int, size: int, source: int) -> Node:
    return Node("pool", Layer(Op.GLOBAL_POOL, channels, channels, size), source, None)
