import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latency_profiler.cost import Constraint, Metric, flops, parameters
from latency_profiler.durable import place
from latency_profiler.errors import InvalidInput, NothingFeasible
from latency_profiler.spaces.registry import get_space
from workers import checkpoints
from workers.budget import Budget
from workers.datasets import Data
from workers.evaluation import evaluate, recalibrate
from workers.networks import PlainNetwork
from workers.pruners.auxiliary import Heads, SupervisedTrainer
from workers.pruners.channel_statistics import ChannelStatistics, Expansion, magnitudes
from workers.pruners.collaborative import CollaborativePruner
from workers.pruners.collaborative_settings import CollaborativeSettings, plan, prunable
from workers.pruners.quadratic import choose
from workers.pruners.surgery import shrink
from workers.training import ScratchTrainer, TrainingSettings

CPU = torch.device("cpu")
SPACE = get_space("resnet20", 8, 0.25, 4, True)
FULL = flops(SPACE.layers(SPACE.uniform(1.0)))
TUNING = TrainingSettings(epochs=2, batch_size=32, learning_rate=0.05, clip_norm=10.0)
SETTINGS = CollaborativeSettings(TUNING, images=96, batch_size=32, recalibration_images=0)
FROZEN = replace(SETTINGS, fine_tuning=replace(TUNING, epochs=0))


@pytest.fixture(scope="module")
def network(data: Data) -> PlainNetwork:
    """Trained for three epochs, and changed by no test."""
    trainer = ScratchTrainer(SPACE, SPACE.uniform(1.0), data, replace(TUNING, epochs=3, learning_rate=0.1), 7, CPU)
    trainer.advance(lambda: False)
    return trainer.network.eval()


def budget_of(share: float = 0.5, minimum: float = 0.0) -> Budget:
    return Budget(SPACE, [Constraint(Metric.FLOPS, share * FULL, minimum * FULL)], {}, {})


def pruner_of(network: PlainNetwork, data: Data, settings: CollaborativeSettings) -> CollaborativePruner:
    return CollaborativePruner(network, data, budget_of(), settings, 3, CPU)


def finished(network: PlainNetwork, data: Data, settings: CollaborativeSettings) -> CollaborativePruner:
    pruner = pruner_of(network, data, settings)
    pruner.advance(lambda: False)
    return pruner


def after(steps: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) >= steps


def indices(pruner: CollaborativePruner) -> dict[int, torch.Tensor]:
    return {i: torch.tensor(choice.kept) for i, choice in pruner.choices.items()}


@pytest.mark.parametrize("changes", [
    {"curvature": "monte_carlo", "allocation": "global", "order": "sequential", "images": 64, "batch_size": 64},
    {"auxiliaries": 2, "recalibration_images": 64}, {"ranking": "l1", "fine_tune_on": "sub_training"},
])  # fmt: skip
def test_interrupted_pruning_is_bit_equal_to_uninterrupted(
    changes: dict[str, Any], data: Data, network: PlainNetwork, tmp_path
) -> None:
    settings = replace(SETTINGS, **changes)
    whole = finished(network, data, settings)
    pruner = pruner_of(network, data, settings)
    slices = 0
    while pruner.done < pruner.total:
        pruner.advance(after((1, 2, 9, 4, 30)[slices % 5]))  # within stages, at their ends, and beyond
        sha256 = checkpoints.save(tmp_path, pruner.state())
        tensors, counters = checkpoints.load(place(tmp_path, sha256), sha256), json.dumps(pruner.counters())
        pruner = pruner_of(network, data, settings)
        pruner.restore(tensors, json.loads(counters))
        slices += 1
    assert slices >= 3
    assert json.dumps(pruner.counters()) == json.dumps(whole.counters())
    ours, theirs = pruner.outcome()[0].state_dict(), whole.outcome()[0].state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert pruner.judged == whole.judged
    assert pruner.choices == whole.choices


def test_the_outcome_is_the_trained_network_without_the_channels(data: Data, network: PlainNetwork) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    pruner = finished(network, data, FROZEN)
    pruned, masks = pruner.outcome()
    expected = shrink(network, indices(pruner)).state_dict()
    assert masks == {}
    assert all(torch.equal(value, expected[key]) for key, value in pruned.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    layers = SPACE.layers(pruned.channels)
    assert 0.9 * FULL < 2 * flops(layers) <= FULL
    dense, cut, _ = pruner.judged
    assert (dense.round, dense.channels, dense.kept) == (0, network.channels, dense.prunable)
    assert (cut.round, cut.channels, cut.kept) == (1, pruned.channels, parameters(layers))
    assert (cut.sparse_flops, dense.sparse_flops) == (flops(layers), FULL)
    score = evaluate(pruned, data.sub_validation, CPU)
    assert (cut.accuracy, cut.loss) == (score.accuracy, score.loss)


def test_fine_tuning_recovers_and_is_judged(data: Data, network: PlainNetwork) -> None:
    pruner = finished(network, data, replace(SETTINGS, fine_tuning=replace(TUNING, epochs=4)))
    assert [one.round for one in pruner.judged] == [0, 1, 2]
    assert pruner.judged[2].loss < pruner.judged[1].loss
    assert pruner.judged[2].channels == pruner.judged[1].channels
    assert "4 epochs" in pruner.judged[2].note
    assert pruner.done == pruner.total


def test_one_shot_chooses_by_the_statistics_of_the_trained_network(data: Data, network: PlainNetwork) -> None:
    images = data.sub_training.sample(96, 3)
    gathering = ChannelStatistics(network, images, 96, range(12), Expansion(curvature="gauss_newton"), 0, CPU)
    gathering.advance(lambda: False)
    pruner = finished(network, data, replace(FROZEN, curvature="gauss_newton", batch_size=96))
    for i, quadratic in gathering.quadratics().items():
        assert choose(quadratic, pruner.outcome()[0].channels[i]) == pruner.choices[i]


def test_sequential_sees_what_earlier_slots_have_lost(data: Data, network: PlainNetwork) -> None:
    pruner = finished(network, data, replace(FROZEN, order="sequential"))
    order = list(pruner.choices)
    assert order == sorted(range(12), key=lambda i: SPACE.depths[i])
    assert len(pruner.judged) == 14
    some = {i: torch.tensor(pruner.choices[i].kept) for i in order[:4]}
    slot, images = order[4], data.sub_training.sample(96, 3)
    gathering = ChannelStatistics(shrink(network, some), images, 32, [slot], Expansion(), 3, CPU)
    gathering.advance(lambda: False)
    assert choose(gathering.quadratics()[slot], len(pruner.choices[slot].kept)) == pruner.choices[slot]
    one_shot = finished(network, data, FROZEN)
    assert one_shot.choices[order[0]] == pruner.choices[order[0]]
    assert one_shot.choices != pruner.choices


def test_batch_norms_are_measured_anew_after_pruning(data: Data, network: PlainNetwork) -> None:
    pruned = finished(network, data, replace(FROZEN, recalibration_images=100)).outcome()[0]
    plain = finished(network, data, FROZEN).outcome()[0]
    recalibrate(plain, data.sub_training.sample(100, 3), 100, CPU)
    ours, theirs = pruned.state_dict(), plain.state_dict()
    assert all(torch.allclose(value, ours[key]) for key, value in theirs.items())


def test_rival_rankings_run_through_the_same_code(data: Data, network: PlainNetwork) -> None:
    by = {one: finished(network, data, replace(FROZEN, ranking=one)) for one in ("collaborative", "diagonal", "l1")}
    assert len({pruner.outcome()[0].channels for pruner in by.values()}) == 1
    for i, choice in by["l1"].choices.items():
        largest = np.argsort(magnitudes(network, i).u, kind="stable")[: len(choice.kept)]
        assert choice.kept == tuple(sorted(largest.tolist()))
    assert by["collaborative"].choices != by["diagonal"].choices != by["l1"].choices
    assert by["l1"].total == 0


def test_heads_learn_alone_or_with_the_network_and_are_dropped(data: Data, network: PlainNetwork) -> None:
    for frozen in (True, False):
        heads = Heads.spread(network, 2, 0)
        first = {key: value.clone() for key, value in heads.state_dict().items()}
        trainer = SupervisedTrainer(network, heads, data, TUNING, 0, CPU, 0.3, frozen)
        trainer.advance(lambda: False)
        assert not any(torch.equal(value, first[key]) for key, value in heads.state_dict().items())
        ours = trainer.network.state_dict()
        same = [torch.equal(value, ours[key]) for key, value in network.state_dict().items()]
        assert all(same) if frozen else sum(same) == 0
    pruned = finished(network, data, replace(SETTINGS, auxiliaries=2)).outcome()[0]
    assert pruned.state_dict().keys() == network.state_dict().keys()


def test_a_head_that_counts_nothing_changes_nothing(data: Data, network: PlainNetwork) -> None:
    plain = ScratchTrainer(SPACE, network.channels, data, TUNING, 0, CPU, start=network.state_dict())
    heads = SupervisedTrainer(network, Heads.spread(network, 1, 0), data, replace(TUNING, clip_norm=None), 0, CPU, 0.0)
    plain.settings = heads.settings
    for trainer in (plain, heads):
        trainer.advance(lambda: False)
    ours = heads.network.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in plain.network.state_dict().items())


def test_heads_lose_the_columns_of_channels_that_are_gone(network: PlainNetwork) -> None:
    heads = Heads.spread(network, 2, 0)
    smaller = shrink(network, {0: torch.tensor([1, 3])})
    cut = heads.shrink(smaller, {0: torch.tensor([1, 3])})
    first, second = heads.nodes
    assert torch.equal(cut.linear(first).weight, heads.linear(first).weight[:, [1, 3]])
    assert torch.equal(cut.linear(second).weight, heads.linear(second).weight)


def test_shortcuts_can_be_left_alone(data: Data, network: PlainNetwork) -> None:
    assert prunable(SPACE, True) == tuple(range(12))
    assert prunable(SPACE, False) == tuple(range(2, 11))
    pruner = CollaborativePruner(network, data, budget_of(0.7), replace(FROZEN, shortcuts=False), 3, CPU)
    pruner.advance(lambda: False)
    pruned = pruner.outcome()[0].channels
    assert [pruned[i] for i in (0, 1, 11)] == [network.channels[i] for i in (0, 1, 11)]
    assert set(pruner.choices) == set(range(2, 11))


def test_the_plan_follows_from_the_settings() -> None:
    slots = prunable(SPACE, True)
    names = [step.name for step in plan(SPACE, slots, replace(SETTINGS, auxiliaries=1))]
    assert names == ["heads", "statistics", "fine_tuning"]
    sequential = plan(SPACE, slots, replace(SETTINGS, order="sequential", allocation="global"))
    assert sequential[0].measured == slots
    assert sequential[0].pruned == ()
    assert [step.pruned for step in sequential[1:-1]] == [
        (i,) for i in sorted(slots, key=lambda i: SPACE.depths[i])
    ]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": "squared_error"}, "gauss_newton"), ({"ranking": "l1", "allocation": "global"}, "layerwise"),
    ({"floor": 1.5}, "0 to 1"), ({"floor": 0.9}, "fewer channels"), ({"ratios": (0.5,)}, "12 positive"),
    ({"auxiliaries": 99}, "1 to 9"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, data: Data, network: PlainNetwork
) -> None:
    with pytest.raises(InvalidInput, match=message):
        pruner_of(network, data, replace(SETTINGS, **changes))


def test_a_lower_bound_that_the_upper_one_excludes_and_a_diverged_network_are_errors(
    data: Data, network: PlainNetwork
) -> None:
    bounds = [Constraint(Metric.FLOPS, 0.5 * FULL, 0.4999 * FULL)]
    with pytest.raises(NothingFeasible):
        CollaborativePruner(network, data, Budget(SPACE, bounds, {}, {}), SETTINGS, 3, CPU)
    diverged = shrink(network, {})
    with torch.no_grad():
        diverged.weight(0).fill_(float("nan"))
    with pytest.raises(InvalidInput, match="diverged"):
        finished(diverged, data, SETTINGS)
