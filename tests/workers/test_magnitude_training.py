"""Training under masks: invariants 1, 4 and 6 of the specification."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from latency_profiler.spaces.registry import get_space
from workers.networks import PlainNetwork
from workers.pruners import dropout
from workers.pruners import masks as m
from workers.pruners.descent import Adam, Group, MaskedDescent, Optimiser, Penalty
from workers.sgd import Momentum, Rule

SPACES = [("lenet_300_100", 8, 0.1), ("lenet_5", 8, 0.2), ("vgg16", 8, 0.05)]


def pruned_network(name: str, size: int, width: float, density: float = 0.3) -> tuple[PlainNetwork, m.Masks]:
    space = get_space(name, size, width, 4, True)
    network = PlainNetwork(space, space.channels(space.largest), 0)
    weights, full = m.prunable(network), m.full(network)
    masks = m.pruned(weights, full, m.at_densities(weights, full, dict.fromkeys(full, density)))
    m.clear(network, masks)
    return network, masks


def descent(
    network: PlainNetwork, masks: m.Masks, group: Group = "all", optimiser: Optimiser = "momentum",
    penalty: Penalty = "l2", decay: float = 1e-2,
) -> MaskedDescent:  # fmt: skip
    return MaskedDescent(network, masks, group, optimiser=optimiser, momentum=0.9, penalty=penalty, decay=decay)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(8, 3, 8, 8, generator=random), torch.randint(0, 4, (8,), generator=random)


def train(network: PlainNetwork, by: MaskedDescent, steps: int, rate: float = 0.05) -> None:
    for images, labels in batches(steps):
        by.hold()
        functional.cross_entropy(network(images), labels).backward()
        by.mask_gradients()
        by.step(rate)


@pytest.mark.parametrize(("name", "size", "width"), SPACES)
def test_a_masked_network_computes_with_weights_times_masks_and_learns_by_their_gradient(
    name: str, size: int, width: float
) -> None:
    """Against the dense weights, multiplied by their masks inside the graph."""
    space = get_space(name, size, width, 4, True)
    dense = PlainNetwork(space, space.channels(space.largest), 0)
    network, masks = pruned_network(name, size, width)
    images, labels = next(batches(1))
    kinds = {i: "linears" if i in dense.linears else "convs" for i in masks}
    free = {i: dense.weight(int(i)).detach().clone().requires_grad_() for i in masks}
    products = {f"{kinds[i]}.{i}.weight": free[i] * masks[i] for i in masks}
    expected = torch.func.functional_call(dense, products, images)
    assert torch.equal(network(images), expected)
    functional.cross_entropy(expected, labels).backward()
    by = descent(network, masks)
    by.hold()
    functional.cross_entropy(network(images), labels).backward()
    by.mask_gradients()
    for i, mask in masks.items():
        gradient, wanted = network.weight(int(i)).grad, free[i].grad
        assert gradient is not None
        assert wanted is not None
        assert not gradient[~mask].any()
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize(("name", "size", "width"), SPACES)
def test_pruned_weights_stay_exactly_zero(
    name: str, size: int, width: float, optimiser: Optimiser, penalty: Penalty
) -> None:
    network, masks = pruned_network(name, size, width)
    by = descent(network, masks, "all", optimiser, penalty)
    before = {i: weight.clone() for i, weight in m.prunable(network).items()}
    train(network, by, 5)
    for i, weight in m.prunable(network).items():
        assert not weight[~masks[i]].any()
        assert (weight != before[i])[masks[i]].all(), "survivors are trained"
    for name, tensor in by.state().items():
        if name.endswith("weight") and ".norms." not in name:
            assert not tensor[~masks[name.split(".")[2]]].any()


@pytest.mark.parametrize("make", [Momentum, Adam])
def test_zeroing_gradients_alone_would_not_hold_pruned_weights(make: type[Momentum] | type[Adam]) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    by = make([weight], [])
    weight.grad = torch.tensor([0.5, 0.5])
    by.step(Rule(0.1, 0.9, 0.0))
    with torch.no_grad():
        weight[1] = 0.0
    weight.grad = torch.tensor([0.5, 0.0])
    by.step(Rule(0.1, 0.9, 0.0))
    assert weight[1].item() < -0.03


def test_adam_is_torchs() -> None:
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=random), torch.randn(5, generator=random)]
    mine, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    ours = Adam(mine[:1], mine[1:])
    reference = torch.optim.Adam([{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}], lr=0.02)
    for _ in range(7):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        ours.step(Rule(0.02, 0.9, 0.1))
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_penalties_are_the_gradients_of_sums_of_squares_and_of_sizes() -> None:
    """Against torch's SGD on the loss with the penalty written out."""
    images, labels = next(batches(1))
    for penalty in ("l1", "l2"):
        network, masks = pruned_network("lenet_300_100", 8, 0.1)
        other, _ = pruned_network("lenet_300_100", 8, 0.1)
        by = descent(network, masks, penalty=penalty, decay=0.03)  # type: ignore[arg-type]
        reference = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
        for _ in range(2):
            functional.cross_entropy(network(images), labels).backward()
            by.mask_gradients()
            by.step(0.05)
            parts = [p.abs().sum() if penalty == "l1" else p.square().sum() / 2 for p in other.parameters()]
            reference.zero_grad()
            (functional.cross_entropy(other(images), labels) + 0.03 * torch.stack(parts).sum()).backward()
            reference.step()
            m.clear(other, masks)
            for i, mask in masks.items():
                reference.state[other.linears[i].weight]["momentum_buffer"].masked_fill_(~mask, 0.0)
        for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("group", "still"), [("fc", ("convs", "norms")), ("conv", ("linears",))])
@pytest.mark.parametrize(("name", "size", "width"), SPACES[1:])
def test_the_other_group_holds_still_bit_by_bit(
    name: str, size: int, width: float, group: Group, still: tuple[str, ...]
) -> None:
    """Parameters, and statistics of batch norms."""
    network, masks = pruned_network(name, size, width)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    train(network, descent(network, masks, group), 4)
    for key, tensor in network.state_dict().items():
        if key.startswith(still):
            assert torch.equal(tensor, before[key]), key
        elif not key.endswith("num_batches_tracked"):
            assert not torch.equal(tensor, before[key]), key


@settings(max_examples=50)
@given(st.floats(0, 0.95), st.integers(1, 10_000), st.data())
def test_dropout_is_adjusted_by_equation_2(original: float, connections: int, drawn: st.DataObject) -> None:
    kept = drawn.draw(st.integers(0, connections))
    fewer = drawn.draw(st.integers(0, kept))
    rate = dropout.adjusted(original, kept, connections)
    assert 0 <= dropout.adjusted(original, fewer, connections) <= rate <= original
    assert dropout.adjusted(original, connections, connections) == original
    assert dropout.adjusted(original, 0, connections) == 0
    if kept:  # from round to round or at once
        assert dropout.adjusted(rate, fewer, kept) == pytest.approx(dropout.adjusted(original, fewer, connections))


def test_dropout_rates_of_the_specification() -> None:
    assert [round(dropout.adjusted(0.5, percent, 100), 2) for percent in (9, 4, 25)] == [0.15, 0.1, 0.25]


def test_hidden_neurons_are_dropped_as_their_own_layers_connections_say() -> None:
    network, masks = pruned_network("lenet_5", 8, 0.2, 0.25)
    rates = dropout.rates(network.nodes, masks, 0.5)
    assert list(rates) == [4], "neither convolutions nor classes"
    assert rates[4] == pytest.approx(0.25, abs=1e-3)


def test_dropout_keeps_the_mean_depends_on_counters_alone_and_is_shared_by_processes() -> None:
    x = torch.ones(64, 500)
    whole = dropout.drop(x, 0.3, 64, slice(0, 64), 1, 17, 2)
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert whole.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(whole, dropout.drop(x, 0.3, 64, slice(0, 64), 1, 17, 2))
    assert not torch.equal(whole, dropout.drop(x, 0.3, 64, slice(0, 64), 1, 18, 2))
    parts = [dropout.drop(x[part], 0.3, 64, part, 1, 17, 2) for part in (slice(0, 20), slice(20, 64))]
    assert torch.equal(torch.cat(parts), whole)
