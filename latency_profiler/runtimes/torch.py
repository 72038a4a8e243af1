"""PyTorch on the CPU, eager: for those who deploy it so.

Channels-last tensors, batch norm folded into the bias, addition and activation in place.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.runtimes.base import Settings
from latency_profiler.tensors import Array, random_inputs, random_weights, single
from latency_profiler.timing import Stopwatch

Tensors = dict[int, torch.Tensor]


class Torch:
    """Eager execution on `settings.threads` threads, which are set for the whole process."""

    name = "torch"
    version: str = torch.__version__

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)

    def load_layer(self, layer: Layer) -> Stopwatch:
        """One layer."""
        return self.load_network(single(layer))

    def load_network(self, nodes: Sequence[Node]) -> Stopwatch:
        """A whole network, layer after layer."""
        weights = {name: _tensor(array) for name, array in random_weights(nodes).items()}
        inputs = {index: _tensor(array) for index, array in random_inputs(nodes, self.settings.batch).items()}
        return Stopwatch(network(nodes, weights, inputs))

    def empty_run(self) -> Stopwatch:
        """Entering inference mode with nothing to compute."""
        return Stopwatch(network((), {}, {-1: torch.ones(1)}))


def network(nodes: Sequence[Node], weights: dict[str, torch.Tensor], inputs: Tensors) -> Callable[[], torch.Tensor]:
    """A function that computes a network's last node from fixed inputs."""
    steps = [(index, node, _kernel(node, weights)) for index, node in enumerate(nodes)]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        results = dict(inputs)
        for index, node, kernel in steps:
            x = kernel(results[node.input])
            if node.shortcut is not None:
                x += results[node.shortcut]
            results[index] = _activate(x, node.layer.activation)
        return results[len(steps) - 1]

    return run


def _kernel(node: Node, weights: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
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


def _tensor(array: Array) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
