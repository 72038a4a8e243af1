"""Scores of interspace pruning against independent derivations; invariants 1 and 10."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from latency_profiler.layers import Activation
from latency_profiler.spaces.registry import get_space
from workers.datasets import Data, generator
from workers.networks import activate
from workers.pruners import scores
from workers.pruners.allowance import Allowance
from workers.pruners.filter_bases import Bases, InterspaceNetwork

LABELS = torch.arange(12) % 4
ROTATED = Bases(initialisation="orthonormal")


def made(name: str, bases: Bases = ROTATED) -> InterspaceNetwork:
    space = get_space(name, 8, 0.125, 4)
    return InterspaceNetwork(space, space.uniform(1.0), 2, bases).double()


def images() -> Tensor:
    return torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=generator(0, "images"))


def outputs(network: InterspaceNetwork, theta: Mapping[str, Tensor]) -> Tensor:
    """Logits with other entries of Theta; statistics of the batch, torch's own batch norms."""
    named = {id(entry): name for name, entry in network.named_parameters()}
    others = {named[id(network.prunable()[name])]: entry for name, entry in theta.items()}
    given: Tensor = functional_call(network.train(), others, (images(),))
    return given


def every_score(network: InterspaceNetwork) -> dict[str, scores.Scores]:
    return {
        "snip": scores.snip(network, images(), LABELS),
        "grasp": scores.grasp(network, images(), LABELS, 200.0, 1),
        "synflow": scores.synflow(network),
        "magnitude": scores.magnitude(network, basis_norms=True, keep_classifier=True),
        "random": scores.random_scores(network, 3),
    }


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1"])
def test_with_identity_bases_every_score_is_the_standard_one(name: str) -> None:
    spatial, identity = every_score(made(name, Bases("spatial"))), every_score(made(name, Bases("medium")))
    for method, score in spatial.items():
        assert all(torch.equal(entry, identity[method][key]) for key, entry in score.items()), method


def test_scoring_leaves_the_network_as_it_was() -> None:
    network = made("resnet20")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    every_score(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_snip_is_what_the_loss_feels_of_a_mask(name: str) -> None:
    network = made(name)
    masks = {key: torch.ones_like(entry, requires_grad=True) for key, entry in network.prunable().items()}
    masked = {key: entry.detach() * masks[key] for key, entry in network.prunable().items()}
    functional.cross_entropy(outputs(network, masked), LABELS).backward()
    felt = {key: mask.grad.abs() for key, mask in masks.items() if mask.grad is not None}
    whole = sum(float(one.sum()) for one in felt.values())
    found = scores.snip(network, images(), LABELS)
    assert all(torch.allclose(found[key], one / whole, rtol=1e-8, atol=1e-14) for key, one in felt.items())
    assert sum(float(one.sum()) for one in found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_grasp_is_a_difference_of_gradients(name: str) -> None:
    """H g by central differences of the gradient along g; the bases stay."""
    network, temperature = made(name), 2.0

    def gradient(shift: Mapping[str, Tensor] | None, length: float = 0.0) -> dict[str, Tensor]:
        theta = {
            key: (entry.detach() + (length * shift[key] if shift else 0)).requires_grad_()
            for key, entry in network.prunable().items()
        }
        loss = functional.cross_entropy(outputs(network, theta) / temperature, LABELS)
        return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))

    g, length = gradient(None), 1e-7
    ahead, behind = gradient(g, length), gradient(g, -length)
    curved = {key: (ahead[key] - behind[key]) / (2 * length) for key in g}
    found = scores.grasp(network, images(), LABELS, temperature, None)
    ours = torch.cat([one.flatten() for one in found.values()])
    expected = torch.cat([(network.prunable()[key].detach() * one).flatten() for key, one in curved.items()])
    assert torch.linalg.vector_norm(ours - expected) < 1e-3 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("activation", list(Activation))
def test_grasp_sees_the_curvature_behind_every_activation(activation: Activation) -> None:
    """In MobileNetV2 whose kinks are too near for differences: one layer, on either side of them."""
    x = torch.tensor([-1.0, 0.5, 3.0, 7.0], dtype=torch.float64, requires_grad=True)

    def curved(x: Tensor) -> Tensor:
        return activate(x**2 - 0.5, activation).pow(3)

    assert torch.autograd.gradgradcheck(curved, (x,))


def test_grasp_removes_the_largest_of_its_published_score() -> None:
    network = made("vgg16")
    found = scores.grasp(network, images(), LABELS, 200.0, 1)
    masks = Allowance.at_rate(network.nodes, 0.8).best(found)
    published = {key: -score for key, score in found.items()}  # -theta H g
    gone = torch.cat([published[key][~mask] for key, mask in masks.items()])
    assert gone.min() >= torch.cat([published[key][mask] for key, mask in masks.items()]).max()


@pytest.mark.parametrize("bases", [Bases("spatial"), ROTATED, Bases("coarse", initialisation="orthonormal")])
def test_synflow_is_conserved_from_layer_to_layer(bases: Bases) -> None:
    """In a chain without biases each layer's scores sum to R (Tanaka et al. 2020, theorem 1), in any basis."""
    network = made("vgg16", bases)
    found = scores.synflow(network)
    sums = torch.stack([score.sum() for score in found.values()])
    assert torch.allclose(sums, sums[0].expand_as(sums), rtol=1e-9)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    ones = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    assert sums[0].item() == pytest.approx(network.eval()(ones).sum().item())


@pytest.mark.parametrize("bases", [Bases("spatial"), ROTATED])
def test_synflow_removes_no_whole_layer(bases: Bases) -> None:
    """Down to four entries a layer, of 14 layers; in one round, it removes whole layers."""
    network, kept = made("vgg16", bases), 60
    total = Allowance.at_rate(network.nodes, 0.0).total
    allowance = Allowance.at_rate(network.nodes, 1 - kept / total)

    def pruned(rounds: int) -> list[int]:
        start = {name: entry.detach().clone() for name, entry in network.prunable().items()}
        masks = {name: torch.ones_like(entry, dtype=torch.bool) for name, entry in start.items()}
        for t in range(rounds):
            masks = allowance.relaxed(allowance.share ** ((t + 1) / rounds)).best(scores.synflow(network), masks)
            with torch.no_grad():
                for name, entry in network.prunable().items():
                    entry.mul_(masks[name])
            if not all(mask.any() for mask in masks.values()):
                break
        with torch.no_grad():
            for name, entry in network.prunable().items():
                entry.copy_(start[name])
        return [int(mask.sum()) for mask in masks.values()]

    counts = pruned(100)
    assert min(counts) > 0
    assert sum(counts) == kept
    assert min(pruned(1)) == 0


def test_synflow_sees_through_bounded_activations() -> None:
    """An image of ones and absolute weights reach a ReLU6's bound, where nothing of the layers before would count."""
    found = scores.synflow(made("mobilenet_v2"))
    assert [name for name, score in found.items() if not score.any()] == []


def test_synflow_of_a_deep_network_does_not_overflow() -> None:
    space = get_space("resnet56", 32, 1.0, 10)
    found = scores.synflow(InterspaceNetwork(space, space.uniform(1.0), 0, ROTATED))
    assert all(torch.isfinite(score).all() and score.max() > 0 for score in found.values())


def test_magnitudes_may_count_the_length_of_their_basis_filter() -> None:
    network = made("vgg16")
    with torch.no_grad():
        for basis in network.bases.values():
            basis.mul_(torch.arange(1.0, 10.0))  # column n has norm n + 1
    plain = scores.magnitude(network, basis_norms=False, keep_classifier=False)
    longer = scores.magnitude(network, basis_norms=True, keep_classifier=True)
    lengths = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    assert torch.allclose(longer["0"], plain["0"] * lengths, rtol=1e-6)
    classifier = max(plain, key=int)
    assert torch.isfinite(plain[classifier]).all()
    masks = Allowance.at_rate(network.nodes, 0.9).best(longer)
    assert masks[classifier].all()
    assert not all(mask.all() for mask in masks.values())


def test_random_scores_depend_on_seed_and_counters_alone() -> None:
    network = made("vgg16")
    one, same, other, later = (scores.random_scores(network, *key) for key in ((1,), (1,), (2,), (1, "grow", 3)))
    assert torch.equal(one["0"], same["0"])
    assert not torch.equal(one["0"], other["0"])
    assert not torch.equal(one["0"], later["0"])


def test_as_many_images_of_each_class_are_drawn(data: Data) -> None:
    images, labels = scores.first_of_each_class(data.sub_training, 4, 7, 0, torch.device("cpu"))
    assert torch.bincount(labels).tolist() == [7] * 4
    assert images.shape == (28, 3, 8, 8)
    assert len(torch.unique(images.flatten(1), dim=0)) == 28
    others, _ = scores.first_of_each_class(data.sub_training, 4, 7, 1, torch.device("cpu"))
    assert not torch.equal(images, others)
    _, labels = scores.first_of_each_class(data.sub_training, 4, 10_000, 0, torch.device("cpu"))
    assert len(labels) == len(data.sub_training)
