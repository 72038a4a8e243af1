"""Invariants 1 to 5, 8 and 9 of the specification of interspace pruning, on whole networks."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from latency_profiler.cost import layer_flops
from latency_profiler.layers import Layer, Op
from latency_profiler.spaces.registry import SPACES, get_space
from workers.datasets import generator
from workers.networks import PlainNetwork, convolve
from workers.pruners.allowance import Allowance
from workers.pruners.basis_costs import basis_parameters, layer_costs
from workers.pruners.filter_bases import Bases, InterspaceNetwork, Sharing
from workers.pruners.scores import random_scores

ROTATED = Bases(initialisation="orthonormal")
LABELS = torch.arange(12) % 4


def small(name: str = "resnet20", bases: Bases = ROTATED, seed: int = 0) -> InterspaceNetwork:
    space = get_space(name, 8, 0.125, 4)
    return InterspaceNetwork(space, space.uniform(1.0), seed, bases).double()


def images(seed: int = 0) -> Tensor:
    return torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=generator(seed, "images"))


def pruned(network: InterspaceNetwork, rate: float) -> dict[str, Tensor]:
    """Random masks, applied."""
    masks = Allowance.at_rate(network.nodes, rate).best(random_scores(network, 3))
    with torch.no_grad():
        for name, entry in network.prunable().items():
            entry.mul_(masks[name])
    return masks


def gradients(network: PlainNetwork) -> dict[str, Tensor]:
    functional.cross_entropy(network.train()(images()), LABELS).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "mobilenet_v1"])
def test_identity_bases_change_no_bit(name: str) -> None:
    space = get_space(name, 8, 0.125, 4)
    plain = PlainNetwork(space, space.uniform(1.0), 5)
    network = InterspaceNetwork(space, space.uniform(1.0), 5, Bases("coarse"))
    x = images().float().contiguous(memory_format=torch.channels_last)
    for one in (plain, network):
        functional.cross_entropy(one.train()(x), LABELS).backward()
    theirs = dict(network.named_parameters())
    assert all(torch.equal(entry.grad, theirs[key].grad) for key, entry in plain.named_parameters())
    assert torch.equal(plain.eval()(x), network.eval()(x))
    assert torch.equal(plain.folded()(x), network.folded()(x))


@pytest.mark.parametrize(("op", "stride"), [(Op.CONV, 1), (Op.CONV, 2), (Op.DEPTHWISE, 2)])
def test_built_filters_convolve_as_basis_responses_do(op: Op, stride: int) -> None:
    """Equation 8: the basis filters' responses to every input channel, combined by the kept coefficients."""
    random = generator(1)
    c_in, c_out = 3, 3 if op is Op.DEPTHWISE else 5
    layer = Layer(op, c_in, c_out, 8, 3, stride, 1)
    shape = (c_out, 1 if op is Op.DEPTHWISE else c_in, 9)
    basis = torch.randn(9, 9, generator=random, dtype=torch.float64)
    kept = torch.randn(shape, generator=random, dtype=torch.float64) * (torch.rand(shape, generator=random) < 0.3)
    x = torch.randn(2, c_in, 8, 8, generator=random, dtype=torch.float64)
    filters = basis.T.reshape(9, 1, 3, 3)  # g^(n) is column n, row by row
    responses = functional.conv2d(x.reshape(-1, 1, 8, 8), filters, None, stride, 1).unflatten(0, (2, c_in))
    built = convolve(layer, x, (kept @ basis.T).view(*shape[:2], 3, 3))
    sums = "cm,bcmhw->bchw" if op is Op.DEPTHWISE else "oim,bimhw->bohw"
    combined = torch.einsum(sums, kept[:, 0] if op is Op.DEPTHWISE else kept, responses)
    assert torch.allclose(built, combined, rtol=0, atol=1e-12)


def test_columns_of_a_basis_are_its_filters() -> None:
    network = small()
    name = str(min(network.groups))
    with torch.no_grad():
        network.prunable()[name].zero_()[0, 0, 0, 1] = 2.0  # coefficient n = 1
    basis = network.bases[network.groups[int(name)]]
    assert torch.allclose(network.weight(int(name))[0, 0].flatten(), 2 * basis[:, 1])


@pytest.mark.parametrize("sharing", ["coarse", "medium", "fine"])
def test_gradients_are_those_of_the_paper(sharing: Sharing) -> None:
    """Equation 7: F^T dL/dh for coefficients; the sum of dL/dh lambda^T over all layers of a basis."""
    network = small(bases=Bases(sharing, initialisation="orthonormal"))
    pruned(network, 0.6)
    ours, plain = gradients(network), gradients(network.plain())
    of_basis = {group: torch.zeros(9, 9, dtype=torch.float64) for group in network.bases}
    for i, group in network.groups.items():
        of_filters = plain[f"convs.{i}.weight"].flatten(2)
        coefficients = network.prunable()[str(i)].detach().flatten(2)
        expected = (of_filters @ network.bases[group].detach()).view_as(ours[f"convs.{i}.weight"])
        assert torch.allclose(ours[f"convs.{i}.weight"], expected, rtol=1e-10, atol=1e-12)
        of_basis[group] += torch.einsum("oim,oin->mn", of_filters, coefficients)
    for group, expected in of_basis.items():
        assert torch.allclose(ours[f"bases.{group}"], expected, rtol=1e-10, atol=1e-12)


def test_a_shared_bases_gradient_is_the_sum_of_the_layers() -> None:
    fine, coarse = small(bases=Bases("fine")), small(bases=Bases("coarse"))
    coarse.load_state_dict({**coarse.state_dict(), **{k: v for k, v in fine.state_dict().items() if "bases" not in k}})
    of_layers = [gradient for name, gradient in gradients(fine).items() if name.startswith("bases.")]
    assert len(of_layers) == 19
    shared = gradients(coarse)["bases.all_3x3"]
    assert torch.allclose(torch.stack(of_layers).sum(0), shared, rtol=1e-10, atol=1e-13)


def test_a_network_is_the_same_in_every_basis() -> None:
    """The gauge: F A with A^-1 lambda."""
    network = small(bases=Bases("medium"))
    before = network.eval()(images())
    with torch.no_grad():
        for group, basis in network.bases.items():
            change = torch.eye(9) + 0.1 * torch.randn(9, 9, generator=generator(2, group))
            basis.copy_(basis @ change.double())
            for i in (i for i, own in network.groups.items() if own == group):
                entry = network.prunable()[str(i)]
                entry.copy_((entry.flatten(2) @ torch.linalg.inv(change.double()).T).view_as(entry))
    assert torch.allclose(network(images()), before, rtol=1e-9, atol=1e-12)


def test_orthonormal_bases_keep_norms_and_the_distribution() -> None:
    space = get_space("resnet20", 8, 2.0, 4)
    network = InterspaceNetwork(space, space.uniform(1.0), 0, ROTATED)
    for i, group in network.groups.items():
        basis, entry = network.bases[group].detach(), network.prunable()[str(i)].detach()
        assert torch.allclose(basis @ basis.T, torch.eye(9), atol=1e-6)
        filters = network.weight(i).detach()
        assert torch.allclose(filters.flatten(2).norm(dim=2), entry.flatten(2).norm(dim=2), rtol=1e-4)
    assert filters.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    first, second = list(network.bases.values())[:2]
    assert not torch.equal(first, second)


def test_a_trained_network_is_taken_over_and_given_back() -> None:
    space = get_space("mobilenet_v1", 8, 0.125, 4)
    plain = PlainNetwork(space, space.uniform(1.0), 5).double()
    plain(images())  # moves the statistics
    network = small("mobilenet_v1", Bases("medium", initialisation="orthonormal"))
    network.adopt(plain.state_dict())
    assert torch.allclose(network.eval()(images()), plain.eval()(images()), rtol=1e-10, atol=1e-12)
    back = network.plain().state_dict()
    assert all(torch.allclose(back[key], value, rtol=1e-10, atol=1e-12) for key, value in plain.state_dict().items())


def test_export_and_import_keep_function_and_zeros() -> None:
    network = small("vgg16")
    masks = pruned(network, 0.9)
    plain = network.plain()
    assert torch.allclose(plain(images()), network.eval()(images()), rtol=1e-12, atol=1e-12)
    again = small("vgg16", seed=9)
    again.load_state_dict({f"bases.{group}": basis for group, basis in network.bases.items()}, strict=False)
    again.adopt(plain.state_dict(), masks)
    for name, entry in network.prunable().items():
        other = again.prunable()[name]
        assert torch.allclose(entry, other, rtol=1e-10, atol=1e-12)
        assert torch.equal(entry != 0, other != 0)


def test_one_coefficient_makes_a_whole_filter() -> None:
    rotated, spatial = small("vgg16"), small("vgg16", Bases("spatial"))
    masks = pruned(rotated, 0.9)
    pruned(spatial, 0.9)
    some = 0
    for i in rotated.groups:
        used = masks[str(i)].flatten(2).any(2)
        assert torch.equal((rotated.weight(i) != 0).flatten(2).all(2), used)
        assert torch.equal((rotated.weight(i) != 0).flatten(2).any(2), used)
        assert torch.equal(spatial.weight(i) != 0, masks[str(i)])
        some += int((masks[str(i)].flatten(2).sum(2) == 1).sum())
    assert some > 100  # filters of a single coefficient


@pytest.mark.parametrize(
    ("name", "size", "sharing", "groups"),
    [
        ("vgg16", 32, "coarse", {"all_3x3": [*range(1, 14)]}),
        ("vgg16", 32, "medium", {f"conv{i + 1}_3x3": layers for i, layers in enumerate(
            ([1, 2], [3, 4], [5, 6, 7], [8, 9, 10], [11, 12, 13]))}),
        ("resnet50", 224, "coarse", {"all_7x7": [1], "all_3x3": [*range(2, 18)]}),
        ("resnet50", 224, "medium", {"stem_7x7": [1], "stage1_3x3": [2, 3, 4], "stage2_3x3": [5, 6, 7, 8],
                                     "stage3_3x3": [*range(9, 15)], "stage4_3x3": [15, 16, 17]}),
        ("resnet20", 32, "medium", {"stem_3x3": [1], "stage1_3x3": [*range(2, 8)], "stage2_3x3": [*range(8, 14)],
                                    "stage3_3x3": [*range(14, 20)]}),
        ("mobilenet_v1", 32, "medium", {"maps32_3x3": [1, 2], "maps16_3x3": [3, 4], "maps8_3x3": [5, 6],
                                        "maps4_3x3": [*range(7, 13)], "maps2_3x3": [13, 14]}),
    ],
)  # fmt: skip
def test_layers_share_bases_as_the_paper_says(
    name: str, size: int, sharing: Sharing, groups: dict[str, Sequence[int]]
) -> None:
    """Groups list the convolutions with k > 1 by their number among these."""
    space = get_space(name, size, 0.125)
    network = InterspaceNetwork(space, space.uniform(1.0), 0, Bases(sharing))
    found: dict[str, list[int]] = {}
    for number, group in enumerate(network.groups.values(), 1):
        found.setdefault(group, []).append(number)
    assert found == groups
    assert list(network.bases) == list(groups)
    assert basis_parameters(network) == sum(int(group[-1]) ** 4 for group in groups)


@pytest.mark.parametrize("name", SPACES)
def test_fine_bases_are_one_per_layer(name: str) -> None:
    space = get_space(name, 32, 0.125)
    large = [
        node
        for node in space.nodes(space.uniform(1.0))
        if node.layer.op in (Op.CONV, Op.DEPTHWISE) and node.layer.kernel > 1
    ]
    network = InterspaceNetwork(space, space.uniform(1.0))
    assert len(network.bases) == len(large) == len(set(network.groups.values()))
    without = InterspaceNetwork(space, space.uniform(1.0), 0, Bases(first=False))
    assert set(network.groups) - set(without.groups) == ({0} if large else set())
    assert not InterspaceNetwork(space, space.uniform(1.0), 0, Bases("spatial")).groups


def test_bases_of_vgg16_are_next_to_nothing() -> None:
    """13 x 81 numbers of 14.7 M (section 2)."""
    space = get_space("vgg16", 32, 1.0, 10)
    network = InterspaceNetwork(space, space.uniform(1.0))
    assert basis_parameters(network) == 1053
    assert sum(Allowance.at_rate(network.nodes, 0.9).sizes.values()) == sum(
        entry.numel() for entry in network.prunable().values()
    )
    assert basis_parameters(network) / sum(entry.numel() for entry in network.prunable().values()) < 1e-4


def test_costs_are_those_of_the_formulas() -> None:
    space = get_space("vgg16", 32, 1.0, 10)
    network = InterspaceNetwork(space, space.uniform(1.0))
    masks = {name: torch.zeros_like(entry, dtype=torch.bool) for name, entry in network.prunable().items()}
    for mask in masks.values():
        mask.view(-1)[: mask.numel() // 10] = True  # p = 0.9
    costs = {cost.name: cost for cost in layer_costs(network, masks)}
    assert costs["conv5.3"].overhead == pytest.approx(9 / (512 * 0.1), rel=1e-3)  # 17.6 %
    assert costs["conv1.2"].overhead == pytest.approx(9 / (64 * 0.1), rel=1e-3)  # 141 %
    one = costs["conv3.1"]
    assert (one.kept, one.sparse) == (128 * 256 * 9 // 10, 128 * 256 * 9 // 10 * 64)
    assert one.responses == one.sparse + 128 * 81 * 64
    assert one.materialised == 9 * one.kept + one.dense
    classifier = costs["classifier"]
    assert (classifier.basis, classifier.overhead, classifier.materialised) == (None, 0.0, 5120)
    assert sum(cost.dense for cost in costs.values()) == sum(layer_flops(node.layer) for node in network.nodes)
    fine = [cost.responses for cost in costs.values()]
    coarse = InterspaceNetwork(space, space.uniform(1.0), 0, Bases("coarse"))
    assert [cost.responses for cost in layer_costs(coarse, masks)] == fine


def test_a_basis_is_decayed_only_if_asked() -> None:
    def decays(bases: Bases) -> tuple[list[bool], int]:
        network = small(bases=bases)
        decayed, others = network.decayed()
        own = set(map(id, network.bases.values()))
        return [bool(own & set(map(id, part))) for part in (decayed, others)], len(decayed) + len(others)

    (trained, count), (also, same), (frozen, fewer) = (
        decays(Bases("coarse")), decays(Bases("coarse", decayed=True)), decays(Bases("coarse", trained=False)),
    )  # fmt: skip
    assert (trained, also, frozen) == ([False, True], [True, False], [False, False])
    assert count == same == fewer + 1


def test_networks_of_one_seed_have_the_same_coefficients_in_all_bases() -> None:
    made = [small(bases=Bases(sharing, initialisation="orthonormal")) for sharing in ("spatial", "coarse", "fine")]
    for one, other in pairwise(made):
        assert all(torch.equal(a, b) for a, b in zip(one.prunable().values(), other.prunable().values(), strict=True))
