"""One operator with the input that it sees: the unit that is priced, measured and built.

A layer is what a deployed runtime executes as one kernel: batch norm is folded into its convolution and the
activation and the residual addition are fused behind it. Its key says all that its time depends on and nothing
else: equal shapes have equal keys wherever they stand in a network.

Letters: c channels, s side of the (square) input in pixels, k kernel side.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from latency_profiler.errors import InvalidInput


class Op(StrEnum):
    """Kinds of operator."""

    CONV = "conv"
    DEPTHWISE = "depthwise"
    LINEAR = "linear"
    MAX_POOL = "max_pool"
    GLOBAL_POOL = "global_pool"


class Activation(StrEnum):
    """What is applied to a layer's output (after the residual addition, if there is one)."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "relu6"


@dataclass(frozen=True, slots=True)
class Layer:
    """One fused operator and the shape of its input.

    `size` is the side of the input in pixels (1 for a linear layer, whose `c_in` counts flattened features).
    `norm` says that batch norm is trained behind a convolution, which a runtime folds into the weights; without it the
    convolution has a bias, as linear layers do.
    """

    op: Op
    c_in: int
    c_out: int
    size: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    activation: Activation = Activation.NONE
    norm: bool = False
    residual: bool = False

    @property
    def out_size(self) -> int:
        """Side of the output in pixels."""
        if self.op is Op.GLOBAL_POOL or self.op is Op.LINEAR:
            return 1
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def family(self) -> str:
        """All of the key but the channel numbers: layers of one family differ in nothing else."""
        parts = [self.op.value]
        if self.op not in (Op.LINEAR, Op.GLOBAL_POOL):
            parts.append(f"k{self.kernel}s{self.stride}p{self.padding}")
        if self.op is not Op.LINEAR:
            parts.append(f"{self.size}x{self.size}")
        if self.norm:
            parts.append("bn")
        if self.residual:
            parts.append("add")
        if self.activation is not Activation.NONE:
            parts.append(self.activation.value)
        return "-".join(parts)

    @property
    def key(self) -> str:
        """Identity in a lookup table, e.g. `conv-k3s1p1-32x32-bn-relu:3>16`."""
        return f"{self.family}:{self.c_in}>{self.c_out}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Layer":
        """Inverse of `to_json`.

        Raises:
            InvalidInput: a field is missing, unknown or outside its range.
        """
        try:
            layer = cls(**{**data, "op": Op(data["op"]), "activation": Activation(data["activation"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a layer: {error}") from error
        if min(layer.c_in, layer.c_out, layer.size, layer.kernel, layer.stride) < 1 or layer.padding < 0:
            raise InvalidInput(f"not a layer: sizes must be positive in {layer.key}")
        return layer


@dataclass(frozen=True, slots=True)
class Node:
    """One layer at its place in a network.

    `input` and `shortcut` are indices of earlier nodes; -1 is the image, and `shortcut` is None without a residual
    addition. The order of a network's nodes is an order in which they can be computed.
    """

    name: str
    layer: Layer
    input: int
    shortcut: int | None = None
