"""Runs from the dense network to the pruned one."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from latency_profiler.durable import place
from latency_profiler.errors import BudgetMissed, InvalidInput, LayerEmptied
from latency_profiler.graphs import build_model
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from workers import checkpoints
from workers.datasets import Data
from workers.evaluation import evaluate
from workers.networks import folded_weights
from workers.pruners import masks as m
from workers.pruners.goals import Budget, Densities, Growth
from workers.pruners.magnitude import MagnitudePruner
from workers.pruners.schedule import MagnitudeSettings, Scan
from workers.training import TrainingSettings

CPU = torch.device("cpu")
LENET = get_space("lenet_300_100", 8, 0.1, 4, True)
CONVOLUTIONAL = get_space("lenet_5", 8, 0.2, 4, True)
NORMED = get_space("vgg16", 8, 0.05, 4, True)
TRAINING = TrainingSettings(epochs=4, batch_size=40, learning_rate=0.05, weight_decay=1e-3, label_smoothing=0.0)
SETTINGS = MagnitudeSettings(TRAINING, Budget("parameters", 300), rounds=2, retraining_epochs=1)
EVERYTHING = replace(
    SETTINGS, qualities=Scan((0.8, 0.2), 0.05), dropout=0.4, alternate=True, retraining_penalty="l1",
    retraining_epochs=2, std_over="initial",
)  # fmt: skip


def pruner(space: Space, data: Data, settings: MagnitudeSettings = SETTINGS, **options: Any) -> MagnitudePruner:
    return MagnitudePruner(space, space.channels(space.largest), data, settings, 3, CPU, **options)


def ran(space: Space, data: Data, settings: MagnitudeSettings = SETTINGS, **options: Any) -> MagnitudePruner:
    made = pruner(space, data, settings, **options)
    made.advance(lambda: False)
    assert made.done == made.total
    return made


def after(ticks: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) >= ticks


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        (LENET, replace(EVERYTHING, optimiser="adam")),
        (CONVOLUTIONAL, EVERYTHING),
        (NORMED, replace(SETTINGS, training=replace(TRAINING, epochs=2), alternate=True, goal=Growth(0.5, 0.4))),
    ],
    ids=["adam", "alternate", "normed"],
)
def test_a_run_interrupted_anywhere_is_bit_equal_to_one_that_was_not(
    space: Space, settings: MagnitudeSettings, data: Data, tmp_path
) -> None:
    whole = ran(space, data, settings)
    one = pruner(space, data, settings)
    # Within a training, at its end, in the scan, before and behind prunings and judgements, to the end.
    for ticks in (7, 2, 1, 1, 10, 4, 3, 2, 1, 4, 1, 1, 5, 1, 1000):
        one.advance(after(ticks))
        sha256 = checkpoints.save(tmp_path, one.state())
        tensors, counters = checkpoints.load(place(tmp_path, sha256), sha256), json.loads(json.dumps(one.counters()))
        one = pruner(space, data, settings)
        one.restore(tensors, counters)
        one.align(one.counters())  # as a job's steps do it after every `restore`
    assert one.done == one.total
    assert one.counters() == whole.counters()
    assert (one.judged, one.points) == (whole.judged, whole.points)
    assert one.state().keys() == whole.state().keys()
    assert all(torch.equal(tensor, one.state()[name]) for name, tensor in whole.state().items())
    ours, theirs = one.outcome().network.state_dict(), whole.outcome().network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("space", "metric", "alternate"),
    [
        (LENET, "parameters", False), (CONVOLUTIONAL, "parameters", True), (CONVOLUTIONAL, "flops", False),
        (CONVOLUTIONAL, "flops", True), (NORMED, "flops", True),
    ],
)  # fmt: skip
def test_a_budget_holds_exactly(space: Space, metric: Any, alternate: bool, data: Data) -> None:
    network = pruner(space, data).network
    full = m.full(network)
    dense = m.cost(full, m.positions(network.nodes, full) if metric == "flops" else dict.fromkeys(full, 1))
    settings = replace(SETTINGS, goal=Budget(metric, dense // 10), alternate=alternate, retraining_epochs=1)
    run = ran(space, data, settings)
    last = run.judged[-1]
    reached = last.kept if metric == "parameters" else last.sparse_flops
    assert 0.9 * (dense // 10) < reached <= dense // 10, "as much as fits, but for channels that die together"
    assert [one.round for one in run.judged] == [0, 1, 2]
    assert dense > run.judged[1].kept > last.kept
    assert last.prunable == sum(mask.numel() for mask in full.values())
    outcome = run.outcome()
    assert m.kept(outcome.masks) == last.kept == sum(int((w != 0).sum()) for w in m.prunable(outcome.network).values())
    assert outcome.network.channels == last.channels
    assert m.cost(outcome.masks, m.positions(outcome.network.nodes, outcome.masks)) == last.sparse_flops
    score = evaluate(outcome.network, data.sub_validation, CPU)
    assert score.accuracy == pytest.approx(last.accuracy, abs=1 / len(data.sub_validation))
    assert score.loss == pytest.approx(last.loss, rel=1e-3)
    build_model(outcome.network.nodes, weights=folded_weights(outcome.network))


def test_survivors_begin_retraining_where_they_were(data: Data) -> None:
    run = pruner(LENET, data)
    run.advance(after(run.steps * TRAINING.epochs + 1))
    before = {i: weight.clone() for i, weight in m.prunable(run.network).items()}
    run.advance(after(1))
    for i, weight in m.prunable(run.network).items():
        assert torch.equal(weight, before[i] * run.masks[i])
        assert not run.masks[i].all()


def test_masks_only_shrink_from_round_to_round(data: Data) -> None:
    run, seen = pruner(CONVOLUTIONAL, data, replace(EVERYTHING, rounds=3)), []
    while run.done < run.total:
        run.advance(after(1))
        seen.append({i: mask.clone() for i, mask in run.masks.items()})
    for earlier, later in itertools.pairwise(seen):
        assert not any((later[i] & ~earlier[i]).any() for i in later)
    kept = [one.kept for one in run.judged]
    assert kept == sorted(kept, reverse=True)


def test_the_first_pruning_of_all_rounds_follows_the_formula(data: Data) -> None:
    """t = q * std(W) of the dense weights, dead channels aside."""
    qualities = {"fc1": 0.8, "fc2": 1.2}
    run = ran(LENET, data, replace(SETTINGS, goal=Growth(1.0, 0.5), rounds=1, retraining_epochs=0, qualities=qualities))
    weights = m.prunable(run.dense())
    for i, quality in (("0", 0.8), ("1", 1.2), ("2", 1.0)):
        expected = weights[i].abs().double() >= 0.5 * quality * weights[i].double().std(correction=0)
        assert not (run.masks[i] & ~expected).any()
        dead = expected & ~run.masks[i]  # whole rows or whole columns of what was left
        assert not (dead & run.masks[i].any(0) & run.masks[i].any(1)[:, None]).any()
    assert "fc1 q 0.4; fc2 q 0.6; classifier q 0.5" in run.judged[1].note


@pytest.mark.parametrize("group", ["fc", "conv"])
def test_one_group_holds_still_while_the_other_is_retrained(group: str, data: Data) -> None:
    run = pruner(CONVOLUTIONAL, data, replace(SETTINGS, alternate=True))
    begins = next(stage.begins for stage in run._stages if (stage.kind, stage.group) == ("train", group))
    run.advance(after(begins))
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    run.advance(after(run.steps))
    still = "convs" if group == "fc" else "linears"
    for name, tensor in run.network.state_dict().items():
        assert torch.equal(tensor, before[name]) or not name.startswith(still), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in run.network.state_dict().items())


def test_rounds_without_retraining_prune_alone(data: Data) -> None:
    steps, once = (
        ran(LENET, data, replace(SETTINGS, rounds=rounds, retraining_epochs=0, std_over="initial")) for rounds in (3, 1)
    )
    assert steps.total == once.total + 4
    assert all(270 < run.judged[-1].kept <= 300 for run in (steps, once)), "but for neurons that die together"
    assert len(steps.history) == len(once.history) == TRAINING.epochs


def test_densities_are_shares_of_layers(data: Data) -> None:
    run = ran(LENET, data, replace(SETTINGS, goal=Densities({"fc1": 0.2, "fc2": 0.3})))
    sizes = {i: mask.numel() for i, mask in run.masks.items()}
    for i, density in (("0", 0.2), ("1", 0.3)):
        assert 0.5 * density * sizes[i] < int(run.masks[i].sum()) <= round(density * sizes[i])


def test_a_run_that_no_longer_holds_keeps_the_last_round_that_did(data: Data) -> None:
    """Qualities 1, 2, …: after a few rounds nothing is left."""
    run = ran(LENET, data, replace(SETTINGS, goal=Growth(0.1, 1.0), rounds=9, retraining_epochs=4))
    dense, last = run.judged[0], run.judged[-1]
    assert 1 < last.round < 9
    assert last.accuracy < dense.accuracy - 0.1
    assert all(one.accuracy >= dense.accuracy - 0.1 - 1e-9 for one in run.judged[:-1])
    outcome = run.outcome()
    assert m.kept(outcome.masks) == run.judged[-2].kept > last.kept
    assert run.judged[run.held] == run.judged[-2]
    assert run.counters()["held"] == run.held == len(run.judged) - 2
    with pytest.raises(BudgetMissed, match=f"{run.judged[-2].kept:,}, above the budget of {last.kept}") as missed:
        ran(LENET, data, replace(run.pruning, goal=Growth(0.1, 1.0, Budget("parameters", last.kept)))).outcome()
    assert (missed.value.asked, missed.value.reached) == (last.kept, run.judged[-2].kept)


def test_a_layer_without_weights_ends_the_run_and_is_reported(data: Data) -> None:
    run = ran(LENET, data, replace(SETTINGS, goal=Budget("parameters", 2)))
    assert run.judged[-1].note.endswith("has no weights left")
    with pytest.raises(LayerEmptied, match="without weights") as emptied:
        run.outcome()
    assert emptied.value.round == run.judged[-1].round
    assert set(emptied.value.layers) <= {"fc1", "fc2", "classifier"}


def test_a_run_may_begin_with_a_trained_network(data: Data) -> None:
    first = ran(LENET, data)
    again = ran(LENET, data, start=first.dense().state_dict())
    assert again.total == first.total - first.steps * TRAINING.epochs
    assert again.judged[0] == first.judged[0]
    assert again.judged[-1].kept == first.judged[-1].kept


def test_the_dense_network_is_kept_for_comparison(data: Data) -> None:
    run = ran(LENET, data)
    assert evaluate(run.dense(), data.sub_validation, CPU).accuracy == run.judged[0].accuracy
    assert m.kept({i: weight != 0 for i, weight in m.prunable(run.dense()).items()}) == run.judged[0].prunable


def test_the_whole_training_set_can_be_used(data: Data) -> None:
    assert pruner(LENET, data, whole=True).steps == 6 > pruner(LENET, data).steps == 5


def test_names_of_layers_are_checked(data: Data) -> None:
    with pytest.raises(InvalidInput, match="no layer 'fc9' to prune; it has fc1, fc2, classifier"):
        pruner(LENET, data, replace(SETTINGS, goal=Densities({"fc9": 0.1})))
    with pytest.raises(InvalidInput, match="'pool1'"):
        pruner(CONVOLUTIONAL, data, replace(SETTINGS, qualities={"pool1": 1.0}))
