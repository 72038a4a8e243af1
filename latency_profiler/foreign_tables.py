"""Tables of other projects: the public format of ProxylessNAS and Once-for-all.

Such a table is an object `{key: {"mean": milliseconds, "count": n}}`, whose keys say a kind and its shapes, e.g.
`expanded_conv-input:112x112x16-output:56x56x24-expand:6-kernel:3-stride:2-idskip:0`. The kinds are

- `Conv`, the 3×3 convolution at the image: one layer here;
- `Conv_1`, the 1×1 convolution behind the last block: one layer here;
- `expanded_conv`, an inverted bottleneck: two or three layers here, whose times its own does not tell apart;
- `Logits`, all that follows `Conv_1`: a pooling and a linear layer here.

So the first two are taken, and all else is listed with the reason. Nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latency_profiler.errors import InvalidInput
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.lookup_table import Entry, LatencyTable

SHAPE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})")
KERNELS = {"Conv": 3, "Conv_1": 1}
MOST_MS, MOST_COUNT = 1e6, 2**31
EXAMPLE = "Conv-input:224x224x3-output:112x112x32"


class _Skipped(Exception):
    """Why a key cannot be taken; the message says it."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """What could be taken of another project's table, and key → reason for what could not."""

    table: LatencyTable
    skipped: dict[str, str]


def is_foreign(data: Any) -> bool:
    """Whether this looks like a table of that format."""
    return isinstance(data, Mapping) and any("-input:" in str(key) for key in data)


def read_foreign(device: str, source: str, data: Mapping[str, Any]) -> Foreign:
    """Take what is one layer of ours.

    Args:
        device: whose table it becomes.
        source: where it is from: the fingerprint of the table.
        data: key → `{"mean", "count"}`, in milliseconds.

    Raises:
        InvalidInput: not such a table, or nothing in it can be taken.
    """
    if not is_foreign(data):
        raise InvalidInput(f"not a table in the format of ProxylessNAS: its keys would look like {EXAMPLE}")
    table, skipped = LatencyTable(device, source), {}
    for key, value in data.items():
        try:
            table.add(_entry(str(key), value))
        except _Skipped as reason:
            skipped[str(key)] = str(reason)
    if not table.entries:
        key, why = next(iter(skipped.items()))
        raise InvalidInput(f"none of the {len(skipped)} keys is a layer here; the first is {key[:200]!r}: {why}")
    return Foreign(table, skipped)


def _entry(key: str, value: Any) -> Entry:
    layer, facts = _layer(key), value if isinstance(value, Mapping) else {}
    mean = _number(facts.get("mean"), MOST_MS, "its mean is no number of milliseconds")
    count = _number(facts.get("count", 1), MOST_COUNT, "its count is no number of measurements")
    return Entry(layer, mean / 1000, count=max(1, int(count)))


def _number(value: Any, most: float, reason: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
        raise _Skipped(reason)
    return value


def _layer(key: str) -> Layer:
    """The layer that a key means; batch norm and ReLU6 are part of its time, as they are of ours."""
    kind, *parts = key.split("-")
    facts = dict(part.partition(":")[::2] for part in parts)
    if kind == "expanded_conv":
        layers = "depthwise and projection" if facts.get("expand") == "1" else "expansion, depthwise and projection"
        raise _Skipped(f"a block is more than one layer here ({layers}), whose times its own does not tell apart")
    if kind == "Logits":
        raise _Skipped("a pooling and a linear layer here, whose times their sum does not tell apart")
    if kind not in KERNELS:
        raise _Skipped("no layer here is of this kind")
    (height, width, c_in), (below, beside, c_out) = (_shape(facts.get(name, "")) for name in ("input", "output"))
    if height != width or below != beside:
        raise _Skipped("images are square here")
    kernel = KERNELS[kind]
    stride = -(-height // below)
    layer = Layer(Op.CONV, c_in, c_out, height, kernel, stride, kernel // 2, Activation.RELU6, norm=True)
    if layer.out_size != below:
        raise _Skipped(f"no stride makes {below} pixels of {height}")
    return layer


def _shape(text: str) -> tuple[int, ...]:
    match = SHAPE.fullmatch(text)
    if match is None:
        raise _Skipped("no input and output of the form height x width x channels")
    return tuple(map(int, match.groups()))
