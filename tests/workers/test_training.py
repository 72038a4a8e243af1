import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latency_profiler.cost import flops
from latency_profiler.durable import place
from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.spaces.registry import get_space
from service.specs import JobRequest, resolve
from workers import checkpoints, sgd
from workers.datasets import Data
from workers.evaluation import evaluate
from workers.evaluation import test as score
from workers.evolution import DIVERGED
from workers.pruning_net import SHARED, PruningNet
from workers.sgd import CroppedSGD, Modes, Rule, fed
from workers.training import STRUCTURES, PruningNetTrainer, ScratchTrainer, Structures, Trainer, TrainingSettings

SPACE = get_space("mobilenet_v1", 8, 0.125, 4, True)
SETTINGS = TrainingSettings(epochs=3, batch_size=32, learning_rate=0.05, clip_norm=10.0, normalise=True, curriculum=0.5)
CPU = torch.device("cpu")
LOW, HIGH = 15_000.0, 20_000.0
Make = Callable[[Data], Trainer]


def scratch(data: Data) -> Trainer:
    return ScratchTrainer(SPACE, SPACE.uniform(0.5), data, SETTINGS, 7, CPU)


def pruning(data: Data) -> Trainer:
    return PruningNetTrainer(SPACE, data, SETTINGS, 7, (LOW, HIGH), CPU)


def shared(data: Data) -> Trainer:
    return PruningNetTrainer(SPACE, data, replace(SETTINGS, weights="shared"), 7, (LOW, HIGH), CPU)


def after(steps: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) >= steps


@pytest.mark.parametrize("make", [scratch, pruning, shared])
def test_interrupted_training_is_bit_equal_to_uninterrupted(make: Make, data: Data, tmp_path) -> None:
    whole = make(data)
    whole.advance(lambda: False)
    assert whole.done == whole.total == 3 * whole.steps
    trainer = make(data)
    for steps in (1, 3, 2, 100):  # in the first step, at an epoch's end, within an epoch, to the end
        trainer.advance(after(steps))
        sha256 = checkpoints.save(tmp_path, trainer.state())
        tensors, counters = checkpoints.load(place(tmp_path, sha256), sha256), trainer.counters()
        trainer = make(data)
        trainer.restore(tensors, counters)
    assert trainer.counters() == whole.counters()
    ours = trainer.state()
    assert all(torch.equal(value, ours[key]) for key, value in whole.state().items())


def test_the_learning_rate_falls_by_epochs_after_it_has_risen() -> None:
    settings = TrainingSettings(epochs=4, batch_size=32, learning_rate=0.8, warm_up=0.25)
    rates = [settings.rate(iteration, 8) for iteration in range(32)]
    assert rates[:8] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert rates[8:] == pytest.approx([0.6] * 8 + [0.4] * 8 + [0.2] * 8)


def test_a_diverged_training_says_so_in_numbers_that_json_knows(data: Data) -> None:
    settings = TrainingSettings(epochs=1, batch_size=32, learning_rate=1e30)
    trainer = ScratchTrainer(SPACE, SPACE.uniform(0.5), data, settings, 7, CPU)
    trainer.advance(lambda: False)
    assert trainer.latest()["loss"] == DIVERGED
    json.dumps(trainer.counters(), allow_nan=False)
    assert score(trainer.network, data, CPU).loss == DIVERGED


def test_gradients_that_are_not_finite_are_dropped(data: Data) -> None:
    trainer = scratch(data)
    leaf = torch.zeros(3, requires_grad=True)
    leaf.grad = torch.tensor([1.0, float("inf"), 2.0])
    trainer._clip([leaf])
    assert leaf.grad.tolist() == [0, 0, 0]
    leaf.grad = torch.tensor([0.0, 30.0, 40.0])
    trainer._clip([leaf])
    assert leaf.grad.tolist() == pytest.approx([0, 6, 8], rel=1e-4)


def test_a_curriculum_widens_structures_from_nearly_uniform_to_all(data: Data) -> None:
    drawn = Structures(SPACE, (LOW, HIGH), 7, widening=10 * STRUCTURES)
    spreads = [
        np.std([drawn.at(chunk * STRUCTURES + i) for i in range(STRUCTURES)], axis=1).mean() for chunk in (0, 5, 20)
    ]
    assert spreads[0] < 0.5 * spreads[1] < spreads[2]
    whole = Structures(SPACE, (LOW, HIGH), 7)
    assert drawn.at(20 * STRUCTURES) == whole.at(20 * STRUCTURES)


def test_a_rate_falls_to_a_tenth_after_every_quarter_where_that_is_asked_for() -> None:
    published = resolve(
        JobRequest.model_validate(
            {"space": "resnet50", "dataset": "d", "effort": "paper", "constraints": [{"metric": "flops", "max": 1}]}
        ),
        224,
    )
    for part, rate, epochs in ((published.training, 0.1, 32), (published.retraining, 0.2, 128)):
        settings = TrainingSettings.of(part.model_dump())
        rates = [settings.rate(7 * epoch + 3, 7) for epoch in range(settings.epochs)]
        quarters = [rate * 0.1**quarter for quarter in range(4) for _ in range(epochs // 4)]
        assert rates == pytest.approx(quarters)


@pytest.mark.parametrize("change", [{"label_smoothing": 0.9}, {"augment": False}, {"clip_norm": 1e-6}])
def test_every_setting_of_a_training_counts(data: Data, change: dict[str, Any]) -> None:
    def history(settings: TrainingSettings) -> list[dict[str, float]]:
        trainer = ScratchTrainer(SPACE, SPACE.uniform(0.5), data, settings, 7, CPU)
        trainer.advance(lambda: False)
        return trainer.history

    assert history(replace(SETTINGS, **change)) != history(SETTINGS)


def test_a_state_of_something_else_is_refused(data: Data) -> None:
    trainer = scratch(data)
    with pytest.raises(ValueError, match="not a state"):
        trainer.restore(pruning(data).state(), trainer.counters())


def test_a_network_learns_and_reports(data: Data) -> None:
    settings = TrainingSettings(epochs=30, batch_size=32, learning_rate=0.05)
    trainer = ScratchTrainer(SPACE, SPACE.uniform(1.0), data, settings, 0, CPU)
    trainer.advance(lambda: False)
    assert trainer.latest()["accuracy"] > 0.6
    assert evaluate(trainer.network, data.test, CPU).accuracy > 0.6
    assert [one["rate"] for one in trainer.history] == pytest.approx([0.05 * (1 - e / 30) for e in range(30)])


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("hidden", [None, SHARED])
@pytest.mark.parametrize("span", [sgd.SPAN, 1.2])
def test_cropped_sgd_equals_plain_sgd(
    hidden: int | None, momentum: float, span: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch.optim.SGD on whole parameters with gradients that are zero outside random leading blocks."""
    monkeypatch.setattr(sgd, "SPAN", span)
    torch.manual_seed(0)
    net = PruningNet(get_space("resnet20", 8, 0.5, 4, True), hidden).double()
    whole, moving = net.generators["4"], "bias" if hidden == SHARED else "weight"
    weight = torch.nn.Parameter(getattr(whole, moving).detach().clone())
    reference = torch.optim.SGD([weight], lr=0.1, momentum=momentum, weight_decay=1e-3)
    modes, steps = (
        Modes(Rule(0.1, momentum, 1e-3)),
        260,
    )  # longer than a mode's unit
    ours = CroppedSGD(whole.crop(*whole.bias.shape[:2]), modes)
    for rate in (0.1, 0.05):
        reference.param_groups[0]["lr"] = rate
        for step in range(steps):
            c_out, c_in = torch.randint(1, 8, (2,)).tolist()
            now, by = torch.tensor([modes.units(step), modes.steps(step)], dtype=torch.float64)
            crop = ours.begin(c_out, c_in, now)
            crop.bias.grad, units = torch.randn_like(crop.bias), torch.randn(whole.weight.shape[-1]).double()
            written = crop.weight @ fed(units, now) + crop.bias
            plain = weight[:c_out, :c_in] if hidden == SHARED else weight[:c_out, :c_in] @ units + crop.bias
            assert torch.allclose(written, plain, atol=1e-9)
            ours.end(crop, units, by, modes.renewals(step))
            weight.grad = torch.zeros_like(weight)
            weight.grad[:c_out, :c_in] = crop.bias.grad if hidden == SHARED else crop.bias.grad[..., None] * units
            reference.step()
        assert torch.allclose(getattr(ours.current(modes, steps), moving), weight, atol=1e-9)
        if momentum:
            moment = reference.state[weight]["momentum_buffer"]
            assert torch.allclose(getattr(ours.moments(modes, steps), moving), moment, atol=1e-9)
        modes, old = Modes(Rule(0.05, momentum, 1e-3)), modes
        ours.rebase(old, steps, modes)
    ours.write(modes, 0)
    assert torch.allclose(getattr(whole, moving), weight, atol=1e-9)


@pytest.mark.parametrize("rule", [Rule(0.1, 0.9, 0.027), Rule(0.1, 0.9, 1.0), Rule(1e-3, 1 - 1e-6, 1e-4)])
def test_a_rule_that_makes_weights_oscillate_is_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match="oscillate"):
        Modes(rule)


def test_sampled_structures_lie_in_the_band_and_differ() -> None:
    structures = Structures(SPACE, (LOW, HIGH), 0)
    drawn = [structures.at(i) for i in range(300)]
    costs = [flops(SPACE.layers(SPACE.channels(encoding))) for encoding in drawn]
    assert min(costs) >= LOW
    assert max(costs) <= HIGH
    assert max(costs) - min(costs) > 0.8 * (HIGH - LOW)
    assert len(set(drawn)) > 250
    assert Structures(SPACE, (LOW, HIGH), 0).at(299) == drawn[299] != Structures(SPACE, (LOW, HIGH), 1).at(299)


@pytest.mark.parametrize(
    ("name", "width", "least"), [("mobilenet_v2", 0.5, 3), ("resnet20", 1.0, 3), ("resnet20", 0.5, 2)]
)
def test_structures_near_a_budget_have_no_layers_of_hardly_any_channels(name: str, width: float, least: int) -> None:
    space = get_space(name, 32, width, 10, True)
    whole = flops(space.layers(space.channels(space.largest)))

    def widths(low: float, high: float) -> set[int]:
        structures = Structures(space, (low, high), 0)
        return {min(space.channels(structures.at(i))) for i in range(200)}

    assert min(widths(0.6 / 8 * whole, 1.4 / 8 * whole)) == least
    smallest = flops(space.layers(space.channels(space.smallest)))
    assert min(widths(smallest, 1.1 * smallest)) < least  # where nothing else is within the band


def test_a_band_that_the_space_does_not_reach_is_an_error(data: Data) -> None:
    with pytest.raises(InfeasibleConstraint, match="flops"):
        PruningNetTrainer(SPACE, data, SETTINGS, 0, (1.0, 2.0), CPU)
