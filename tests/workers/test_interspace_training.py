"""Whole trainings by interspace pruning: invariants 1 and 6, resuming, and what each method does to its masks."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from latency_profiler.cost import Constraint, Metric, flops
from latency_profiler.durable import place
from latency_profiler.errors import InvalidInput
from latency_profiler.spaces.registry import get_space
from workers import checkpoints
from workers.datasets import Data
from workers.evaluation import evaluate
from workers.networks import PlainNetwork
from workers.pruners import scores
from workers.pruners.allowance import Allowance
from workers.pruners.filter_bases import Bases, InterspaceNetwork
from workers.pruners.interspace import InterspaceTrainer
from workers.pruners.interspace_settings import InterspaceSettings, Method
from workers.pruners.masks import sparse_flops
from workers.sgd import Momentum, Rule
from workers.training import ScratchTrainer, TrainingSettings

CPU = torch.device("cpu")
SPACE = get_space("vgg16", 8, 0.0625, 4)
CHANNELS = SPACE.uniform(1.0)
NODES = SPACE.nodes(CHANNELS)
TRAINING = TrainingSettings(epochs=2, batch_size=40, learning_rate=0.05, clip_norm=5.0, weight_decay=1e-2)
METHODS = get_args(Method)
SHORT = {"synflow_rounds": 4, "lottery_share": 0.6, "rigl_every": 3, "rigl_until": 7, "snip_images": 40}
RATE = 0.8
KEPT = Allowance.at_rate(NODES, RATE).maximum
FINE = Bases(initialisation="orthonormal")
SPATIAL = Bases("spatial")


def trainer(
    data: Data, method: Method, bases: Bases = FINE, allowance: Allowance | None = None, **more: Any
) -> InterspaceTrainer:
    given = {name: more.pop(name) for name in ("start", "whole") if name in more}
    options = InterspaceSettings(method, bases, **{**SHORT, **more})
    allowance = allowance or Allowance.at_rate(NODES, RATE)
    return InterspaceTrainer(SPACE, CHANNELS, data, TRAINING, options, allowance, 7, CPU, **given)


def finished(*arguments: Any, **more: Any) -> InterspaceTrainer:
    made = trainer(*arguments, **more)
    made.advance(lambda: False)
    assert made.done == made.total
    return made


def after(steps: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) >= steps


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_pruning_is_bit_equal_to_uninterrupted(method: Method, data: Data, tmp_path) -> None:
    bases = replace(FINE, rate=3.0, decayed=True)
    whole = finished(data, method, bases)
    assert whole.steps == 5
    parts = trainer(data, method, bases)
    for steps in (1, 2, 2, 1, 4, 100):  # within rounds at the beginning, at exchanges, at epochs' ends, to the end
        parts.advance(after(steps))
        sha256 = checkpoints.save(tmp_path, parts.state())
        tensors = checkpoints.load(place(tmp_path, sha256), sha256)
        counters = json.loads(json.dumps(parts.counters(), allow_nan=False))
        parts = trainer(data, method, bases)
        parts.restore(tensors, counters)
    assert parts.done == parts.total
    assert parts.counters() == whole.counters()
    assert equal(parts.state(), whole.state())
    assert parts.judged == whole.judged


@pytest.mark.parametrize("method", METHODS)
def test_with_frozen_identity_bases_every_training_is_standard_pruning(method: Method, data: Data) -> None:
    spatial = finished(data, method, SPATIAL)
    identity = finished(data, method, Bases("medium", trained=False))
    ours, theirs = spatial.state(), identity.state()
    shared = {name: tensor for name, tensor in theirs.items() if not name.startswith("net.bases.")}
    assert equal(ours, shared)
    assert [replace(one, note="") for one in spatial.judged] == [replace(one, note="") for one in identity.judged]
    assert all(torch.equal(basis, torch.eye(9)) for basis in identity.network.bases.values())


def test_standard_pruning_is_an_ordinary_training_under_a_mask(data: Data) -> None:
    pruned = finished(data, "random", SPATIAL)
    network = PlainNetwork(SPACE, CHANNELS, 7)
    masks = Allowance.at_rate(NODES, RATE).best(scores.random_scores(InterspaceNetwork(SPACE, CHANNELS, 7), 7))
    weights = {name: network.get_submodule(part).weight for name in masks for part in _places(network, name)}
    sgd = Momentum(*network.decayed())
    loss = ScratchTrainer(SPACE, CHANNELS, data, TRAINING, 7, CPU)._loss
    clip = pruned._clip
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    for iteration in range(pruned.total):
        images, labels = data.sub_training.training(TRAINING.batch_size, 7, iteration, CPU)
        loss(network.train()(images), labels).backward()
        for name, weight in weights.items():
            weight.grad.mul_(masks[name])
        clip(sgd.parameters)
        sgd.step(Rule(TRAINING.rate(iteration, 5), TRAINING.momentum, TRAINING.weight_decay))
    assert equal(network.state_dict(), pruned.outcome().network.state_dict())
    assert equal(masks, pruned.masks)


def _places(network: PlainNetwork, name: str) -> list[str]:
    return [f"{kind}.{name}" for kind in ("convs", "linears") if name in getattr(network, kind)]


@pytest.mark.parametrize(
    ("method", "bases"),
    [*((method, FINE) for method in METHODS), ("snip", SPATIAL), ("rigl", Bases("coarse", decayed=True))],
)
def test_what_is_pruned_stays_exactly_zero(method: Method, bases: Bases, data: Data) -> None:
    made = trainer(data, method, bases)
    moments = dict(zip(map(id, made._sgd.parameters), made._sgd.moments, strict=True))
    first = {name: basis.detach().clone() for name, basis in made.network.bases.items()}
    while made.done < made.total:
        made.advance(after(1))
        for name, entry in made.network.prunable().items():
            assert not entry[~made.masks[name]].any()
            assert not moments[id(entry)][~made.masks[name]].any()
    assert sum(int(mask.sum()) for mask in made.masks.values()) == KEPT
    assert sum(int((entry != 0).sum()) for entry in made.network.prunable().values()) == KEPT
    assert all(not torch.equal(basis, first[name]) for name, basis in made.network.bases.items())


@pytest.mark.parametrize(
    ("method", "rounds"),
    [("random", [1]), ("snip", [1]), ("grasp", [1]), ("synflow", [1]), ("magnitude", [0, 1, 2]), ("set", [1, 2]),
     ("rigl", [2, 3])],
)  # fmt: skip
def test_masks_are_judged_when_their_training_ends(method: Method, rounds: list[int], data: Data) -> None:
    made = finished(data, method)
    assert [one.round for one in made.judged] == rounds
    last = made.judged[-1]
    assert (last.kept, last.prunable, last.channels) == (KEPT, sum(made.allowance.sizes.values()), CHANNELS)
    assert last.sparse_flops == sparse_flops(NODES, made.masks)
    outcome = made.outcome()
    assert evaluate(outcome.network, data.sub_validation, CPU).accuracy == last.accuracy
    assert len(made.history) == made.total // made.steps
    if method == "magnitude":
        assert [one.kept for one in made.judged] == [last.prunable, round(0.4 * last.prunable), KEPT]
        assert made.judged[0].sparse_flops == flops(SPACE.layers(CHANNELS))


@pytest.mark.parametrize("method", METHODS)
def test_layers_without_weights_are_named(method: Method, data: Data) -> None:
    few = Allowance.within(NODES, Constraint(Metric.PARAMETERS, 10))
    made = finished(data, method, allowance=few, lottery_share=0.99)
    empty = [NODES[int(name)].name for name, mask in made.masks.items() if not mask.any()]
    assert empty
    assert made.judged[-1].note == "; ".join([f"{method}, fine", *(f"{name} has no weights left" for name in empty)])


def test_the_outcome_is_an_ordinary_network_that_can_be_taken_back(data: Data) -> None:
    made = finished(data, "snip")
    outcome = made.outcome()
    assert type(outcome.network) is PlainNetwork
    again = InterspaceNetwork(SPACE, CHANNELS, 0, FINE)
    again.load_state_dict({f"bases.{group}": basis for group, basis in outcome.bases.items()}, strict=False)
    again.adopt(outcome.network.state_dict(), outcome.masks)
    for name, entry in made.network.prunable().items():
        assert torch.allclose(entry, again.prunable()[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(entry != 0, again.prunable()[name] != 0)
    standard = finished(data, "snip", SPATIAL).outcome()
    for name, mask in standard.masks.items():
        for part in _places(standard.network, name):
            assert torch.equal(standard.network.get_submodule(part).weight != 0, mask)


def test_a_lottery_ticket_rewinds_coefficients_and_bases(data: Data) -> None:
    first = trainer(data, "magnitude").network.state_dict()
    made = trainer(data, "magnitude")
    made.advance(after(10))  # the end of the dense training, where the first level begins
    assert (made.done, made.round) == (10, 1)
    for name, tensor in made.network.state_dict().items():
        mask = made.masks.get(name.split(".")[1]) if name.split(".")[0] in ("convs", "linears") else None
        kept = tensor if mask is None or name.endswith("bias") else first[name] * mask
        assert torch.equal(tensor, kept)
        assert mask is not None or torch.equal(tensor, first[name])
    assert not any(moment.any() for moment in made._sgd.moments)
    classical = trainer(data, "magnitude", lottery_rewinds=False)
    classical.advance(after(10))
    assert not torch.equal(classical.network.bases["0_3x3"], first["bases.0_3x3"])


def test_a_trained_network_is_pruned_at_once(data: Data) -> None:
    start = ScratchTrainer(SPACE, CHANNELS, data, TRAINING, 3, CPU)
    start.advance(lambda: False)
    state = start.network.state_dict()
    made = trainer(data, "magnitude", start=state)
    assert len(made._levels) == 2
    made.advance(after(1))
    assert (made.done, made.round) == (0, 1)
    filters = made.network.weight(0).flatten(2)
    left = made.masks["0"].flatten(2).all(2)
    assert torch.allclose(filters[left], state["convs.0.weight"].flatten(2)[left], atol=1e-5)
    made.advance(after(10))  # the end of the first level's training, where the second begins
    assert (made.done, made.round) == (10, 2)
    assert not torch.equal(made.network.norms["0"].bias, state["norms.0.bias"]), "from what was trained last"
    made.advance(lambda: False)
    assert [one.round for one in made.judged] == [1, 2]
    rewound = trainer(data, "magnitude", start=state, lottery_rewinds=True)
    rewound.advance(after(11))
    assert torch.equal(rewound.network.norms["0"].bias, state["norms.0.bias"])


def test_snip_trains_from_other_weights_than_it_scored(data: Data) -> None:
    def start(**more: Any) -> InterspaceTrainer:
        made = trainer(data, "snip", **more)
        made.advance(after(1))
        assert made.done == 0
        return made

    again, same = start(), start(snip_second_start=False)
    assert equal(again.masks, same.masks)
    drawn = InterspaceNetwork(SPACE, CHANNELS, 7, FINE).prunable()["0"] * same.masks["0"]
    assert torch.equal(same.network.prunable()["0"], drawn)
    assert not torch.equal(again.network.prunable()["0"], drawn)
    assert torch.equal(again.network.bases["0_3x3"], same.network.bases["0_3x3"])


def test_set_exchanges_at_the_end_of_an_epoch(data: Data) -> None:
    made = trainer(data, "set")
    made.advance(after(1))
    before = {name: mask.clone() for name, mask in made.masks.items()}
    made.advance(after(4))
    assert equal(made.masks, before)
    made.advance(after(1))
    for name, mask in made.masks.items():
        count = int(before[name].sum())
        assert int(mask.sum()) == count
        assert int((mask & ~before[name]).sum()) == min(int(0.3 * count), mask.numel() - count)
        assert not made.network.prunable()[name][mask & ~before[name]].any()  # new ones begin at zero


def test_rigl_grows_where_the_dense_gradient_is_largest(data: Data) -> None:
    made = trainer(data, "rigl")
    made.advance(after(4))  # the beginning and 3 steps
    before = {name: mask.clone() for name, mask in made.masks.items()}
    values = {name: entry.detach().clone() for name, entry in made.network.prunable().items()}
    twin = InterspaceNetwork(SPACE, CHANNELS, 7, FINE)
    twin.load_state_dict(made.network.state_dict())
    images, labels = data.sub_training.training(TRAINING.batch_size, 7, 3, CPU)
    made._loss(twin.train()(images), labels).backward()
    bases = {name: basis.detach().clone() for name, basis in made.network.bases.items()}
    made.advance(after(1))
    for name, entry in twin.prunable().items():
        come, gone = made.masks[name] & ~before[name], before[name] & ~made.masks[name]
        gradient = entry.grad.abs().masked_fill(before[name], -1.0)
        assert int(come.sum()) == int(gone.sum())
        if come.any() and not (before[name] | come).all():
            assert gradient[come].min() >= gradient[~before[name] & ~come].max()
        assert torch.equal(made.network.prunable()[name][~gone], values[name][~gone])  # no step of the optimiser
    assert equal(bases, {name: basis.detach() for name, basis in made.network.bases.items()})
    assert made.round == 2


@pytest.mark.parametrize("method", ["random", "synflow", "magnitude", "rigl"])
def test_a_bound_on_sparse_flops_is_obeyed(method: Method, data: Data) -> None:
    bound = 0.15 * flops(SPACE.layers(CHANNELS))
    made = finished(data, method, allowance=Allowance.within(NODES, Constraint(Metric.FLOPS, bound)))
    assert 0.9 * bound < made.judged[-1].sparse_flops <= bound


@pytest.mark.parametrize(("decayed", "clip_norm"), [(False, None), (True, None), (False, 0.1)])
def test_bases_may_move_at_a_rate_of_their_own(decayed: bool, clip_norm: float | None, data: Data) -> None:
    """The rate is of the whole step: of decay too, and of a gradient that is clipped as at any other rate."""

    def moved(rate: float) -> tuple[Tensor, Tensor]:
        options = InterspaceSettings("random", Bases("coarse", rate=rate, decayed=decayed))
        training = replace(TRAINING, clip_norm=clip_norm)
        made = InterspaceTrainer(SPACE, CHANNELS, data, training, options, Allowance.at_rate(NODES, RATE), 7, CPU)
        made.advance(after(2))
        return made.network.bases["all_3x3"].detach() - torch.eye(9), made.network.prunable()["0"].detach()

    (whole, ours), (part, theirs) = moved(1.0), moved(0.25)
    assert whole.abs().max() > 1e-4
    assert torch.allclose(part, 0.25 * whole, rtol=1e-3, atol=2e-7)
    assert torch.equal(ours, theirs)


def test_the_whole_training_set_may_be_trained_on(data: Data) -> None:
    part, whole = trainer(data, "random"), trainer(data, "random", whole=True)
    assert (len(part.batches), len(whole.batches)) == (200, 240)


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"method": "best"}, {"synflow_rounds": 0}, {"set_share": 1.0}, {"grasp_temperature": 0.0}):
        with pytest.raises(InvalidInput):
            InterspaceSettings(**wrong)
    for wrong in ({"sharing": "all"}, {"initialisation": "zero"}):
        with pytest.raises(InvalidInput):
            InterspaceSettings.of({"bases": wrong})
    fields = {"method": "set", "epochs": 3, "set_share": None, "bases": {"sharing": "coarse"}}
    assert InterspaceSettings.of(fields) == InterspaceSettings("set", Bases("coarse"))
    assert InterspaceSettings.of({}) == InterspaceSettings()
    assert InterspaceSettings("magnitude").levels(0.5, trained=False) == pytest.approx((1.0, 0.8, 0.64, 0.512, 0.0))
    assert InterspaceSettings("magnitude").levels(0.9, trained=True) == (0.0,)
    annealed = InterspaceSettings("rigl", rigl_annealed=True, rigl_until=100)
    for total, last in ((10_000, 100), (180, 80)):  # at the latest an interval before the end
        shares = [annealed.rigl_share_at(i, total) for i in (0, last // 2, last)]
        assert shares == pytest.approx([0.3, 0.15, 0.0])
    assert InterspaceSettings("rigl").rigl_share_at(99, 180) == 0.3
