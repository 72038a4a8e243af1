"""Thresholds, masks and what they keep: invariants 2, 3, 8 and 9 of the specification."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from workers.datasets import Data
from workers.evaluation import kept as held
from workers.networks import PlainNetwork
from workers.pruners import activity, goals, sensitivity
from workers.pruners import masks as m

LENET_300_100 = {"fc1": 0.08, "fc2": 0.09, "classifier": 0.26}
LENET_5 = {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "classifier": 0.19}
"""Densities of the published tables."""


def network_of(name: str, size: int = 28, width: float = 1.0, seed: int = 0) -> PlainNetwork:
    space = get_space(name, size, width, 10, True)
    return PlainNetwork(space, space.channels(space.largest), seed)


def layers(seed: int, *shapes: tuple[int, ...]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {str(i): torch.randn(shape, generator=random) * (i + 1) for i, shape in enumerate(shapes)}


def whole(weights: dict[str, Tensor]) -> m.Masks:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.0, 3.0))
def test_a_mask_is_where_weights_reach_quality_times_deviation(seed: int, quality: float) -> None:
    weights = layers(seed, (7, 11), (5, 3, 3, 3))
    deviations = m.deviations(weights)
    thresholds = {name: quality * deviations[name] for name in weights}
    masks = m.pruned(weights, whole(weights), thresholds)
    for name, weight in weights.items():
        array = weight.double().numpy()
        assert deviations[name] == pytest.approx(np.std(array), rel=1e-12), "ddof 0, mean subtracted"
        np.testing.assert_array_equal(masks[name].numpy(), np.abs(array) >= quality * deviations[name])
    assert quality > 0 or m.kept(masks) == 77 + 135, "quality 0 keeps everything"


def test_a_quality_prunes_what_it_should_of_gaussian_and_of_uniform_weights() -> None:
    """erf(q / sqrt(2)) of Gaussian weights, q / sqrt(3) of uniform ones."""
    random = torch.Generator().manual_seed(0)
    gaussian, uniform = torch.randn(300_000, generator=random), torch.rand(300_000, generator=random) * 2 - 1
    for quality in (0.5, 1.0, 1.5):
        for weight, share in ((gaussian, math.erf(quality / 2**0.5)), (uniform, quality / 3**0.5)):
            weights = {"0": weight}
            masks = m.pruned(weights, whole(weights), {"0": quality * m.deviations(weights)["0"]})
            assert 1 - m.kept(masks) / 300_000 == pytest.approx(share, abs=0.004)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.1, 3.0), st.integers(-20, 20), st.floats(0.01, 100))
def test_masks_do_not_depend_on_the_scale_of_weights(seed: int, quality: float, power: int, factor: float) -> None:
    weights = layers(seed, (9, 13))
    threshold = quality * m.deviations(weights)["0"]
    before = m.pruned(weights, whole(weights), {"0": threshold})["0"]
    for scale in (2.0**power, factor):
        scaled = {"0": weights["0"] * scale}
        after = m.pruned(scaled, whole(scaled), {"0": quality * m.deviations(scaled)["0"]})["0"]
        doubtful = (weights["0"].abs() - threshold).abs() < 1e-5 * threshold  # where rounding may decide
        assert torch.equal(after | doubtful, before | doubtful)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.floats(0.0, 2.0), min_size=2, max_size=5))
def test_masks_only_shrink(seed: int, qualities: list[float]) -> None:
    """Also where weights grow again between the rounds."""
    weights = layers(seed, (9, 13))
    masks = whole(weights)
    for i, quality in enumerate(qualities):
        now = m.pruned(weights, masks, {"0": quality * m.deviations(weights, masks)["0"]})
        assert not (now["0"] & ~masks["0"]).any()
        masks, weights = now, layers(seed + i + 1, (9, 13))


def test_deviations_are_of_survivors_where_masks_are_given() -> None:
    weights = {"0": torch.tensor([0.0, 1.0, 3.0, 0.0]), "1": torch.ones(3)}
    masks = {"0": torch.tensor([False, True, True, False]), "1": torch.zeros(3, dtype=torch.bool)}
    assert m.deviations(weights, masks) == {"0": 1.0, "1": 0.0}
    assert m.deviations(weights)["0"] == pytest.approx(np.std([0, 1, 3, 0]))


@pytest.mark.parametrize(
    ("name", "densities", "thousands", "total"),
    [("lenet_300_100", LENET_300_100, 22, 266_200), ("lenet_5", LENET_5, 36, 430_500)],
)
def test_published_densities_give_the_published_counts(
    name: str, densities: dict[str, float], thousands: int, total: int
) -> None:
    network = network_of(name)
    weights, masks = m.prunable(network), m.full(network)
    assert m.kept(masks) == sum(weight.numel() for weight in weights.values()) == total
    by_index = {i: densities[network.nodes[int(i)].name] for i in weights}
    masks = m.pruned(weights, masks, m.at_densities(weights, masks, by_index))
    for i, mask in masks.items():
        assert int(mask.sum()) == round(by_index[i] * mask.numel())
    assert round(m.kept(masks) / 1000) == thousands
    assert round(total / m.kept(masks)) == 12


@settings(max_examples=25)
@given(st.integers(0, 500), st.integers(0, 250), st.sampled_from(["parameters", "flops"]))
def test_a_budget_is_met_exactly_by_one_multiple_of_all_scales(seed: int, maximum: int, metric: str) -> None:
    weights = layers(seed, (7, 11), (5, 3, 3, 3))
    scales, prices = {"0": 0.7, "1": 2.1}, {"0": 1, "1": 4 if metric == "flops" else 1}
    thresholds = m.fitting(weights, whole(weights), scales, lambda masks: m.cost(masks, prices) <= maximum)
    masks = m.pruned(weights, whole(weights), thresholds)
    spent = m.cost(masks, prices)
    assert spent <= maximum
    assert spent > maximum - max(prices.values()) or m.kept(masks) == 77 + 135
    ranks = torch.cat([(weights[i].abs().double() / scales[i]).flatten() for i in weights])
    chosen = torch.cat([masks[i].flatten() for i in weights])
    if chosen.any() and not chosen.all():
        assert ranks[chosen].min() > ranks[~chosen].max()


def test_equal_weights_stay_or_go_together() -> None:
    weights = {"0": torch.tensor([1.0, -2.0, 2.0, 2.0, 3.0])}
    thresholds = m.fitting(weights, whole(weights), {"0": 1.0}, lambda masks: m.kept(masks) <= 3)
    assert m.pruned(weights, whole(weights), thresholds)["0"].tolist() == [False, False, False, False, True]


@pytest.mark.parametrize(("maximum", "kept"), [(2, 2), (1, 0)])
def test_layers_without_deviation_stay_last_and_keep_the_budget(maximum: int, kept: int) -> None:
    weights = {"0": torch.tensor([0.5]), "1": torch.tensor([-0.2]), "2": torch.tensor([0.1, -0.3, 0.2])}
    thresholds = m.fitting(
        weights, whole(weights), m.deviations(weights), lambda masks: m.kept(masks) <= maximum
    )  # fmt: skip
    masks = m.pruned(weights, whole(weights), thresholds)
    assert m.kept(masks) == int(masks["0"]) + int(masks["1"]) == kept


def test_steps_and_one_shot_keep_as_many_and_the_same_unless_weights_move_between() -> None:
    weights = layers(3, (30, 40), (8, 5, 3, 3))
    densities = {"0": 0.1, "1": 0.3}
    once = m.pruned(weights, whole(weights), m.at_densities(weights, whole(weights), densities))
    for moving in (False, True):
        masks, now, by = whole(weights), weights, layers(9, (30, 40), (8, 5, 3, 3))
        for share in (0.25, 0.5, 0.75, 1.0):
            steps = {name: density**share for name, density in densities.items()}
            masks = m.pruned(now, masks, m.at_densities(now, masks, steps))
            now = {i: weight * (1 + 0.5 * moving * by[i].tanh()) for i, weight in now.items()}
        for name in weights:
            assert masks[name].sum() == once[name].sum() == round(densities[name] * weights[name].numel())
        assert all(torch.equal(masks[name], once[name]) for name in weights) is not moving


def round_at(network: PlainNetwork, number: int, rounds: int) -> goals.Round:
    weights = m.prunable(network)
    scales = m.deviations(weights)
    return goals.Round(number, rounds, network.nodes, m.full(network), weights, scales, lambda masks: masks)


def test_goals_say_how_far_a_round_goes() -> None:
    network = network_of("lenet_300_100")
    weights, full = m.prunable(network), m.full(network)
    half = goals.Budget("parameters", 266_200 // 100)
    for number, allowed in ((1, 26_620), (2, 2_662)):
        masks = m.pruned(weights, full, goals.thresholds(half, round_at(network, number, 2)))
        assert m.kept(masks) == allowed
    assert goals.thresholds(goals.Growth(0.01, 0.5), round_at(network, 3, 9)) == {
        name: 1.5 * deviation for name, deviation in m.deviations(weights).items()
    }
    masks = m.pruned(weights, full, goals.thresholds(goals.Densities({"fc2": 0.01}), round_at(network, 1, 2)))
    assert [int(mask.sum()) for mask in masks.values()] == [235_200, 3_000, 1_000], "unnamed layers keep everything"


def test_sparse_flops_are_kept_weights_times_the_pixels_of_their_layers_output() -> None:
    network = network_of("lenet_5")
    masks = {name: torch.rand(mask.shape) < 0.3 for name, mask in m.full(network).items()}
    counts = [int(mask.sum()) for mask in masks.values()]
    flops = m.cost(masks, m.positions(network.nodes, masks))
    assert flops == counts[0] * 24**2 + counts[1] * 8**2 + counts[2] + counts[3]


def products(x: Tensor, weight: Tensor) -> int:
    """Multiply-adds of a linear layer whose numbers are both not zero, one by one."""
    pairs = (zip(row, out, strict=True) for row in x.tolist() for out in weight.tolist())
    return sum(int(a != 0 and b != 0) for pair in pairs for a, b in pair)


def test_flops_share_is_weights_times_inputs() -> None:
    """Every input of fc2 meets two kept weights of five: then the formula counts what is there, whatever is zero."""
    space: Space = get_space("lenet_300_100", 8, 0.05, 4, True)
    network = PlainNetwork(space, (9, 5), 0)
    masks = m.full(network)
    for column in range(9):
        masks["1"][:, column] = False
        masks["1"][[column % 5, (column + 2) % 5], column] = True
    masks["2"][1] = False
    m.clear(network, masks)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    read: dict[int, Tensor] = {}

    def compute(i: int, x: Tensor) -> Tensor:
        read[i] = x.flatten(1)
        return network.compute(i, x)

    network.run(images, compute)
    found = activity.measure(network, masks, Images(images), torch.device("cpu"))
    assert [one.layer for one in found] == ["fc1", "fc2", "classifier"]
    assert 0 < found[1].inputs < 1
    assert found[0].flops_share == 1.0
    for i in (1, 2):
        counted = products(read[i].detach(), network.weight(i).detach())
        assert found[i].flops_share * found[i].flops * 6 == pytest.approx(counted)


class Images:
    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def plain(self, batch_size: int, device: torch.device):  # type: ignore[no-untyped-def]
        yield self._images[:4], torch.zeros(4)
        yield self._images[4:], torch.zeros(len(self._images) - 4)


@pytest.mark.parametrize(
    ("net", "rows"),
    [
        ("LeNet-300-100", [(235.2, 38, 8, 8), (30, 65, 9, 4), (1, 100, 26, 17)]),
        ("LeNet-5", [(0.5, 82, 66, 66), (25, 72, 12, 10), (400, 55, 8, 6), (5, 100, 19, 10)]),
    ],
)
def test_the_formula_gives_the_published_flops_shares(net: str, rows: list[tuple[float, ...]]) -> None:
    """Columns: thousand weights, activation %, weights %, FLOP %; published numbers are rounded to whole percents."""
    before = 100.0
    for _, active, weights, flops in rows:
        one = activity.Activity(net, weights / 100, before / 100, 1)
        assert 100 * one.flops_share == pytest.approx(flops, abs=1.2)
        before = active


def test_silent_layers_are_named(data: Data) -> None:
    network = network_of("lenet_300_100", 8, 0.1)
    network.bias(0).data.fill_(-100.0)
    network.bias(1).data.fill_(1.0)
    found = activity.measure(network, m.full(network), held(data.sub_validation, 8), torch.device("cpu"))
    assert activity.silent(found) == ["fc2"]


def test_sensitivity_prunes_one_layer_and_puts_it_back() -> None:
    network = network_of("lenet_300_100", 8, 0.1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen: list[list[int]] = []

    def accuracy(judged: PlainNetwork) -> float:
        seen.append([int((weight != 0).sum()) for weight in m.prunable(judged).values()])
        return 0.5

    sizes = [weight.numel() for weight in m.prunable(network).values()]
    point = sensitivity.measure(network, "1", 0.3, accuracy)
    assert seen == [[sizes[0], round(0.3 * sizes[1]), sizes[2]]]
    weight = network.weight(1).double()
    assert int((weight.abs() >= point.quality * weight.std(correction=0) * (1 - 1e-9)).sum()) == round(0.3 * sizes[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_largest_quality_whose_loss_is_allowed_is_chosen() -> None:
    points = [
        sensitivity.Point("0", 0.9, 0.1, 0.99), sensitivity.Point("0", 0.5, 0.7, 0.96),
        sensitivity.Point("0", 0.2, 1.3, 0.91), sensitivity.Point("1", 0.9, 0.2, 0.7),
        sensitivity.Point("1", 0.5, 0.8, 0.6),
    ]  # fmt: skip
    assert sensitivity.choose(points, 0.98, 0.02) == {"0": 0.7, "1": 0.2}
    assert sensitivity.choose(points, 0.98, 0.5) == {"0": 1.3, "1": 0.8}
