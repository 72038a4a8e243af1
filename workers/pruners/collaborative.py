"""Collaborative channel pruning: keep the channels of a trained network whose removal *together* costs least.

After Peng, Wu, Chen and Huang (ICML 2019), of which no code is published. The work is a chain of stages, each shaped
like a trainer: auxiliary heads are trained (if there are any), statistics are gathered for a pruning round or for each
of several, and what is left is fine-tuned. Between two stages a decision follows from the first: which channels go.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from latency_profiler.cost import flops, parameters
from latency_profiler.errors import InvalidInput, NothingFeasible
from workers.budget import Budget
from workers.datasets import Data
from workers.evaluation import BATCH, evaluate, recalibrate
from workers.networks import PlainNetwork
from workers.pruners.auxiliary import Heads, SupervisedTrainer
from workers.pruners.channel_statistics import ChannelStatistics, magnitudes
from workers.pruners.collaborative_settings import CollaborativeSettings, Step, plan, prunable
from workers.pruners.judgement import Judgement
from workers.pruners.keep_counts import Widths, spread
from workers.pruners.quadratic import Choice, Quadratic, choose
from workers.pruners.surgery import shrink
from workers.training import ScratchTrainer, Trainer, TrainingSettings


class Stage(Protocol):
    """A part of the work that can stop after any iteration."""

    done: int
    total: int

    def advance(self, pause: Callable[[], bool], /) -> None:
        """Go on until the end, or until `pause` says so."""

    def latest(self) -> dict[str, float]:
        """What it tells of its progress."""

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a fresh one needs."""

    def counters(self) -> dict[str, Any]:
        """The rest that it needs, as JSON."""

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], /) -> None:
        """Go on from there."""


class CollaborativePruner:
    """Prunes a trained network to a budget; shaped like a trainer.

    Args:
        network: the trained one, of the budget's space; it is not changed.
        budget: its upper bounds decide the widths; whoever wants latency gives tables and corrections with it.

    Raises:
        InvalidInput: the settings do not fit the space, or leave no network within the budget.
        NothingFeasible: what the upper bounds leave breaks a lower one.
    """

    def __init__(
        self, network: PlainNetwork, data: Data, budget: Budget, settings: CollaborativeSettings, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._data, self._budget, self._settings, self._seed, self._device = data, budget, settings, seed, device
        self._trained, self._network = network.channels, shrink(network, {}).to(device).eval()
        self._heads = Heads.spread(network, settings.auxiliaries, seed).to(device) if settings.auxiliaries else None
        self._widths = allowed_widths(budget, network.channels, settings)
        self._images = data.sub_training.sample(0 if settings.ranking == "l1" else settings.images, seed)
        self._recalibration = data.sub_training.sample(settings.recalibration_images, seed)
        self._counts = None if settings.allocation == "global" else self._shared()
        self._plan = plan(network.space, self._widths.slots, settings)
        self._totals = [self._total(step) for step in self._plan]
        self.total = sum(self._totals)
        self.judged: list[Judgement] = []
        self.held = -1
        self.choices: dict[int, Choice] = {}
        """By slot index; channels are numbered as in the trained network."""
        self._place = 0
        self._stage: Stage | None = self._make()

    @property
    def done(self) -> int:
        """Iterations behind, of all stages."""
        return sum(self._totals[: self._place]) + (self._stage.done if self._stage else 0)

    def latest(self) -> dict[str, float]:
        """What the stage tells of its last epoch."""
        return self._stage.latest() if self._stage else {}

    def advance(self, pause: Callable[[], bool]) -> None:
        """Work until the end, or until `pause`, asked after every iteration, says so."""
        asked = _Asked(pause)
        if not self.judged:
            self._judge("trained")
        while self._stage and not (asked.stopped and self.done < self.total):
            self._stage.advance(asked)
            if self._stage.done == self._stage.total:
                self._decide(self._stage, self._plan[self._place])

    def state(self) -> dict[str, Tensor]:
        """The network and its heads as the stage found them, unless it trains its own, and the stage's tensors."""
        held = {} if isinstance(self._stage, Trainer) else {"network": self._network, "heads": self._heads}
        modules = [(name, module) for name, module in held.items() if module is not None]
        tensors = {f"{name}.{key}": value for name, module in modules for key, value in module.state_dict().items()}
        stage = self._stage.state() if self._stage else {}
        return tensors | {f"stage.{key}": value for key, value in stage.items()}

    def counters(self) -> dict[str, Any]:
        """What is not a tensor of the state, as JSON."""
        return {
            "place": self._place, "stage": self._stage.counters() if self._stage else {},
            "channels": self._network.channels, "counts": self._counts,
            "judged": [asdict(one) for one in self.judged],
            "choices": [[slot, asdict(choice)] for slot, choice in self.choices.items()],
        }  # fmt: skip

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Go on where another one with the same arguments was when it gave these."""
        self._place = counters["place"]
        self._counts = None if counters["counts"] is None else tuple(counters["counts"])
        self.judged = [Judgement(**{**one, "channels": tuple(one["channels"])}) for one in counters["judged"]]
        self.choices = {slot: Choice(**{**one, "kept": tuple(one["kept"])}) for slot, one in counters["choices"]}
        self._network = PlainNetwork(self._network.space, counters["channels"]).to(self._device).eval()
        if self._heads:
            self._heads = Heads(self._network, self._heads.nodes, self._seed).to(self._device)
        self._stage = self._make()
        if self._stage:
            self._stage.restore(_below("stage", tensors), counters["stage"])
        if not isinstance(self._stage, Trainer):
            self._network.load_state_dict(_below("network", tensors))
            if self._heads:
                self._heads.load_state_dict(_below("heads", tensors))

    def outcome(self) -> tuple[PlainNetwork, dict[str, Tensor]]:
        """The finished network, and no masks: its channels are gone."""
        return self._network, {}

    def _make(self) -> Stage | None:
        if self._place == len(self._plan):
            return None
        step, settings, heads = self._plan[self._place], self._settings, self._heads
        if step.name == "statistics":
            return ChannelStatistics(
                self._network, self._images, settings.batch_size, step.measured, settings.expansion, self._seed,
                self._device, heads, settings.auxiliary_weight,
            )  # fmt: skip
        data, training, frozen = self._training(step)
        network, rest = self._network, (data, training, self._seed, self._device)
        if heads is not None:
            return SupervisedTrainer(network, heads, *rest, settings.auxiliary_weight, frozen)
        return ScratchTrainer(network.space, network.channels, *rest, start=network.state_dict())

    def _training(self, step: Step) -> tuple[Data, TrainingSettings, bool]:
        """Images and settings of a stage that trains, and whether the network is frozen in it."""
        data, settings = self._data, self._settings
        sub = replace(data, training=data.sub_training)
        if step.name == "heads":
            return sub, replace(settings.fine_tuning, epochs=settings.auxiliary_epochs), not settings.auxiliary_joint
        return data if settings.fine_tune_on == "training" else sub, settings.fine_tuning, False

    def _total(self, step: Step) -> int:
        if step.name == "statistics":
            return -(-len(self._images) // self._settings.batch_size)
        data, training, _ = self._training(step)
        return training.epochs * data.training.steps(training.batch_size)

    def _decide(self, stage: Stage, step: Step) -> None:
        """What follows from a stage that is over."""
        if isinstance(stage, ScratchTrainer):
            self._network = stage.network.eval()
            self._judge(f"{stage.settings.epochs} epochs of {step.name.replace('_', '-')}")
        elif isinstance(stage, ChannelStatistics):
            self._prune(self._quadratics(stage, step.measured), step.pruned)
        self._place += 1
        self._stage = self._make()

    def _quadratics(self, stage: ChannelStatistics, slots: tuple[int, ...]) -> dict[int, Quadratic]:
        if self._settings.ranking == "l1":
            return {i: magnitudes(self._network, i) for i in slots}
        found = stage.quadratics()
        if not all(np.isfinite(one.u).all() and np.isfinite(one.s).all() for one in found.values()):
            raise InvalidInput("the trained network's gradients are not finite: it has diverged and cannot be pruned")
        return {i: one.diagonal() for i, one in found.items()} if self._settings.ranking == "diagonal" else found

    def _shared(self, quadratics: Mapping[int, Quadratic] | None = None) -> tuple[int, ...]:
        """The widths that the budget is shared out to."""
        proportions = np.array(self._trained, dtype=np.float64)
        if quadratics is not None:
            proportions = spread(quadratics, self._widths).widths
        elif (ratios := self._settings.ratios) is not None:
            if len(ratios) != len(self._budget.space.genes) or min(ratios) <= 0:
                raise InvalidInput(f"ratios must be {len(self._budget.space.genes)} positive numbers, one per gene")
            proportions[: len(ratios)] *= ratios
        counts = self._widths.within(proportions)
        if not self._budget.allows(counts):
            raise NothingFeasible
        return counts

    def _prune(self, quadratics: Mapping[int, Quadratic], slots: tuple[int, ...]) -> None:
        if self._counts is None:
            self._counts = self._shared(quadratics)
        if not slots:
            return
        chosen = {i: choose(quadratics[i], self._counts[i]) for i in slots}
        kept = {i: torch.tensor(choice.kept) for i, choice in chosen.items()}
        self._network = shrink(self._network, kept)
        if self._heads is not None:
            self._heads = self._heads.shrink(self._network, kept)
        if len(self._recalibration):
            recalibrate(self._network, self._recalibration, BATCH, self._device)
        self.choices |= chosen
        change = sum(choice.change for choice in chosen.values())
        names = "all slots" if len(slots) > 1 else self._network.space.slots[slots[0]].name
        self._judge(f"{self._settings.ranking} pruning of {names}, predicted change {change:+.4g}")

    def _judge(self, note: str) -> None:
        score = evaluate(self._network, self._data.sub_validation, self._device)
        space, channels = self._network.space, self._network.channels
        now, before = space.layers(channels), space.layers(self._trained)
        costs = parameters(now), parameters(before), flops(now)
        self.judged.append(Judgement(len(self.judged), channels, *costs, score.accuracy, score.loss, note))


def allowed_widths(budget: Budget, channels: Sequence[int], settings: CollaborativeSettings) -> Widths:
    """The widths that a network of these channels may be pruned to.

    Raises:
        InvalidInput: none of them is within the budget.
    """
    slots = prunable(budget.space, settings.shortcuts)
    return Widths(budget, channels, slots, settings.floor, settings.widths == "choices")


class _Asked:
    """A pause that remembers its last answer."""

    def __init__(self, pause: Callable[[], bool]) -> None:
        self._pause, self.stopped = pause, False

    def __call__(self) -> bool:
        self.stopped = self._pause()
        return self.stopped


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
