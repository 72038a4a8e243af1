"""A plain torch network of a structure, derived from the space's description."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.spaces.space import IMAGE, WEIGHTED, Space
from workers.norms import EXACT, Norm

NORM_EPSILON = 1e-5
LARGE_MAP = 16
"""Side in pixels from which a 1x1 convolution is faster as a convolution than as a matrix product."""
ONEDNN_BLOCK = 16
"""Channels that oneDNN computes at once: of fewer, the gradient of a strided 1x1 convolution destroys memory (its issue
6035; seen with AVX2, whose blocks have 8)."""
TINY_MAP = 2
"""Side in pixels up to which a depthwise convolution is trained `_by_pairs` of pixels."""
SMALL_MAP = 32
"""Side in pixels up to which the patches of a map fit in a GPU's memory with ease."""
UNDECAYED = {"mobilenet_v2": "project", "resnet50": "shortcut"}
"""What the dense convolutions without weight decay are called (MetaPruning, by names in the authors' evaluate.py)."""
M = TypeVar("M", bound=nn.Module)


def run(nodes: Sequence[Node], images: Tensor, apply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A network's output; `apply` computes node i up to its batch norm, additions and activations are done here.

    A map is dropped after its last reader, so that large batches fit.
    """
    last = {reader: i for i, node in enumerate(nodes) for reader in (node.input, node.shortcut)}
    maps: dict[int, Tensor] = {IMAGE: images}
    for i, node in enumerate(nodes):
        x = apply(i, maps[node.input])
        if node.shortcut is not None:
            x = x.add_(maps[node.shortcut])
        maps[i] = activate(x, node.layer.activation)
        for read in (node.input, node.shortcut):
            if read is not None and last[read] == i:
                maps.pop(read, None)
    return maps[len(nodes) - 1]


def convolve(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, varied: bool = False
) -> Tensor:  # fmt: skip
    """A convolution; weight (c_out, c_in / groups, k, k).

    oneDNN compiles a kernel for every new shape, which costs milliseconds, and a PruningNet has new widths in every
    step. So a 1x1 convolution of small maps is a matrix product over channels-last pixels; on large ones it pays. With
    a stride and few channels it is one on those, too: oneDNN 3.12 writes its weights' gradient beyond a buffer. And the
    gradient of depthwise weights on a map of 2x2 takes it a hundred times as long as on one of 4x4 (without AVX-512).

    Args:
        varied: the next call has other widths; a GPU computes it `without_plans`.
    """
    if varied and x.device.type == "cuda" and layer.out_size <= SMALL_MAP:
        return without_plans(layer, x, weight, bias)
    unsafe = layer.stride > 1 and layer.c_in < ONEDNN_BLOCK
    if layer.op is Op.CONV and layer.kernel == 1 and (layer.out_size < LARGE_MAP or unsafe):
        return _by_pixels(layer, x, weight, bias)
    depthwise = layer.op is Op.DEPTHWISE
    trained = torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in EXACT
    if depthwise and layer.size <= TINY_MAP and trained:
        return _by_pairs(layer, x, weight, bias)
    return functional.conv2d(x, weight, bias, layer.stride, layer.padding, 1, layer.c_in if depthwise else 1)


def without_plans(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same convolution without cuDNN, which plans for every new shape. It has not run on a GPU yet.

    Torch has own kernels for depthwise convolutions of maps that are not channels-last; all others are matrix products.
    """
    if layer.op is Op.DEPTHWISE:
        x = x.contiguous()
        return functional.conv2d(x, weight, bias, layer.stride, layer.padding, 1, layer.c_in)
    if layer.kernel == 1:
        return _by_pixels(layer, x, weight, bias)
    patches = functional.unfold(x, layer.kernel, 1, layer.padding, layer.stride)  # (b, c_in k k, pixels)
    out = weight.flatten(1) @ patches if bias is None else weight.flatten(1) @ patches + bias[:, None]
    return out.view(len(x), layer.c_out, layer.out_size, layer.out_size)


def _by_pixels(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution as a matrix product over channels-last pixels."""
    pixels = x[:, :, :: layer.stride, :: layer.stride].permute(0, 2, 3, 1)
    # Of two dimensions: with four, torch folds or batches depending on who requires gradients, with other bits.
    out = functional.linear(pixels.reshape(-1, layer.c_in), weight.flatten(1), bias)
    return out.view(*pixels.shape[:3], layer.c_out).permute(0, 3, 1, 2)


def _by_pairs(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution: every output pixel adds up all input pixels, each times the weight between those two."""
    side, channels = layer.out_size, layer.c_in
    between = _between(layer.size, side, layer.kernel, layer.stride, layer.padding).to(weight.dtype)
    weights = (between @ weight.flatten(1).T).view(-1, side * side, channels)
    out = (x.permute(0, 2, 3, 1).reshape(len(x), -1, 1, channels) * weights).sum(1)
    if bias is not None:
        out = out + bias
    return out.view(-1, side, side, channels).permute(0, 3, 1, 2)


@cache
def _between(size: int, out_size: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Rows (size^2 * out_size^2, k*k), one a pair of an input and an output pixel: 1 for the weight between them."""
    inputs, outputs = np.indices((size, size)).reshape(2, -1, 1), np.indices((out_size, out_size)).reshape(2, 1, -1)
    y, x = (inputs - stride * outputs + padding).reshape(2, -1, 1)
    weight_y, weight_x = np.indices((kernel, kernel)).reshape(2, -1)
    return torch.from_numpy(((y == weight_y) & (x == weight_x)).astype(np.float64))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation, in place: no batch norm or addition needs its own output for the backward pass."""
    match activation:
        case Activation.RELU:
            return functional.relu_(x)
        case Activation.RELU6:
            bounded: Tensor = _Relu6.apply(x)  # type: ignore[no-untyped-call]
            return bounded
        case Activation.NONE:
            return x


class _Relu6(torch.autograd.Function):
    """`hardtanh_(x, 0, 6)`, which would keep a copy of x for its gradient, though the output tells as much.

    It can be differentiated twice, which GraSP needs: torch leaves a function that cannot be out of it silently.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clamp_(0.0, 6.0))
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        moved: Tensor = torch.ops.aten.hardtanh_backward(gradients[0], *ctx.saved_tensors, 0.0, 6.0)
        return moved


def pool(layer: Layer, x: Tensor) -> Tensor:
    """Max pooling, or the mean over all pixels."""
    if layer.op is Op.MAX_POOL:
        return functional.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
    return x.mean((2, 3), keepdim=True)


class PlainNetwork(nn.Module):
    """One structure as an ordinary network, initialised from `seed`.

    Sub-modules: `convs.<i>`, `norms.<i>`, `linears.<i>`, with i the index of the node. A convolution without batch norm
    has a bias. `varied` is for a network that is used once, as its widths are.
    """

    varied = False

    def __init__(self, space: Space, channels: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.space, self.channels = space, space.complete(channels)
        self.nodes = space.nodes(channels)
        self.convs, self.norms, self.linears = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for i, node in enumerate(self.nodes):
            if node.layer.op in (Op.CONV, Op.DEPTHWISE):
                self.convs[str(i)] = _conv(node.layer)
                if node.layer.norm:
                    self.norms[str(i)] = Norm(node.layer.c_out, eps=NORM_EPSILON)
            elif node.layer.op is Op.LINEAR:
                self.linears[str(i)] = bare(nn.Linear, node.layer.c_in, node.layer.c_out)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """He initialisation (fan-out for convolutions, fan-in for hidden linear layers); zero biases.

        Classifiers have the deviation 0.01.
        """
        random = torch.Generator().manual_seed(seed)
        for conv in self.convs.values():
            assert isinstance(conv, nn.Conv2d)
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2 // conv.groups
            conv.weight.normal_(0.0, (2.0 / fan_out) ** 0.5, generator=random)
            if conv.bias is not None:
                conv.bias.zero_()
        for name, linear in self.linears.items():
            assert isinstance(linear, nn.Linear)
            hidden = self.nodes[int(name)].layer.activation is not Activation.NONE
            linear.weight.normal_(0.0, (2.0 / linear.in_features) ** 0.5 if hidden else 0.01, generator=random)
            linear.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, 3, s, s)."""
        return self.run(images, self.compute)

    def run(self, images: Tensor, apply: Callable[[int, Tensor], Tensor], until: int | None = None) -> Tensor:
        """Logits of images (b, 3, s, s) where `apply` computes the nodes (`compute` does it as they are).

        With `until`, the output of the node before that one.
        """
        grey = self.space.image_channels == 1
        return run(self.nodes[:until], images.mean(1, keepdim=True) if grey else images, apply)

    def compute(self, i: int, x: Tensor) -> Tensor:
        """Node i, up to its addition and activation."""
        layer, name = self.nodes[i].layer, str(i)
        match layer.op:
            case Op.CONV | Op.DEPTHWISE:
                y = convolve(layer, x, self.weight(i), self.bias(i), varied=self.varied)
                return self.norms[name](y) if layer.norm else y
            case Op.LINEAR:
                z: Tensor = self.linears[name](x.flatten(1))
                return z
            case _:
                return pool(layer, x)

    def folded(self, until: int | None = None) -> Callable[[Tensor], Tensor]:
        """What the network does in eval mode, with its batch norms folded into the convolutions as they are now.

        With `until`, up to the node before that one.
        """
        folded = {int(name): fold(self.weight(int(name)), norm) for name, norm in self.norms.items()}

        def compute(i: int, x: Tensor) -> Tensor:
            if i not in folded:
                return self.compute(i, x)
            return convolve(self.nodes[i].layer, x, *folded[i], varied=self.varied)

        return lambda images: self.run(images, compute, until)

    def weight(self, i: int) -> Tensor:
        """Weight (c_out, c_in / groups, k, k) of the convolution, or (c_out, c_in) of the linear layer, at node i."""
        return self._weighted(i).weight

    def bias(self, i: int) -> Tensor | None:
        """Bias (c_out,) of the layer at node i; None where batch norm has it."""
        return self._weighted(i).bias

    def _weighted(self, i: int) -> nn.Conv2d | nn.Linear:
        layer = (self.convs if str(i) in self.convs else self.linears)[str(i)]
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        return layer

    def decayed(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters with and without weight decay: dense convolutions and linear layers have it.

        Depthwise convolutions and batch norms have none (MetaPruning, the authors' MobileNetV1), nor have `UNDECAYED`.
        """
        without = UNDECAYED.get(self.space.name)
        dense = [
            parameter
            for i, node in enumerate(self.nodes)
            for name in ("convs", "linears")
            if node.layer.op is not Op.DEPTHWISE and node.name.rpartition(".")[2] != without
            if str(i) in getattr(self, name)
            for parameter in getattr(self, name)[str(i)].parameters()
        ]
        known = set(map(id, dense))
        return dense, [parameter for parameter in self.parameters() if id(parameter) not in known]


def folded_weights(network: PlainNetwork) -> dict[str, npt.NDArray[np.float32]]:
    """`<node>.weight` and `<node>.bias` with batch norm folded into its convolution, as a runtime deploys them."""
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for i, node in enumerate(network.nodes):
        if node.layer.op not in WEIGHTED:
            continue
        weight, bias = network.weight(i), network.bias(i)
        if node.layer.norm:
            weight, bias = fold(weight, network.norms[str(i)])
        assert bias is not None
        arrays[f"{node.name}.weight"] = weight.detach().float().cpu().contiguous().numpy()
        arrays[f"{node.name}.bias"] = bias.detach().float().cpu().numpy()
    return arrays


def fold(weight: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what one of this weight and then `norm` in eval mode do."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor


def _conv(layer: Layer) -> nn.Conv2d:
    return bare(
        nn.Conv2d, layer.c_in, layer.c_out, layer.kernel, stride=layer.stride, padding=layer.padding,
        groups=layer.c_in if layer.op is Op.DEPTHWISE else 1, bias=not layer.norm,
    )  # fmt: skip


def bare(make: type[M], *sizes: int, **options: Any) -> M:
    """A layer without values: torch itself would draw them from the global generator."""
    made: M = skip_init(make, *sizes, **options)  # type: ignore[no-untyped-call]
    return made
