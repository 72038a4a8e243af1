"""How good a network is: scoring candidates with a PruningNet's weights, and the final test.

Statistics of a batch norm depend on all widths before it, so they are computed anew for every candidate, as the plain
mean over batches (an exponential average of k batches would keep 0.9^k of what was there before). All candidates see
the same images in the same order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.datasets import Batches, Data
from workers.evolution import DIVERGED, Score
from workers.networks import PlainNetwork
from workers.pruning_net import PruningNet

BATCH = 250
"""Larger batches leave the processor's caches."""
KEPT_BYTES = 2**28
"""Sets of images that need no more are normalised once for all candidates."""

PULL = 100.0
"""How strongly a classifier that is fitted anew holds to the weights that it had: the precision of a normal prior on
their differences, for standardised features."""
FITTING_STEPS = 30
TINY = 1e-3
"""Least deviation of a feature."""


class Images(Protocol):
    """Labelled images that are read in batches."""

    def __len__(self) -> int: ...

    def plain(self, batch_size: int, device: torch.device, /) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in their order, with their labels."""


class Scorer:
    """Judges encodings of one PruningNet, which it does not change.

    Args:
        recalibration_images: of the sub-training set, chosen by `seed`; 0 keeps the statistics that were trained.
        classifier_images: of the same; 0 keeps the classifier that was trained.
    """

    def __init__(
        self, network: PruningNet, data: Data, *, recalibration_images: int, classifier_images: int = 0, seed: int,
        device: torch.device, batch_size: int = BATCH,
    ) -> None:  # fmt: skip
        self._network, self._device, self._batch_size = network.to(device), device, batch_size
        self._recalibration = kept(data.sub_training.sample(recalibration_images, seed), data.image_size)
        self._fitting = kept(data.sub_training.sample(classifier_images, seed), data.image_size)
        self._validation = kept(data.sub_validation, data.image_size)

    def score(self, encoding: Sequence[int]) -> Score:
        """Accuracy and loss on the sub-validation set: weights generated, batch norms and classifier fitted anew."""
        plain = self._network.crop(encoding)
        if len(self._recalibration):
            recalibrate(plain, self._recalibration, self._batch_size, self._device)
        if len(self._fitting):
            refit(plain, self._fitting, self._batch_size, self._device)
        return evaluate(plain, self._validation, self._device, self._batch_size)


class Kept:
    """Batches that are made once."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._made: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def plain(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Batches.plain`."""
        if (batch_size, device) not in self._made:
            self._made = {(batch_size, device): list(self._batches.plain(batch_size, device))}
        for batch in self._made[batch_size, device]:
            self._batches.told()
            yield batch


def kept(batches: Batches, size: int) -> Images:
    """Images of this size as normalised floats, unless they are too many."""
    return Kept(batches) if 12 * size**2 * len(batches) <= KEPT_BYTES else batches


@torch.inference_mode()
def recalibrate(network: nn.Module, batches: Images, batch_size: int, device: torch.device) -> None:
    """Set every batch norm's statistics to the mean over batches; leaves the network in eval mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to ask for a cumulative average
    network.train()
    for images, _ in batches.plain(batch_size, device):
        network(images)
    network.eval()


def refit(network: PlainNetwork, batches: Images, batch_size: int, device: torch.device) -> None:
    """Train the classifier alone on these images, from the weights that it has; leaves the network in eval mode.

    A logistic regression on standardised features, with a prior around those weights (`PULL`).
    """
    network.eval()
    last = len(network.nodes) - 1
    classifier, forward = network.linears[str(last)], network.folded(until=last)
    assert isinstance(classifier, nn.Linear)
    with torch.no_grad():
        parts = [(forward(images).flatten(1).float(), labels) for images, labels in batches.plain(batch_size, device)]
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        deviation, mean = torch.std_mean(features, 0)
        deviation += TINY
        standardised = (features - mean) / deviation
        start = classifier.weight * deviation
    weight = start.clone().requires_grad_()
    bias = (classifier.bias + classifier.weight @ mean).detach().requires_grad_()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=FITTING_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        fit = functional.cross_entropy(functional.linear(standardised, weight, bias), labels)
        penalised = fit + PULL / 2 / len(labels) * (weight - start).square().sum()
        penalised.backward()  # type: ignore[no-untyped-call]
        return penalised

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        classifier.weight.copy_(weight / deviation)
        classifier.bias.copy_(bias - classifier.weight @ mean)


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Images, device: torch.device, batch_size: int = BATCH) -> Score:
    """Accuracy and mean cross entropy of a network in eval mode."""
    network.eval()
    forward = network.folded() if isinstance(network, PlainNetwork) else network
    right, loss = 0, 0.0
    for images, labels in batches.plain(batch_size, device):
        logits = forward(images).float()
        right += int((logits.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    return Score(right / len(batches), loss / len(batches) if math.isfinite(loss) else DIVERGED)


def test(network: PlainNetwork, data: Data, device: torch.device) -> Score:
    """Score on the test set, which nothing else reads."""
    return evaluate(network.to(device), data.test, device)
