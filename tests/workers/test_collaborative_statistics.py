from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_profiler.errors import InvalidInput
from latency_profiler.layers import Op
from latency_profiler.spaces.registry import get_space
from workers.evaluation import recalibrate
from workers.networks import PlainNetwork, run
from workers.pruners.auxiliary import Heads, joints, outputs
from workers.pruners.channel_statistics import ChannelStatistics, Expansion, magnitudes, roots
from workers.pruners.gates import Gate, gated
from workers.pruners.quadratic import Quadratic
from workers.pruners.surgery import _cut

CPU = torch.device("cpu")


class Few:
    """Images and labels as they are."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def plain(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


def made(name: str, width: float, size: int = 8, images: int = 12, classes: int = 4) -> tuple[PlainNetwork, Few]:
    """A network in float64 in eval mode, whose batch norms are those of random images."""
    space = get_space(name, size, width, classes, True)
    random = torch.Generator().manual_seed(3)
    network = PlainNetwork(space, space.uniform(1.0), 5).double()
    for norm in network.norms.values():
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.data.uniform_(0.6, 1.2, generator=random)
        norm.bias.data.uniform_(-0.3, 0.5, generator=random)
    for linear in network.linears.values():
        linear.weight.data.normal_(0.0, 0.3, generator=random)
    pixels = torch.randn(images, 3, size, size, dtype=torch.float64, generator=random)
    few = Few(pixels, torch.randint(0, classes, (images,), generator=random))
    recalibrate(network, few, images, CPU)
    return network, few


def statistics(
    network: PlainNetwork, few: Few, expansion: Expansion = Expansion(), heads: Heads | None = None, weight: float = 1.0
) -> dict[int, Quadratic]:  # fmt: skip
    slots, batch = range(len(network.space.genes)), len(few) if expansion.gate == "centred" else 5
    gathering = ChannelStatistics(network, few, batch, slots, expansion, 0, CPU, heads, weight)
    gathering.advance(lambda: False)
    return gathering.quadratics()


def close(ours: object, theirs: object, tolerance: float = 1e-12) -> bool:
    """Equal up to rounding, whatever their scale."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return bool(np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max()))


def loss_of(network: PlainNetwork, few: Few, gates: dict[int, Tensor], kind: Gate = "activation") -> Tensor:
    return functional.cross_entropy(run(network.nodes, few.images, gated(network, gates, kind)), few.labels)


def slopes_of_weights(network: PlainNetwork, few: Few, slot: int) -> Tensor:
    """a (n, c) by its definition: w_i . dL_n / dw_i, an image at a time, over the rows of the slot's dense layers."""
    layers = [i for i, unit in enumerate(network.space.units) if unit.target.index == slot and unit.op is Op.CONV]
    rows = []
    for image, label in zip(few.images, few.labels, strict=True):
        loss = functional.cross_entropy(network(image[None]), label[None])
        weights = [network.weight(i) for i in layers]
        gradients = torch.autograd.grad(loss, weights)
        rows.append(sum((w * g).flatten(1).sum(1) for w, g in zip(weights, gradients, strict=True)))
    return torch.stack(rows).detach()


@pytest.mark.parametrize(
    ("name", "width"), [("vgg16", 0.05), ("resnet20", 0.25), ("mobilenet_v1", 0.2), ("mobilenet_v2", 0.1)]
)
def test_gates_of_weights_give_what_autograd_gives_image_by_image(name: str, width: float) -> None:
    """Invariants 1 and 2; a depthwise layer only follows its slot's mask (section 4)."""
    network, few = made(name, width)
    found = statistics(network, few, Expansion(gate="weight"))
    for slot in (0, 1, len(network.space.genes) - 1):
        a = slopes_of_weights(network, few, slot)
        assert close(found[slot].u, a.mean(0))
        assert close(found[slot].s, a.T @ a / len(a))
        assert close(np.diag(found[slot].s), (a**2).mean(0))
        assert np.abs(found[slot].u).max() > 1e-4


@pytest.mark.parametrize("kind", ["activation", "weight", "centred"])
@pytest.mark.parametrize(("name", "width"), [("vgg16", 0.05), ("resnet20", 0.25), ("mobilenet_v1", 0.1)])
def test_u_is_the_derivative_of_the_mean_loss_by_shared_gates(name: str, width: float, kind: Gate) -> None:
    """Invariant 1, of all slots of one pass, those that shortcuts and depthwise layers share too."""
    network, few = made(name, width)
    found = statistics(network, few, Expansion(gate=kind))
    gates = {
        i: torch.ones(1, c, dtype=torch.float64, requires_grad=True)
        for i, c in enumerate(network.channels[: len(found)])
    }
    derivatives = torch.autograd.grad(loss_of(network, few, gates, kind), list(gates.values()))
    for slot, derivative in enumerate(derivatives):
        assert close(found[slot].u, derivative[0])


@pytest.mark.parametrize("expansion", [
    Expansion("weight"), Expansion(), Expansion(curvature="gauss_newton"), Expansion(curvature="monte_carlo"),
    Expansion(loss="squared_error", curvature="gauss_newton"),
    Expansion(loss="squared_error", curvature="monte_carlo"),
])  # fmt: skip
def test_s_is_symmetric_and_positive_semidefinite(expansion: Expansion) -> None:
    """Invariant 2."""
    network, few = made("resnet20", 0.25)
    for quadratic in statistics(network, few, expansion).values():
        assert close(quadratic.s, quadratic.s.T, 1e-14)
        assert np.linalg.eigvalsh(quadratic.s).min() >= -1e-12
        assert np.diag(quadratic.s).max() > 0


def test_channels_in_another_order_are_statistics_in_another_order() -> None:
    """Invariant 2."""
    network, few = made("resnet20", 0.25)
    random = torch.Generator().manual_seed(0)
    orders = [torch.randperm(c, generator=random) for c in network.channels]
    moved = PlainNetwork(network.space, network.channels).double()
    state = network.state_dict()
    moved.load_state_dict({key: _cut(key, state[key], network.space.units, orders) for key in state})
    before, after = statistics(network, few), statistics(moved, few)
    for slot, quadratic in before.items():
        order = orders[slot].numpy()
        assert close(after[slot].u, quadratic.u[order])
        assert close(after[slot].s, quadratic.s[np.ix_(order, order)])


def test_the_quadratic_is_the_expansion_in_the_space_of_weights() -> None:
    """Invariant 3: g^T v + v^T H v / 2 with v the change of the kernel and H the mean of its gradients' squares."""
    network, few = made("vgg16", 0.05)
    slot = 2
    layer = next(i for i, unit in enumerate(network.space.units) if unit.target.index == slot)
    gradients = []
    for image, label in zip(few.images, few.labels, strict=True):
        loss = functional.cross_entropy(network(image[None]), label[None])
        gradients.append(torch.autograd.grad(loss, network.weight(layer))[0].flatten())
    g = torch.stack(gradients)
    hessian, kernel = g.T @ g / len(g), network.weight(layer).detach()
    found = statistics(network, few, Expansion(gate="weight"))[slot]
    for kept in np.random.default_rng(0).integers(0, 2, (8, len(found.u))).astype(float):
        v = (torch.from_numpy(kept)[:, None, None, None] * kernel - kernel).flatten()
        assert found.change(kept) == pytest.approx(float(g.mean(0) @ v + v @ hessian @ v / 2), rel=1e-10, abs=1e-12)


def test_the_squared_error_of_a_linear_layer_is_predicted_exactly() -> None:
    """Invariant 4: what follows the last slot's gate is the classifier."""
    network, few = made("vgg16", 0.05)
    slot, c = len(network.space.genes) - 1, 5
    found = statistics(network, few, Expansion(loss="squared_error", curvature="gauss_newton"))[slot]
    targets = functional.one_hot(few.labels, 4).double()

    def loss(kept: Tensor) -> float:
        logits = run(network.nodes, few.images, gated(network, {slot: kept[None]}, "activation"))
        return float((logits - targets).square().sum(1).mean() / 2)

    with torch.no_grad():
        rest = torch.ones(len(found.u) - c, dtype=torch.float64)
        whole = loss(torch.ones(len(found.u), dtype=torch.float64))
        for bits in product((0.0, 1.0), repeat=c):
            kept = torch.cat([torch.tensor(bits, dtype=torch.float64), rest])
            assert loss(kept) - whole == pytest.approx(found.change(kept.numpy()), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("name", "width"), [("vgg16", 0.05), ("resnet20", 0.25), ("mobilenet_v1", 0.1)])
def test_gauss_newton_is_the_hessian_where_gates_meet_piecewise_linear_layers(name: str, width: float) -> None:
    """Invariant 5."""
    network, few = made(name, width)
    found = statistics(network, few, Expansion(curvature="gauss_newton"))
    fisher = statistics(network, few)
    single = [i for i, slot in enumerate(network.space.genes) if "stage" not in slot.name]
    for slot in (single[0], single[-1]):
        hessian = torch.autograd.functional.hessian(
            lambda gate, slot=slot: loss_of(network, few, {slot: gate[None]}),
            torch.ones(network.channels[slot], dtype=torch.float64),
        )
        assert close(found[slot].s, hessian, 1e-10)
        assert np.abs(found[slot].s).max() > 1e-4
        assert not np.allclose(fisher[slot].s, hessian, rtol=0.05)


def outer(expansion: Expansion, logits: Tensor, random: torch.Generator) -> Tensor:
    return sum((torch.einsum("bi,bj->bij", root, root) for root in roots(expansion, logits, random)), torch.zeros(()))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_roots_square_to_the_hessian_of_the_outputs(loss: str) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = logits.softmax(1)
    whole = torch.diag_embed(q) - torch.einsum("bi,bj->bij", q, q) if loss == "cross_entropy" else torch.eye(4)
    random = torch.Generator().manual_seed(1)
    assert torch.allclose(outer(Expansion("activation", loss, "gauss_newton"), logits, random), whole.double())
    drawn = [outer(Expansion("activation", loss, "monte_carlo"), logits, random) for _ in range(2000)]
    assert torch.allclose(torch.stack(drawn).mean(0), whole.double().expand(6, 4, 4), atol=0.08)


def test_twins_are_seen_as_such() -> None:
    """Invariant 8: equal filters with equal consumers."""
    network, few = made("vgg16", 0.05)
    slot, (i, j) = 1, (0, 2)
    state = network.state_dict()
    for key, value in state.items():
        unit = network.space.units[int(key.split(".")[1])]
        if unit.target.index == slot and value.dim():
            value[j] = value[i]
        if unit.source.index == slot and value.dim() > 1:
            value[:, j] = value[:, i]
    s = statistics(network, few)[slot].s
    assert s[i, i] == pytest.approx(s[i, j], rel=1e-12)
    assert s[i, i] == pytest.approx(s[j, j], rel=1e-12)
    assert s[i, i] > 0


def test_a_loss_that_counts_more_has_a_larger_slope_and_curvature() -> None:
    """Invariant 11, by the weight of a head: slopes are linear in it, Gauss-Newton too, the Fisher matrix is not."""
    network, few = made("resnet20", 0.25)
    heads = Heads.spread(network, 1, 0).double()
    slot = 0
    for curvature in ("gauss_newton", "fisher"):
        at = [statistics(network, few, Expansion(curvature=curvature), heads, w)[slot] for w in (0.0, 1.0, 2.0, 3.0)]
        assert close(at[2].u - at[0].u, 2 * (at[1].u - at[0].u))
        second = [at[k + 2].s - 2 * at[k + 1].s + at[k].s for k in (0, 1)]
        assert close(second[0], second[1])
        if curvature == "gauss_newton":
            assert close(second[0], 0)
            assert np.abs(at[1].s - at[0].s).max() > 1e-6
        else:
            assert np.abs(second[0]).max() > 1e-8
            assert np.linalg.eigvalsh(second[0]).min() > -1e-13


def test_a_slot_is_judged_by_the_first_head_behind_it_too() -> None:
    network, few = made("resnet20", 0.25)
    heads = Heads.spread(network, 2, 0).double()
    found = statistics(network, few, heads=heads)
    alone = statistics(network, few)
    gates = {i: torch.ones(1, c, dtype=torch.float64, requires_grad=True) for i, c in enumerate(network.channels)}
    _, *others = outputs(network, heads, few.images, gates, "activation")
    losses = [functional.cross_entropy(one, few.labels) for one in others]
    heard = set()
    for slot, quadratic in found.items():
        k = heads.behind(slot)
        extra = 0 if k is None else torch.autograd.grad(losses[k], gates[slot], retain_graph=True)[0][0]
        assert close(quadratic.u, alone[slot].u + np.asarray(extra))
        heard.add(k)
    assert heard == {0, 1, None}


def test_heads_stand_where_all_later_layers_see_the_image_through_them() -> None:
    space = get_space("resnet20", 8, 0.25, 4, True)
    names = [space.units[i].name for i in joints(space)]
    assert names == ["stem", *(f"stage{i}.{k}.conv2" for i, k in product((1, 2, 3), range(3)))][:-1]
    network = PlainNetwork(space, space.uniform(1.0))
    assert [space.units[i].name for i in Heads.spread(network, 2, 0).nodes] == ["stage1.2.conv2", "stage2.2.conv2"]
    with pytest.raises(InvalidInput, match="1 to 9"):
        Heads.spread(network, 10, 0)


def test_magnitudes_are_sums_of_filters_over_all_that_end_in_a_slot() -> None:
    network, _ = made("resnet20", 0.25)
    u = magnitudes(network, 1).u
    ends = [i for i, unit in enumerate(network.space.units) if unit.target.index == 1]
    expected = sum(np.abs(network.weight(i).detach().numpy()).sum((1, 2, 3)) for i in ends)
    assert len(ends) == 4
    assert np.allclose(u, -expected)


def test_a_pass_can_stop_after_any_batch() -> None:
    network, few = made("resnet20", 0.25)
    whole = statistics(network, few, Expansion(curvature="monte_carlo"))
    monte_carlo = Expansion(curvature="monte_carlo")
    gathering = ChannelStatistics(network, few, 5, range(12), monte_carlo, 0, CPU)
    for done in (1, 2, 3):
        gathering.advance(lambda: True)
        assert gathering.done == done
        again = ChannelStatistics(network, few, 5, range(12), monte_carlo, 0, CPU)
        again.restore({name: tensor.clone() for name, tensor in gathering.state().items()}, gathering.counters())
        gathering = again
    assert gathering.total == 3
    for slot, quadratic in gathering.quadratics().items():
        assert (quadratic.u == whole[slot].u).all()
        assert (quadratic.s == whole[slot].s).all()
