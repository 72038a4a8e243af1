"""Interspace pruning of one network: at its beginning, in levels, or while it is trained.

Whatever the method, standard pruning is the same with `sharing="spatial"`. Entries that are pruned have no gradient,
no momentum and no decay, so they stay exactly zero through every step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latency_profiler.spaces.space import Space
from workers.datasets import Data, generator
from workers.evaluation import evaluate
from workers.networks import PlainNetwork
from workers.parallel import ALONE, Team
from workers.pruners import dynamic, scores
from workers.pruners.allowance import Allowance
from workers.pruners.filter_bases import InterspaceNetwork
from workers.pruners.interspace_settings import DYNAMIC, InterspaceSettings
from workers.pruners.judgement import Judgement
from workers.pruners.masks import Masks, emptied, kept, sparse_flops
from workers.sgd import Momentum, Rule
from workers.training import Trainer, TrainingSettings


@dataclass(frozen=True, slots=True)
class Outcome:
    """The finished network, in ordinary filters and in bases."""

    network: PlainNetwork
    """With dense weights. Where a layer has no basis, what is pruned is exactly zero."""
    masks: Masks
    """By node: True where a coefficient, or a weight of a layer without basis, is kept."""
    bases: dict[str, Tensor]
    """By group: F (m, m). With the masks, `InterspaceNetwork.adopt` makes coefficients of the weights again."""


class InterspaceTrainer(Trainer):
    """Prunes and trains one network; judges each mask on the sub-validation set when its training ends.

    Pruning at the beginning takes no iteration of training; `done` and `total` count the latter. Scores see the
    sub-training set alone.

    Args:
        start: state of a trained plain network to begin with; None begins with random weights.
        whole: train on the whole training set, as winners are; judgements then see images that were trained on.
    """

    network: InterspaceNetwork

    def __init__(
        self, space: Space, channels: Sequence[int], data: Data, training: TrainingSettings,
        options: InterspaceSettings, allowance: Allowance, seed: int, device: torch.device, team: Team = ALONE, *,
        start: Mapping[str, Tensor] | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(data.training if whole else data.sub_training, training, seed, device, team)
        self.options, self.allowance, self._data, self._trained = options, allowance, data, start is not None
        self.network = InterspaceNetwork(space, channels, seed, options.bases)
        if start is not None:
            self.network.adopt(start)
        self.network.to(device)
        self._theta = self.network.prunable()
        rates = dict.fromkeys(self.network.bases.values(), options.bases.rate)
        self._sgd = Momentum(*self.network.decayed(), rates)
        self.masks: Masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self._theta.items()}
        self.round = 0
        """Masks behind; 0 is the dense network."""
        self.judged: list[Judgement] = []
        self.held = -1
        self._started = 0
        """Rounds of pruning at the beginning that are behind."""
        self._rounds_at_start = options.rounds_at_start(self._trained)
        self._levels = options.levels(allowance.share, self._trained)
        self._stage = self.total
        """Iterations of training with one level, over which the schedule of the learning rate runs."""
        self.total *= len(self._levels)
        self._first = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        weights = [*self.network.convs.parameters(), *self.network.linears.parameters(), *self.network.bases.values()]
        team.share(weight for weight in weights if weight.requires_grad)

    def advance(self, pause: Callable[[], bool]) -> None:
        """Prune at the beginning, if the method does, and train; until the end, or until `pause` says so."""
        while self._started < self._rounds_at_start:
            self._prune_at_start()
            self._started += 1
            if self._team.agree(pause()):
                return
        super().advance(pause)

    def state(self) -> dict[str, Tensor]:
        """The network, its momentum, the masks and the running sums."""
        momentum = {f"momentum.{i}": tensor for i, tensor in enumerate(self._sgd.moments)}
        masks = {f"mask.{name}": mask for name, mask in self.masks.items()}
        network = {f"net.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return network | momentum | masks | {"sums": self._sums}

    def counters(self) -> dict[str, Any]:
        """As of every trainer, and the judgements."""
        judged = [asdict(one) | {"channels": list(one.channels)} for one in self.judged]
        return super().counters() | {"started": self._started, "round": self.round, "judged": judged}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """As of every trainer."""
        super().restore(tensors, counters)
        self._count(counters)

    def align(self, counters: Mapping[str, Any]) -> None:
        """As of every trainer."""
        super().align(counters)
        self._count(counters)

    def outcome(self) -> Outcome:
        """The network as it is now."""
        bases = {group: basis.detach().clone() for group, basis in self.network.bases.items()}
        return Outcome(self.network.plain(), {name: mask.clone() for name, mask in self.masks.items()}, bases)

    def _count(self, counters: Mapping[str, Any]) -> None:
        self._started, self.round = counters["started"], counters["round"]
        self.judged = [Judgement(**{**one, "channels": tuple(one["channels"])}) for one in counters["judged"]]

    def _rate(self) -> float:
        return self.settings.rate(self.done % self._stage, self.steps)

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        with self._autocast(), self._team.synchronised():
            logits = self.network(images)
        self._loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        if self._exchanges_by_gradient():
            self._exchange_by_gradient()
            return
        for name, parameter in self._theta.items():
            assert parameter.grad is not None
            parameter.grad.masked_fill_(~self.masks[name], 0.0)
        self._clip(self._sgd.parameters)
        self._sgd.step(Rule(rate, self.settings.momentum, self.settings.weight_decay))

    def _end_epoch(self, rate: float) -> None:
        super()._end_epoch(rate)
        level, within = divmod(self.done, self._stage)
        if not within or self.options.method in DYNAMIC:
            self._judge()
        if self.done == self.total:
            return
        if not within:
            self._begin_level(level)
        elif self.options.method == "set":
            self._exchange(scores.random_scores(self.network, self.seed, "grow", self.done), self.options.set_share)

    def _prune_at_start(self) -> None:
        """One round: of SynFlow's many, or the only one."""
        options, allowance = self.options, self.allowance
        match options.method:
            case "synflow":
                share = allowance.share ** ((self._started + 1) / options.synflow_rounds)
                masks = allowance.relaxed(share).best(scores.synflow(self.network), self.masks)
            case "set" | "rigl":
                densities = options.set_densities if options.method == "set" else options.rigl_densities
                shapes = {name: tuple(entry.shape) for name, entry in self._theta.items()}
                counts = dynamic.layer_counts(shapes, allowance, densities)
                masks = dynamic.starting_masks(scores.random_scores(self.network, self.seed), counts)
            case _:
                masks = allowance.relaxed(self._levels[0]).best(self._scores())
        if options.method == "snip" and options.snip_second_start and not self._trained:
            self._draw_again()
        self._apply(masks, ended=self._started + 1 == self._rounds_at_start)

    def _scores(self) -> scores.Scores:
        """Of the methods that prune all layers at one threshold, at once."""
        options, data = self.options, self._data.sub_training
        match options.method:
            case "snip":
                count = options.snip_images
                return scores.snip(self.network, *next(data.sample(count, self.seed).plain(count, self.device)))
            case "grasp":
                batch = scores.first_of_each_class(
                    data, self._data.classes, options.grasp_images, self.seed, self.device
                )
                xavier = self.seed if options.grasp_xavier and not self._trained else None
                return scores.grasp(self.network, *batch, options.grasp_temperature, xavier)
            case "magnitude":
                return scores.magnitude(
                    self.network, basis_norms=options.lottery_basis_norms,
                    keep_classifier=options.lottery_keeps_classifier,
                )  # fmt: skip
            case _:
                return scores.random_scores(self.network, self.seed)

    def _draw_again(self) -> None:
        """Other random weights and coefficients, in the bases that are there."""
        seed = generator(self.seed, "second start").initial_seed()
        fresh = PlainNetwork(self.network.space, self.network.channels, seed)
        self.network.load_state_dict(fresh.state_dict(), strict=False)

    def _begin_level(self, level: int) -> None:
        """Prune what training has made small, and train again from where the settings say."""
        masks = self.allowance.relaxed(self._levels[level]).best(self._scores(), self.masks)
        if self.options.rewinds(self._trained):
            self.network.load_state_dict(self._first)
        for moment in self._sgd.moments:
            moment.zero_()
        self._apply(masks)

    def _exchanges_by_gradient(self) -> bool:
        options, done = self.options, self.done
        return options.method == "rigl" and 0 < done <= options.rigl_last(self.total) and done % options.rigl_every == 0

    def _exchange_by_gradient(self) -> None:
        """In the place of the optimiser's step: the gradient of inactive entries is that of F^T dL/dh, unmasked."""
        growth = {name: entry.grad.abs() for name, entry in self._theta.items() if entry.grad is not None}
        self._exchange(growth, self.options.rigl_share_at(self.done, self.total))
        for parameter in self._sgd.parameters:
            parameter.grad = None

    def _exchange(self, growth: Mapping[str, Tensor], share: float) -> None:
        magnitudes = {name: entry.detach().abs() for name, entry in self._theta.items()}
        self._apply({
            name: dynamic.exchanged(magnitudes[name], mask, growth[name], share) for name, mask in self.masks.items()
        })  # fmt: skip

    @torch.no_grad()
    def _apply(self, masks: Masks, ended: bool = True) -> None:
        """Prune what is not kept; what comes is zero already, and so is its momentum."""
        moments = {id(p): moment for p, moment in zip(self._sgd.parameters, self._sgd.moments, strict=True)}
        for name, entry in self._theta.items():
            self.masks[name].copy_(masks[name])
            for tensor in (entry, moments[id(entry)]):
                tensor.masked_fill_(~masks[name], 0.0)
        self.round += ended

    def _judge(self) -> None:
        score = evaluate(self.network, self._data.sub_validation, self.device)
        self.network.train()
        options, nodes = self.options, self.network.nodes
        notes = [f"{options.method}, {options.bases.sharing}"]
        notes += [f"{layer} has no weights left" for layer in emptied(nodes, self.masks)]
        self.judged.append(
            Judgement(
                self.round, self.network.channels, kept(self.masks), sum(self.allowance.sizes.values()),
                sparse_flops(nodes, self.masks), score.accuracy, score.loss, "; ".join(notes),
            )
        )  # fmt: skip
