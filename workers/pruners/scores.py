"""What a prunable entry is worth: the scores of random, SNIP, GraSP, SynFlow and magnitude pruning.

Each function gives one number for each entry of Theta, of which the largest are kept; none changes the network. They
see the network through `prunable` and `weight` alone, so with F = I a score is the standard method's.

Letters: theta an entry, L the cross entropy of a batch, g its gradient, H its Hessian, b images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_profiler.errors import InvalidInput
from latency_profiler.layers import Activation, Node
from workers.datasets import Batches, generator
from workers.evaluation import BATCH
from workers.pruners.filter_bases import InterspaceNetwork

Scores = dict[str, Tensor]


def random_scores(network: InterspaceNetwork, seed: int, *counters: int | str) -> Scores:
    """Uniform numbers of a generator of their own."""
    random = generator(seed, "scores", *counters)
    return {
        name: torch.rand(parameter.shape, generator=random).to(parameter.device)
        for name, parameter in network.prunable().items()
    }


def snip(network: InterspaceNetwork, images: Tensor, labels: Tensor) -> Scores:
    """|theta g|, as a share of the sum over all (Lee et al. 2019, equation 6): what L feels of an entry's mask."""
    twin = network.twin().train()
    theta = twin.prunable()
    gradients = torch.autograd.grad(functional.cross_entropy(twin(images), labels), list(theta.values()))
    products = _times(theta, gradients)
    whole = torch.stack([product.abs().sum() for product in products.values()]).sum()
    return {name: product.abs() / whole for name, product in products.items()}


def grasp(
    network: InterspaceNetwork, images: Tensor, labels: Tensor, temperature: float, xavier: int | None
) -> Scores:  # fmt: skip
    """Theta H g, of logits / temperature: the largest of its negative are removed (Wang et al. 2020, equation 8).

    What is removed is meant to raise the norm of the gradient that is left. H is of Theta alone; bases are held.

    Args:
        xavier: seed of the linear layers' weights while scoring, Xavier-normal as the authors score them; None keeps
            those of the network.
    """
    twin = network.twin().train()
    if xavier is not None:
        _xavier(twin, xavier)
    theta = twin.prunable()
    loss = functional.cross_entropy(twin(images) / temperature, labels)
    gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    product = torch.stack([(gradient.detach() * gradient).sum() for gradient in gradients]).sum()
    return _times(theta, torch.autograd.grad(product, list(theta.values())))


def synflow(network: InterspaceNetwork) -> Scores:
    """|theta dR/dtheta|, R the sum of outputs for an image of ones, every value of the state taken absolute.

    The state includes bases and batch norms' statistics (Tanaka et al. 2020, algorithm 1, and the authors' code). In
    double precision: R grows with the product of all layers' widths. Without the bound of a ReLU6, which every layer
    but the first would reach: nothing would flow.

    Raises:
        InvalidInput: the network is so deep that R overflows.
    """
    twin = network.twin(torch.float64).eval()
    twin.nodes = tuple(map(_unbounded, twin.nodes))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.abs_()
    theta, size = twin.prunable(), twin.space.image_size
    output = twin(torch.ones(1, 3, size, size, dtype=torch.float64, device=next(twin.parameters()).device)).sum()
    if not torch.isfinite(output):
        raise InvalidInput("SynFlow cannot score a network so deep and wide: the product of its layers overflows")
    gradients = torch.autograd.grad(output, list(theta.values()))
    return {name: product.abs() for name, product in _times(theta, gradients).items()}


def _unbounded(node: Node) -> Node:
    bounded = node.layer.activation is Activation.RELU6
    return replace(node, layer=replace(node.layer, activation=Activation.RELU)) if bounded else node


@torch.no_grad()
def magnitude(network: InterspaceNetwork, *, basis_norms: bool, keep_classifier: bool) -> Scores:
    """|theta|.

    Args:
        basis_norms: a coefficient counts times the norm of its basis filter, which makes layers comparable where bases
            are no longer orthonormal.
        keep_classifier: the output layer is the last to be pruned.
    """
    found = {}
    for name, entry in network.prunable().items():
        score = entry.abs()
        if basis_norms and int(name) in network.groups:
            lengths = torch.linalg.vector_norm(network.bases[network.groups[int(name)]], dim=0)
            score *= lengths.view(score.shape[2:])
        found[name] = score
    last = max(found, key=int)
    if keep_classifier:
        found[last] = torch.full_like(found[last], torch.inf)
    return found


def first_of_each_class(batches: Batches, classes: int, count: int, seed: int, device: torch.device) -> tuple[
    Tensor, Tensor
]:  # fmt: skip
    """Images (b, 3, s, s) and labels (b,): `count` of each class in a random order, or all that there are."""
    seen, images, labels = torch.zeros(classes, dtype=torch.int64), [], []
    for some, those in batches.sample(len(batches), seed).plain(BATCH, device):
        hot = functional.one_hot(those.cpu(), classes)
        ranks = ((hot.cumsum(0) + seen) * hot).sum(1)  # the how-manieth of its class each image is
        seen += hot.sum(0)
        chosen = (ranks <= count).to(device)
        images.append(some[chosen])
        labels.append(those[chosen])
        if seen.min() >= count:
            break
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def _xavier(network: InterspaceNetwork, seed: int) -> None:
    for name, linear in network.linears.items():
        assert isinstance(linear, nn.Linear)
        deviation = (2.0 / (linear.in_features + linear.out_features)) ** 0.5
        drawn = torch.randn(linear.weight.shape, generator=generator(seed, "xavier", name))
        linear.weight.copy_(deviation * drawn)


def _times(theta: Mapping[str, Tensor], others: Sequence[Tensor]) -> Scores:
    return {name: entry.detach() * other for (name, entry), other in zip(theta.items(), others, strict=True)}
