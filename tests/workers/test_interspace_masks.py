"""How much masks keep: exact counts of invariant 6, bounds on sparse FLOPs, and how dynamic masks are spread."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_profiler.cost import Constraint, Metric, flops, parameters
from latency_profiler.errors import InfeasibleConstraint, InvalidInput
from latency_profiler.spaces.registry import SPACES, get_space
from latency_profiler.spaces.space import WEIGHTED
from workers.datasets import generator
from workers.networks import PlainNetwork
from workers.pruners.allowance import Allowance, largest, sizes
from workers.pruners.dynamic import Densities, cosine, exchanged, layer_counts, starting_masks
from workers.pruners.filter_bases import Bases, InterspaceNetwork
from workers.pruners.masks import sparse_flops
from workers.pruners.scores import Scores, random_scores

SPACE = get_space("resnet20", 16, 0.25, 4)
NETWORK = InterspaceNetwork(SPACE, SPACE.uniform(1.0))
NODES, SCORES = NETWORK.nodes, random_scores(NETWORK, 1)
SHAPES = {name: tuple(entry.shape) for name, entry in NETWORK.prunable().items()}
D = sum(entry.numel() for entry in NETWORK.prunable().values())


@pytest.mark.parametrize("name", SPACES)
def test_prunable_are_all_weights_and_nothing_else(name: str) -> None:
    space = get_space(name, 32, 0.125, 7)
    layers, channels = space.layers(space.uniform(1.0)), space.uniform(1.0)
    biases = sum(layer.c_out for layer in layers if layer.op in WEIGHTED and not layer.norm)
    norms = sum(2 * layer.c_out for layer in layers if layer.norm)
    counted = sizes(space.nodes(channels))
    assert sum(counted.values()) == parameters(layers) - biases - norms
    for bases in (Bases("spatial"), Bases("fine"), Bases("coarse")):
        theta = InterspaceNetwork(space, channels, 0, bases).prunable()
        assert {name: entry.numel() for name, entry in theta.items()} == counted


@given(st.floats(0.0, 0.9999))
@settings(deadline=None, max_examples=40)
def test_a_rate_keeps_an_exact_number_of_the_best(rate: float) -> None:
    masks = Allowance.at_rate(NODES, rate).best(SCORES)
    assert sum(int(mask.sum()) for mask in masks.values()) == round((1 - rate) * D)
    kept = [SCORES[name][mask] for name, mask in masks.items() if mask.any()]
    gone = [SCORES[name][~mask] for name, mask in masks.items() if not mask.all()]
    if kept and gone:
        assert min(one.min() for one in kept) >= max(one.max() for one in gone)


def test_of_equal_scores_the_first_are_kept_and_what_is_pruned_stays() -> None:
    equal: Scores = {name: torch.ones_like(score) for name, score in SCORES.items()}
    masks = Allowance.at_rate(NODES, 0.5).best(equal)
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert flat[: D // 2].all()
    assert not flat[D // 2 :].any()
    fewer = Allowance.at_rate(NODES, 0.75).best(SCORES, masks)
    assert sum(int(mask.sum()) for mask in fewer.values()) == D // 4
    assert all(not (mask & ~masks[name]).any() for name, mask in fewer.items())


@given(st.floats(0.001, 1.2), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_sparse_flops_obey_their_bound_and_use_it(share: float, seed: int) -> None:
    dense = flops([node.layer for node in NODES])
    allowance = Allowance.within(NODES, Constraint(Metric.FLOPS, share * dense))
    scores = random_scores(NETWORK, seed)
    masks = allowance.best(scores)
    spent = sparse_flops(NODES, masks)
    assert allowance.total == dense
    assert spent <= share * dense
    if share < 1:  # the next entry in the order, of any layer, would be over the bound
        left = {name: score.masked_fill(masks[name], -1.0) for name, score in scores.items()}
        following = max(left, key=lambda name: float(left[name].max()))
        assert spent + NODES[int(following)].layer.out_size ** 2 > share * dense
    else:
        assert spent == dense


def test_a_bound_on_parameters_counts_entries() -> None:
    masks = Allowance.within(NODES, Constraint(Metric.PARAMETERS, 1234.9)).best(SCORES)
    assert sum(int(mask.sum()) for mask in masks.values()) == 1234
    assert Allowance.within(NODES, Constraint(Metric.PARAMETERS, 10.0 * D)).maximum == D


def test_what_cannot_be_allowed_is_refused() -> None:
    with pytest.raises(InfeasibleConstraint, match="parameters"):
        Allowance.within(NODES, Constraint(Metric.PARAMETERS, 0.5))
    with pytest.raises(InvalidInput, match="latency"):
        Allowance.within(NODES, Constraint(Metric.LATENCY, 0.001, device="d"))
    for rate in (1.0, -0.1, math.nan):
        with pytest.raises(InvalidInput, match="pruning rate"):
            Allowance.at_rate(NODES, rate)
    with pytest.raises(InvalidInput, match="diverged"):
        Allowance.at_rate(NODES, 0.5).best({**SCORES, "0": SCORES["0"] * math.nan})


@pytest.mark.parametrize("densities", get_args(Densities))
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
def test_layers_get_their_densities_and_together_the_exact_number(densities: Densities, rate: float) -> None:
    counts = layer_counts(SHAPES, Allowance.at_rate(NODES, rate), densities)
    assert sum(counts.values()) == round((1 - rate) * D)
    raw = {
        name: {
            "erk": sum(shape) / math.prod(shape), "er": sum(shape[:2]) / math.prod(shape[:2]), "uniform": 1.0,
        }[densities]
        for name, shape in SHAPES.items()
    }  # fmt: skip
    partly = [name for name in SHAPES if counts[name] < math.prod(SHAPES[name])]
    factor = max((counts[name] - 1) / math.prod(SHAPES[name]) / raw[name] for name in partly)
    for name, shape in SHAPES.items():
        expected = min(1.0, factor * raw[name]) * math.prod(shape)
        assert counts[name] == pytest.approx(expected, rel=0.02, abs=1.01)


def test_densities_obey_a_bound_on_sparse_flops() -> None:
    bound = 0.1 * flops([node.layer for node in NODES])
    allowance = Allowance.within(NODES, Constraint(Metric.FLOPS, bound))
    for densities in get_args(Densities):
        masks = starting_masks(SCORES, layer_counts(SHAPES, allowance, densities))
        assert 0.999 * bound < sparse_flops(NODES, masks) <= bound


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_an_exchange_keeps_the_number_and_takes_the_right_ones(active: int, share: float, seed: int) -> None:
    random = generator(seed)
    magnitudes, growth = (torch.rand(4, 100, generator=random) for _ in range(2))
    mask = largest(torch.rand(4, 100, generator=random), active)
    after = exchanged(magnitudes * mask, mask, growth, share)
    gone, come = mask & ~after, after & ~mask
    moved = min(int(share * active), 400 - active)
    assert int(after.sum()) == active
    assert int(gone.sum()) == int(come.sum()) == moved
    if moved:
        assert magnitudes[gone].max() <= magnitudes[mask & after].min() if (mask & after).any() else True
        left = ~mask & ~after
        assert growth[come].min() >= growth[left].max() if left.any() else True


def test_the_share_falls_along_a_cosine() -> None:
    assert [cosine(0.3, i, 100) for i in (0, 50, 100, 200)] == pytest.approx([0.3, 0.15, 0.0, 0.0])


def test_plain_networks_have_as_many_entries() -> None:
    plain = PlainNetwork(SPACE, SPACE.uniform(1.0))
    convs = sum(conv.weight.numel() for conv in plain.convs.values())  # type: ignore[union-attr, operator]
    assert sum(linear.weight.numel() for linear in plain.linears.values()) + convs == D  # type: ignore[union-attr, operator]
