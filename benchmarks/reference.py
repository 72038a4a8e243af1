"""The plain method to compare speeds with: MetaPruning as it is published, without any idea of ours.

Every block writes all of its convolution's weight, which is then cropped; weights are written again for every batch,
also while a candidate is scored; maps are contiguous (b, c, s, s) in float32; one batch norm module per choice; torch's
own optimiser moves all parameters of all blocks in every step. Networks, images and numbers of images are ours.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from latency_profiler.layers import Activation, Op
from latency_profiler.spaces.space import CHOICES, IMAGE, Space, scale, width_of
from workers.evolution import Score
from workers.networks import pool
from workers.pruning_net import ChoiceNorm, Classifier, Generator, PruningNet, option

Batch = tuple[Tensor, Tensor]


class Reference(nn.Module):
    """The plain PruningNet with the parameters and statistics of one of ours."""

    def __init__(self, network: PruningNet) -> None:
        super().__init__()
        self.space: Space = network.space
        self.first, self.second = nn.ModuleDict(), nn.ModuleDict()
        self.norms, self.classifiers = nn.ModuleDict(), nn.ModuleDict()
        for name, block in network.generators.items():
            assert isinstance(block, Generator)
            norm = network.norms[name]
            assert isinstance(norm, ChoiceNorm)
            hidden, fed = block.first_weight.shape
            self.first[name], self.second[name] = nn.Linear(fed, hidden), nn.Linear(hidden, block.bias.numel())
            _fill(self.first[name], block.first_weight, block.first_bias)
            _fill(self.second[name], block.weight.flatten(0, 2), block.bias.flatten())
            self.norms[name] = nn.ModuleList(_norms(norm))
        for name, layer in network.classifiers.items():
            assert isinstance(layer, Classifier)
            self.classifiers[name] = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
            _fill(self.classifiers[name], layer.weight, layer.bias)

    def forward(self, images: Tensor, encoding: Sequence[int]) -> Tensor:
        """Logits (b, classes) of images (b, 3, s, s)."""
        maps = {IMAGE: images}
        for i, (unit, node) in enumerate(
            zip(self.space.units, self.space.nodes(self.space.channels(encoding)), strict=True)
        ):
            x, name, layer = maps[node.input], str(i), node.layer
            if name in self.first:
                scales = [
                    scale(encoding[slot.index]) if slot.index is not None and slot in self.space.genes else 1.0
                    for slot in unit.encoding
                ]
                whole = self.second[name](functional.relu(self.first[name](torch.tensor(scales))))
                depthwise = unit.op is Op.DEPTHWISE
                inputs = 1 if depthwise else unit.source.base
                whole = whole.view(unit.target.base, inputs, unit.kernel, unit.kernel)
                weight = whole[: layer.c_out, : 1 if depthwise else layer.c_in]
                groups = layer.c_in if depthwise else 1
                x = functional.conv2d(x, weight, None, layer.stride, layer.padding, 1, groups)
                x = self.norms[name][option(self.space, unit, encoding)](x)  # type: ignore[index]
            elif name in self.classifiers:
                linear, x = self.classifiers[name], x.flatten(1)
                x = functional.linear(x, linear.weight[:, : x.shape[1]], linear.bias)  # type: ignore[index,arg-type]
            else:
                x = pool(layer, x)
            if node.shortcut is not None:
                x = x + maps[node.shortcut]
            if layer.activation is not Activation.NONE:
                x = functional.relu(x) if layer.activation is Activation.RELU else functional.relu6(x)
            maps[i] = x
        return x

    def optimiser(self, rate: float, momentum: float, decay: float) -> optim.SGD:
        """Over all parameters; batch norms have no weight decay."""
        decayed = [*self.first.parameters(), *self.second.parameters(), *self.classifiers.parameters()]
        groups = [{"params": decayed}, {"params": list(self.norms.parameters()), "weight_decay": 0.0}]
        return optim.SGD(groups, rate, momentum, weight_decay=decay)


def train(
    network: Reference, optimiser: optim.SGD, images: Tensor, labels: Tensor, encoding: Sequence[int], smoothing: float
) -> float:
    """One step on images (b, 3, s, s) and labels (b,); the loss."""
    network.train()
    optimiser.zero_grad()
    loss = functional.cross_entropy(network(images.contiguous(), encoding), labels, label_smoothing=smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.item()


@torch.no_grad()
def score(
    network: Reference, encoding: Sequence[int], recalibration: Iterable[Batch], validation: Iterable[Batch]
) -> Score:
    """A candidate's score: statistics anew, recalibration in training mode, then the validation images."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # as ours: an average of all batches instead of 0.1 of each
    network.train()
    for images, _ in recalibration:
        network(images.contiguous(), encoding)
    network.eval()
    right, count, loss = 0, 0, 0.0
    for images, labels in validation:
        logits = network(images.contiguous(), encoding)
        right, count = right + int((logits.argmax(1) == labels).sum()), count + len(labels)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    return Score(right / count, loss / count)


def _norms(ours: ChoiceNorm) -> list[nn.BatchNorm2d]:
    options, base = ours.mean.shape
    widths = [base] if options == 1 else [width_of(base, choice) for choice in range(CHOICES)]
    made = [nn.BatchNorm2d(width, affine=ours.weight is not None) for width in widths]
    for row, norm in enumerate(made):
        if ours.weight is not None and ours.bias is not None:
            _fill(norm, ours.weight[row, : norm.num_features], ours.bias[row, : norm.num_features])
    return made


@torch.no_grad()
def _fill(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    for own, given in ((module.weight, weight), (module.bias, bias)):
        assert isinstance(own, Tensor)
        own.copy_(given)
