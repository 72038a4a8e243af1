"""Learning both weights and connections (Han, Pool, Tran and Dally, NIPS 2015): train, prune by magnitude, retrain.

A run is a row of stages: the dense network is trained and judged, perhaps scanned for the sensitivity of its layers,
and then every round prunes, retrains what has survived from where it is, and is judged. A stage has ticks, after each
of which the run can be stored and taken up again, bit for bit.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latency_profiler.errors import BudgetMissed, LayerEmptied
from latency_profiler.spaces.space import Space
from workers.datasets import Data
from workers.evaluation import evaluate
from workers.evaluation import kept as held
from workers.networks import PlainNetwork
from workers.parallel import ALONE, Team
from workers.pruners import activity, dead_channels, dropout, goals, sensitivity
from workers.pruners import masks as m
from workers.pruners.descent import Group, MaskedDescent, in_group
from workers.pruners.judgement import Judgement
from workers.pruners.schedule import MagnitudeSettings, Scan, Stage, check_names, stages
from workers.training import Trainer, TrainingSettings

ROUNDING = 1e-9
"""Of differences between accuracies."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A pruned network with exact zeros, and the masks of what it keeps, by node."""

    network: PlainNetwork
    masks: m.Masks


class MagnitudePruner(Trainer):
    """Trains, prunes and retrains a network on the sub-training set, and judges it on the sub-validation set.

    Args:
        channels: of the dense network.
        start: state of a trained network of these channels; the dense training is left out.
        whole: train on the whole training set; judgements then see images that were trained on.

    Raises:
        InvalidInput: a density or quality of a layer that the space does not have.
    """

    network: PlainNetwork

    def __init__(
        self, space: Space, channels: Sequence[int], data: Data, settings: MagnitudeSettings, seed: int,
        device: torch.device, team: Team = ALONE, *, start: Mapping[str, Tensor] | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        batches = data.training if whole else data.sub_training
        super().__init__(batches, settings.training, seed, device, team)
        self.pruning, self._validation = settings, held(data.sub_validation, data.image_size)
        self.network = PlainNetwork(space, channels, seed)
        if start is not None:
            self.network.load_state_dict(dict(start))
        self.network.to(device)
        team.share([*self.network.convs.parameters(), *self.network.linears.parameters()])
        self.masks = m.full(self.network)
        self._dense, self._best = (_copied(self.network.state_dict()) for _ in range(2))
        self._best_masks = _copied(self.masks)
        self._descent: MaskedDescent | None = None
        self.judged: list[Judgement] = []
        self.held = -1
        self.points: list[sensitivity.Point] = []
        """Of the scan."""
        self.emptied: list[str] = []
        """Layers that have no weights left; they end the run."""
        self._initial: dict[str, float] = {}
        self._notes: list[str] = []
        self._rates: dict[int, float] = {}
        check_names(space, settings)
        groups: list[Group] = ["fc", "conv"] if settings.alternate and len(self.network.convs) else ["all"]
        self._groups = groups
        dense = 0 if start is not None else self.steps * settings.training.epochs
        self._stages = stages(settings, dense, self.steps, len(self.masks), groups)
        self.total = self._stages[-1].begins + self._stages[-1].ticks

    def advance(self, pause: Callable[[], bool]) -> None:
        """As `Trainer.advance`, but a tick may be of any kind; `total` falls where a run ends early."""
        if self._descent is not None:
            self._take_up(self._descent)
        while self.done < self.total:
            stage = self._stage()
            ticks = {"train": self._train, "scan": self._scan, "prune": self._prune, "judge": self._judge}
            ticks[stage.kind](stage, self.done - stage.begins)
            self.done += 1
            if self._team.agree(pause()):
                break
        self._gather()

    def dense(self) -> PlainNetwork:
        """The trained network before pruning: what the outcome is to be compared with."""
        return self._with(self._dense)

    def outcome(self) -> Outcome:
        """The best pruned network, without its dead channels.

        Raises:
            LayerEmptied: a layer lost all its weights on the way to what was asked for.
            BudgetMissed: the accuracy did not hold until the budget was met.
        """
        goal = self.pruning.goal
        if self.emptied and not isinstance(goal, goals.Growth):
            raise LayerEmptied(self.emptied, self.judged[-1].round)
        budget = goal.budget if isinstance(goal, goals.Growth) else goal
        if isinstance(budget, goals.Budget):
            prices = goals.price(budget.metric, self.network.nodes, self._best_masks)
            if (reached := m.cost(self._best_masks, prices)) > budget.maximum:
                raise BudgetMissed(budget.metric, budget.maximum, reached)
        return Outcome(*dead_channels.shrunk(self._with(self._best), self._best_masks))

    def state(self) -> dict[str, Tensor]:
        """The network, its masks, both as they were dense and at their best, the optimiser's memory, running sums."""
        parts = {
            "net": self.network.state_dict(), "mask": self.masks, "dense": self._dense, "best": self._best,
            "best_mask": self._best_masks, "descent": self._descent.state() if self._descent else {},
        }  # fmt: skip
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        return tensors | {"sums": self._sums}

    def counters(self) -> dict[str, Any]:
        """As `Trainer.counters`."""
        return super().counters() | {
            "total": self.total, "judged": [asdict(one) for one in self.judged],
            "points": [asdict(one) for one in self.points], "emptied": self.emptied, "initial": self._initial,
            "notes": self._notes, "held": self.held,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """As `Trainer.restore`."""
        self._resume(counters)
        super().restore(tensors, counters)

    def align(self, counters: Mapping[str, Any]) -> None:
        """As `Trainer.align`; process 0 holds already what the others begin to."""
        if self._team.rank:
            self._resume(counters)
        super().align(counters)

    def _resume(self, counters: Mapping[str, Any]) -> None:
        self.done, self.total = counters["done"], counters["total"]
        self.judged = [Judgement(**{**row, "channels": tuple(row["channels"])}) for row in counters["judged"]]
        self.held = counters.get("held", -1)
        self.points = [sensitivity.Point(**row) for row in counters["points"]]
        self.emptied, self._notes = list(counters["emptied"]), list(counters["notes"])
        self._initial = dict(counters["initial"])
        self._descent = None
        if self.done < self.total and (stage := self._stage()).kind == "train" and self.done > stage.begins:
            self._descent = self._begin(stage)

    def _stage(self) -> Stage:
        return self._stages[bisect_right(self._stages, self.done, key=lambda stage: stage.begins) - 1]

    def _train(self, stage: Stage, tick: int) -> None:
        if self._descent is None:
            self._descent = self._begin(stage)
            self._take_up(self._descent)
        part, iteration = self._team.part(self._batch), stage.iterations + tick
        images, labels = self.batches.training(self.settings.batch_size, self.seed, iteration, self.device, part)
        rate = self._settings(stage).rate(tick, self.steps)
        self._update(images, labels, rate, tick % self.steps)
        if (tick + 1) % self.steps == 0:
            self._end_epoch(rate)
        if tick + 1 == stage.ticks:
            self._descent = None

    def _begin(self, stage: Stage) -> MaskedDescent:
        """An optimiser of the stage's layers, without memory."""
        asked = self.pruning
        return MaskedDescent(
            self.network, self.masks, stage.group, optimiser=asked.optimiser, momentum=self.settings.momentum,
            penalty=asked.retraining_penalty if stage.round else asked.penalty,
            decay=self._settings(stage).weight_decay,
        )  # fmt: skip

    def _take_up(self, descent: MaskedDescent) -> None:
        """Get the network ready for training with the masks as they are."""
        descent.hold()
        self._rates = dropout.rates(self.network.nodes, self.masks, self.pruning.dropout)

    def _settings(self, stage: Stage) -> TrainingSettings:
        return self.pruning.retraining if stage.round else self.settings

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        assert self._descent is not None
        with self._autocast(), self._team.synchronised():
            logits = self.network.run(images, self._compute)
        self._loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        self._descent.mask_gradients()
        self._clip(self._descent.parameters)
        self._descent.step(rate)

    def _compute(self, i: int, x: Tensor) -> Tensor:
        """Node i in training, where hidden neurons are dropped before they are read."""
        before = self.network.nodes[i].input
        if rate := self._rates.get(before):
            x = dropout.drop(x, rate, self._batch, self._team.part(self._batch), self.seed, self.done, before)
        return self.network.compute(i, x)

    def _accuracy(self, network: PlainNetwork) -> float:
        return evaluate(network, self._validation, self.device).accuracy

    def _scan(self, stage: Stage, tick: int) -> None:
        assert isinstance(self.pruning.qualities, Scan)
        densities, names = self.pruning.qualities.densities, list(self.masks)
        layer, place = divmod(tick, len(densities))
        self.points.append(sensitivity.measure(self.network, names[layer], densities[place], self._accuracy))

    def _qualities(self) -> dict[str, float]:
        asked = self.pruning.qualities
        if isinstance(asked, Scan):
            return sensitivity.choose(self.points, self.judged[0].accuracy, asked.most)
        return {name: asked.get(self.network.nodes[int(name)].name, 1.0) for name in self.masks}

    def _prune(self, stage: Stage, tick: int) -> None:
        """One group; those that were pruned before in this round keep their masks."""
        deviations, first = self._deviations(), stage.group == self._groups[0]
        thresholds = goals.thresholds(self.pruning.goal, self._round(stage, deviations))
        now = {name: t for name, t in thresholds.items() if in_group(self.network, name, stage.group)}
        self.masks = m.pruned(m.prunable(self.network), self.masks, now)
        m.clear(self.network, self.masks)
        dead = dead_channels.remove(self.network, self.masks)
        self._notes = [] if first else self._notes
        self._notes += [*self._named_qualities(now, deviations), f"{dead} weights of dead channels"]
        self._notes.append(f"accuracy {self._accuracy(self.network):.4f} before retraining")

    def _round(self, stage: Stage, deviations: Mapping[str, float]) -> goals.Round:
        """The group's layers and those of later groups are open."""
        weights, qualities = m.prunable(self.network), self._qualities()
        later = self._groups[self._groups.index(stage.group) :]
        names = [name for name in weights if any(in_group(self.network, name, group) for group in later)]
        return goals.Round(
            stage.round, self.pruning.rounds, self.network.nodes, self.masks, {name: weights[name] for name in names},
            {name: qualities[name] * deviations[name] for name in names},
            lambda masks: dead_channels.without(self.network, masks),
        )  # fmt: skip

    def _deviations(self) -> dict[str, float]:
        weights = m.prunable(self.network)
        match self.pruning.std_over:
            case "initial":
                return self._initial
            case "all":
                return m.deviations(weights)
            case "survivors":
                return m.deviations(weights, self.masks)

    def _named_qualities(self, thresholds: m.Thresholds, deviations: Mapping[str, float]) -> list[str]:
        names = {name: self.network.nodes[int(name)].name for name in thresholds}
        return [f"{names[i]} q {t / deviations[i]:.3g}" for i, t in thresholds.items() if deviations[i]]

    def _judge(self, stage: Stage, tick: int) -> None:
        """A round that did not hold is the last one, and the one before it counts."""
        score = evaluate(self.network, self._validation, self.device)
        self._notes += [f"{layer} reads only zeros" for layer in self._silent()]
        nodes = self.network.nodes
        self.emptied = m.emptied(nodes, self.masks)
        self._notes += [f"{layer} has no weights left" for layer in self.emptied]
        living = dead_channels.living(self.network.space, self.masks)
        self.judged.append(Judgement(
            stage.round, tuple(len(living[i]) for i in range(len(living))), m.kept(self.masks),
            sum(mask.numel() for mask in self.masks.values()), m.sparse_flops(nodes, self.masks),
            score.accuracy, score.loss, "; ".join(self._notes),
        ))  # fmt: skip
        if stage.round == 0:
            _copy(self.network.state_dict(), self._dense)
            self._initial = m.deviations(m.prunable(self.network))
        if self._holds():
            _copy(self.network.state_dict(), self._best)
            _copy(self.masks, self._best_masks)
            self.held = len(self.judged) - 1
        else:
            self.total = self.done + 1

    def _silent(self) -> list[str]:
        return activity.silent(activity.measure(self.network, self.masks, self._validation, self.device))

    def _holds(self) -> bool:
        """Whether the network is still one, and as accurate as the goal wants it."""
        goal, loss = self.pruning.goal, self.judged[0].accuracy - self.judged[-1].accuracy
        return not self.emptied and (not isinstance(goal, goals.Growth) or loss <= goal.tolerance + ROUNDING)

    def _with(self, state: Mapping[str, Tensor]) -> PlainNetwork:
        network = PlainNetwork(self.network.space, self.network.channels)
        network.load_state_dict(dict(state))
        return network.to(self.device).eval()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _copy(tensors: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        to[name].copy_(tensor.detach())
