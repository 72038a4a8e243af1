"""PyTorch on the CPU, eager: for those who deploy it so.

Channels-last tensors, batch norm folded into the bias, addition and activation in place.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.runtimes.base import Loaded, Settings
from latency_profiler.spaces.space import IMAGE
from latency_profiler.tensors import Array, random_inputs, random_weights, single

Tensors = dict[int, torch.Tensor]
Forward = Callable[[Tensors], torch.Tensor]


class Torch:
    """Eager execution on `settings.threads` threads, which are set for the whole process."""

    name = "torch"
    framed = False
    version: str = torch.__version__
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # float16 is computed by emulation here

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)

    def load_layer(self, layer: Layer) -> Loaded:
        """One layer."""
        return self.load_network(single(layer))

    def load_network(self, nodes: Sequence[Node]) -> Loaded:
        """A whole network, layer after layer."""
        weights = {name: self._tensor(array) for name, array in random_weights(nodes).items()}
        inputs = {index: self._tensor(array) for index, array in random_inputs(nodes, self.settings.batch).items()}
        return self._ready(forward(nodes, weights), inputs)

    def empty_run(self) -> Loaded:
        """Entering inference mode with nothing to compute."""
        return self._ready(lambda inputs: inputs[IMAGE], {IMAGE: torch.ones(1)})

    def _ready(self, compute: Forward, inputs: Tensors) -> Loaded:
        run = bound(compute, inputs)
        return Loaded(run, output=lambda: run().float().numpy())

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array).to(getattr(torch, self.settings.dtype))
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def network(nodes: Sequence[Node], weights: Mapping[str, torch.Tensor], inputs: Tensors) -> Callable[[], torch.Tensor]:
    """A function that computes a network's last node from fixed inputs."""
    return bound(forward(nodes, weights), inputs)


def bound(compute: Forward, inputs: Tensors) -> Callable[[], torch.Tensor]:
    """A function of fixed inputs, without gradients."""

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return compute(inputs)

    return run


def forward(nodes: Sequence[Node], weights: Mapping[str, torch.Tensor]) -> Forward:
    """A network's last node as a function of its inputs by index.

    A result is let go after its last reader, as by a module that is called with it: its memory, which the caches still
    hold, is the next one's.
    """
    last_reader = {index: node for node in nodes for index in (node.input, node.shortcut) if index is not None}
    steps = [
        (
            node,
            _kernel(node, weights),
            [index for index, reader in last_reader.items() if reader is node and index >= 0],
        )
        for node in nodes
    ]

    def compute(inputs: Tensors) -> torch.Tensor:
        results: Tensors = {}

        def read(index: int) -> torch.Tensor:
            return inputs[index] if index < 0 else results[index]

        for at, (node, kernel, over) in enumerate(steps):
            x = kernel(read(node.input))
            if node.shortcut is not None:
                x += read(node.shortcut)
            results[at] = _activate(x, node.layer.activation)
            for index in over:
                del results[index]
        return results[len(steps) - 1]

    return compute


def _kernel(node: Node, weights: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = node.layer
    match layer.op:
        case Op.CONV | Op.DEPTHWISE:
            weight, bias = weights[f"{node.name}.weight"], weights[f"{node.name}.bias"]
            groups = layer.c_in if layer.op is Op.DEPTHWISE else 1
            return lambda x: F.conv2d(x, weight, bias, layer.stride, layer.padding, 1, groups)
        case Op.MAX_POOL:
            return lambda x: F.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
        case Op.GLOBAL_POOL:
            return lambda x: F.adaptive_avg_pool2d(x, 1)
        case Op.LINEAR:
            weight, bias = weights[f"{node.name}.weight"], weights[f"{node.name}.bias"]
            return lambda x: F.linear(x.flatten(1), weight, bias)


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case Activation.RELU:
            return x.relu_()
        case Activation.RELU6:
            return F.hardtanh_(x, 0.0, 6.0)
        case _:
            return x
