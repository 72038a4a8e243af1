"""PruningNet: a network that writes the weights of every structure of a space (MetaPruning, section 3.1).

Each convolution has a block of two fully-connected layers, Linear(d, H), ReLU, Linear(H, c_out * c_in * k * k). A block
is fed the scales (0.10 to 1.00) of the slots in `unit.encoding`, in that order; a fixed slot has scale 1. The weight of
a structure is the leading block of the block's output, so only that part is computed: `c_out` and `c_in` are
dimensions of the second layer's parameters.

Without hidden units (H = 0) a block's output is its bias: one plain weight per convolution that all structures share,
the publication's ablation "without weight prediction". Nothing else differs.

Every place has one batch norm per choice of `unit.norm_slot` (one for a fixed slot). In spaces without shortcuts the
norms of the first convolution and of depthwise convolutions are affine, all others are not: the authors' MobileNetV1,
V2 and ResNet. Classifiers are ordinary linear layers, cropped by columns.

Letters: d slots fed, H hidden units, k kernel side, c channels, b images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_profiler.errors import NoPruningNet
from latency_profiler.layers import Op
from latency_profiler.spaces.space import CHOICES, IMAGE, Slot, Space, Unit, scale
from workers.networks import NORM_EPSILON, PlainNetwork, convolve, pool, run
from workers.norms import batch_norm

NORM_MOMENTUM = 0.1
TINY = 1e-12
SHARED = 0
"""Hidden units of blocks that generate nothing."""


@dataclass(frozen=True, slots=True)
class Crop:
    """The leading part of a second layer: weight (c_out, c_in, k*k, H) and bias (c_out, c_in, k*k)."""

    weight: Tensor
    bias: Tensor


class Generator(nn.Module):
    """Writes the weight of one convolution; without hidden units it is the weight."""

    def __init__(self, unit: Unit, hidden: int, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        c_in = 1 if unit.op is Op.DEPTHWISE else unit.source.base
        shape = (unit.target.base, c_in, unit.kernel**2)
        self.kernel = unit.kernel
        self.first_weight = nn.Parameter(torch.empty(hidden, len(unit.encoding)))
        self.first_bias = nn.Parameter(torch.empty(hidden))
        self.weight = nn.Parameter(torch.empty(*shape, hidden))
        self.bias = nn.Parameter(torch.empty(shape))

    def crop(self, c_out: int, c_in: int) -> Crop:
        """The part that a weight of these widths is computed from."""
        return Crop(self.weight[:c_out, :c_in], self.bias[:c_out, :c_in])

    def hidden(self, scales: Tensor) -> Tensor:
        """Hidden units (H,) for the scales (d,) of a unit's encoding."""
        return functional.relu(functional.linear(scales, self.first_weight, self.first_bias))

    def forward(self, hidden: Tensor, crop: Crop) -> Tensor:
        """Weight (c_out, c_in, k, k) for hidden units (H,)."""
        weight = crop.weight @ hidden + crop.bias  # (c_out, c_in, k*k)
        if self.normalised:
            he = math.sqrt(2 / (weight.shape[1] * weight.shape[2]))
            weight = weight * (he * math.sqrt(weight.numel()) / (torch.linalg.vector_norm(weight) + TINY))
        return weight.reshape(*weight.shape[:2], self.kernel, self.kernel)


class ChoiceNorm(nn.Module):
    """One batch norm per choice of a slot; row i of every tensor belongs to choice i, columns are channels."""

    mean: Tensor
    variance: Tensor

    def __init__(self, unit: Unit, options: int, affine: bool) -> None:
        super().__init__()
        shape = (options, unit.target.base)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None

    def forward(self, x: Tensor, option: int) -> Tensor:
        """Normalised maps (b, c, s, s); in training mode only row `option` of the statistics moves."""
        c = x.shape[1]
        return batch_norm(
            x, self.mean[option, :c], self.variance[option, :c],
            None if self.weight is None else self.weight[option, :c],
            None if self.bias is None else self.bias[option, :c],
            self.training, NORM_MOMENTUM, NORM_EPSILON,
        )  # fmt: skip


class Classifier(nn.Module):
    """A linear layer of which a structure uses the leading columns."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(unit.target.base, unit.source.base * unit.features))
        self.bias = nn.Parameter(torch.empty(unit.target.base))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (b, c_out) of maps (b, c, s, s)."""
        x = x.flatten(1)
        return functional.linear(x, self.weight[:, : x.shape[1]], self.bias)


class PruningNet(nn.Module):
    """All structures of a space in one network, initialised from `seed` as torch initialises linear layers.

    Args:
        hidden: hidden units of every block; None is as published: 64 for MobileNetV2's bottlenecks, else 32. `SHARED`
            shares plain weights instead of generating them.
        normalised: scale every generated weight to He's deviation (not in the publication). A batch norm follows, so
            the network's outputs stay the same; the gradients become alike for all widths.

    Raises:
        NoPruningNet: the space has free widths without batch norm.
    """

    scales: Tensor

    def __init__(
        self, space: Space, hidden: int | None = None, seed: int = 0, *, normalised: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        if not space.normed:
            raise NoPruningNet(space.name)
        self.space = space
        affine = all(unit.shortcut is None for unit in space.units)
        self.generators, self.norms, self.classifiers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for i, unit in enumerate(space.units):
            if unit.encoding:
                width = _hidden(space, unit) if hidden is None else hidden
                self.generators[str(i)] = Generator(unit, width, normalised)
                plain = unit.input == IMAGE or unit.op is Op.DEPTHWISE
                options = 1 if _gene(space, unit.norm_slot) is None else CHOICES
                self.norms[str(i)] = ChoiceNorm(unit, options, affine and plain)
            elif unit.op is Op.LINEAR:
                self.classifiers[str(i)] = Classifier(unit)
        # On the device, so that no step makes the host wait until numbers are copied there.
        self.register_buffer("scales", torch.tensor([scale(i) for i in range(CHOICES)]), persistent=False)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Every layer uniform in ± 1 / sqrt(inputs); shared weights are layers of c_in * k * k inputs."""
        random = torch.Generator().manual_seed(seed)
        for block in self.generators.values():
            assert isinstance(block, Generator)
            hidden, inputs = block.first_weight.shape
            second = hidden or block.bias[0].numel()
            for weight, fan_in in (
                (block.first_weight, inputs), (block.first_bias, inputs), (block.weight, second), (block.bias, second),
            ):  # fmt: skip
                weight.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=random)
        for layer in self.classifiers.values():
            assert isinstance(layer, Classifier)
            for weight in layer.parameters():
                weight.uniform_(-(layer.weight.shape[1] ** -0.5), layer.weight.shape[1] ** -0.5, generator=random)

    def crops(self, encoding: Sequence[int]) -> dict[str, Crop]:
        """The parts of the blocks' second layers that a structure's weights are computed from, as views."""
        nodes = self.space.nodes(self.space.channels(encoding))
        return {
            name: self._block(name).crop(layer.c_out, 1 if layer.op is Op.DEPTHWISE else layer.c_in)
            for name in self.generators
            for layer in (nodes[int(name)].layer,)
        }

    def forward(self, images: Tensor, encoding: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (b, classes) of images (b, 3, s, s), with weights that `generate` has given."""
        weights = self.generate(encoding) if weights is None else weights
        nodes = self.space.nodes(self.space.channels(encoding))

        def compute(i: int, x: Tensor) -> Tensor:
            layer, name = nodes[i].layer, str(i)
            if name in weights:
                x = convolve(layer, x, weights[name], varied=True)
                normed: Tensor = self.norms[name](x, option(self.space, self.space.units[i], encoding))
                return normed
            if name in self.classifiers:
                logits: Tensor = self.classifiers[name](x)
                return logits
            return pool(layer, x)

        return run(nodes, images, compute)

    def hidden(self, encoding: Sequence[int]) -> dict[str, Tensor]:
        """The hidden units (H,) of every block for a structure."""
        found = {}
        for name in self.generators:
            fed = [_gene(self.space, slot) for slot in self.space.units[int(name)].encoding]
            scales = torch.stack([self.scales[-1 if gene is None else encoding[gene]] for gene in fed])
            found[name] = self._block(name).hidden(scales)
        return found

    def generate(
        self, encoding: Sequence[int], crops: Mapping[str, Crop] | None = None,
        hidden: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The weight of every convolution of a structure, by its unit's index.

        Of the network's own `crops` and `hidden` units, or of others.
        """
        crops = self.crops(encoding) if crops is None else crops
        hidden = self.hidden(encoding) if hidden is None else hidden
        return {name: self._block(name)(hidden[name], crop) for name, crop in crops.items()}

    @torch.no_grad()
    def crop(self, encoding: Sequence[int]) -> PlainNetwork:
        """The structure as a plain network with the generated weights, the selected batch norms, and eval mode."""
        plain = PlainNetwork(self.space, self.space.channels(encoding))
        plain.varied = True
        for name, weight in self.generate(encoding).items():
            plain.convs[name].weight = nn.Parameter(weight)
            ours, theirs = self.norms[name], plain.norms[name]
            assert isinstance(ours, ChoiceNorm)
            assert isinstance(theirs, nn.BatchNorm2d)
            row, c = option(self.space, self.space.units[int(name)], encoding), theirs.num_features
            theirs.running_mean, theirs.running_var = ours.mean[row, :c].clone(), ours.variance[row, :c].clone()
            if ours.weight is not None and ours.bias is not None:
                theirs.weight.copy_(ours.weight[row, :c])
                theirs.bias.copy_(ours.bias[row, :c])
        for name, layer in self.classifiers.items():
            assert isinstance(layer, Classifier)
            linear = plain.linears[name]
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(layer.weight[:, : linear.in_features])
            linear.bias.copy_(layer.bias)
        return plain.to(self._device).eval()

    def ordinary(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters outside the generators' second layers: those with weight decay, and those without (norms)."""
        blocks = [self._block(name) for name in self.generators]
        decayed = [parameter for block in blocks for parameter in (block.first_weight, block.first_bias)]
        return decayed + list(self.classifiers.parameters()), list(self.norms.parameters())

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _block(self, name: str) -> Generator:
        block = self.generators[name]
        assert isinstance(block, Generator)
        return block


def option(space: Space, unit: Unit, encoding: Sequence[int]) -> int:
    """Which of a place's batch norms a structure uses."""
    gene = _gene(space, unit.norm_slot)
    return 0 if gene is None else encoding[gene]


def _gene(space: Space, slot: Slot | None) -> int | None:
    """The gene that chooses a slot, if one does."""
    return slot.index if slot is not None and slot in space.genes else None


def _hidden(space: Space, unit: Unit) -> int:
    return 64 if space.name == "mobilenet_v2" and len(unit.encoding) == 3 else 32
