"""Training: a PruningNet on random structures, and one structure from scratch.

Both trainers advance one iteration at a time and can stop after any; what they hand over as tensors and counters is all
that a fresh process needs to go on, bit for bit (on the same machine and number of threads, which the process pins).
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_profiler.cost import CostModel
from latency_profiler.errors import InfeasibleConstraint, InvalidInput
from latency_profiler.spaces.space import CHOICES, Space
from workers.datasets import Batches, Data
from workers.evolution import DIVERGED
from workers.networks import PlainNetwork
from workers.parallel import ALONE, Team
from workers.placement import place, precision
from workers.pruning_net import SHARED, PruningNet
from workers.replay import Replay
from workers.sampling import Genes, least_choices, numpy_generator, sample
from workers.sgd import CroppedSGD, Modes, Momentum, Rule, fed

STRUCTURES = 64
"""Structures are drawn so many iterations at a time."""
NARROWEST = 0.15
"""Spread of structures at the beginning of a curriculum; 1 is the whole space."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """SGD with momentum; the learning rate falls linearly, epoch by epoch, and would be zero after the last."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    schedule: Literal["linear", "steps"] = "linear"
    """How the rate falls over the epochs: in proportion to those left, or to a tenth after every quarter of them."""
    clip_norm: float | None = None
    """Gradients are scaled down to this norm, and dropped where they are not finite; None leaves them. In networks of
    very few channels a dead one makes gradients explode through its batch norm."""
    normalise: bool = False
    """Whether generated weights are scaled to one deviation (`PruningNet`)."""
    weights: Literal["generated", "shared"] = "generated"
    """Whether a PruningNet generates weights, or structures share plain ones."""
    augment: bool = True
    """Whether images are shifted and mirrored at random; a network too small to fit them as they are learns more
    without."""
    curriculum: float = 0.0
    """Share of the training over which sampled structures widen from nearly uniform widths to the whole space."""
    warm_up: float = 0.0
    """Share of the training over which the learning rate rises; a narrow network that starts high may never learn."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "TrainingSettings":
        """From a request's fields; those that are no setting of training are left out."""
        return cls(**{name: fields[name] for name in cls.__slots__ if fields.get(name) is not None})

    @property
    def hidden(self) -> int | None:
        """Hidden units of a PruningNet's blocks, for `PruningNet`."""
        return SHARED if self.weights == "shared" else None

    def rate(self, iteration: int, steps: int) -> float:
        """Learning rate of an iteration, in epochs of so many steps."""
        rising = self.warm_up * self.epochs * steps
        start = min(1.0, (iteration + 1) / rising) if rising else 1.0
        epoch = iteration // steps
        left = 1 - epoch / self.epochs if self.schedule == "linear" else 0.1 ** (4 * epoch // self.epochs)
        return self.learning_rate * left * start


class Trainer(abc.ABC):
    """What both trainers share: the loop, the history, the state.

    Args:
        team: the processes that train together; their trainers do the same steps, each with its part of a batch.
    """

    network: nn.Module

    def __init__(
        self, batches: Batches, settings: TrainingSettings, seed: int, device: torch.device, team: Team
    ) -> None:  # fmt: skip
        self.batches = batches if settings.augment else batches.unaugmented()
        self.settings, self.seed, self.device, self._team = settings, seed, device, team
        self._batch = min(settings.batch_size, len(batches))
        if self._batch < team.size:
            raise InvalidInput(f"batches of {self._batch} images cannot be shared by {team.size} training processes")
        self.steps = batches.steps(settings.batch_size)
        self.total = settings.epochs * self.steps
        self.done = 0
        """Iterations behind."""
        self.history: list[dict[str, float]] = []
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Of the epoch so far: loss, right answers, images; while `advance` runs, of this process's parts."""

    def latest(self) -> dict[str, float]:
        """Loss, accuracy and learning rate of the last finished epoch; empty in the first."""
        return dict(self.history[-1]) if self.history else {}

    def advance(self, pause: Callable[[], bool]) -> None:
        """Train until the end, or until `pause` of process 0, asked after every iteration, says so."""
        self.network.train()
        part = self._team.part(self._batch)
        while self.done < self.total:
            rate = self._rate()
            images, labels = self.batches.training(self.settings.batch_size, self.seed, self.done, self.device, part)
            self._update(images, labels, rate, self.done % self.steps)
            self.done += 1
            if self.done % self.steps == 0:
                self._end_epoch(rate)
            if self._team.agree(pause()):
                break
        self._gather()

    def counters(self) -> dict[str, Any]:
        """What is not a tensor of the state, as JSON."""
        return {"done": self.done, "history": self.history}

    def _rate(self) -> float:
        """Learning rate of the iteration; a trainer that trains more than once begins the schedule again."""
        return self.settings.rate(self.done, self.steps)

    @abc.abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Every tensor that a fresh trainer needs; they are not copies."""

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Go on where another trainer with the same arguments was when it gave these."""
        mine = self.state()
        if missing := mine.keys() ^ tensors.keys():
            raise ValueError(f"not a state of this trainer: {sorted(missing)[:3]} do not match")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self.done, self.history = counters["done"], list(counters["history"])

    def align(self, counters: Mapping[str, Any]) -> None:
        """Go on where process 0 is, whose counters these are."""
        self._team.align(self.state().values())
        self.done, self.history = counters["done"], list(counters["history"])
        if self._team.rank:
            self._sums.zero_()

    @abc.abstractmethod
    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        """One iteration, the `step`-th of its epoch."""

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.settings.label_smoothing)
        right = (logits.detach().argmax(1) == labels).sum()
        count = torch.full_like(right, len(labels))
        self._sums += torch.stack([loss.detach().double() * len(labels), right.double(), count.double()])
        return loss if self._team.size == 1 else loss * (len(labels) / self._batch)

    def _gather(self) -> None:
        """Sums of all processes go to process 0, which stores them."""
        self._team.sum(self._sums)
        if self._team.rank:
            self._sums.zero_()

    def _end_epoch(self, rate: float) -> None:
        self._team.sum(self._sums)
        loss, right, count = self._sums.tolist()
        loss = loss / count if math.isfinite(loss) else DIVERGED
        self.history.append({"epoch": len(self.history), "loss": loss, "accuracy": right / count, "rate": rate})
        self._sums.zero_()

    def _clip(self, leaves: Sequence[Tensor], shares: Tensor | None = None) -> None:
        """Scale gradients down to the settings' norm; `shares` (n,) says how often the last n leaves' norms count."""
        if self.settings.clip_norm is None:
            return
        leaves = [leaf for leaf in leaves if leaf.grad is not None]
        norms = torch.stack(torch._foreach_norm([leaf.grad for leaf in leaves if leaf.grad is not None]))
        if shares is not None:
            norms[-len(shares) :] *= shares
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(leaves, self.settings.clip_norm, norm)
        if self.device.type != "cpu":  # the host must not wait for the norm; one not finite has left only 0 and NaN
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.grad.nan_to_num_(0.0, 0.0, 0.0)
        elif not torch.isfinite(norm):
            for leaf in leaves:
                leaf.grad = torch.zeros_like(leaf)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = precision(self.device, self.batches.image_size)
        return nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype=dtype)


class ScratchTrainer(Trainer):
    """Trains one structure as an ordinary network, on the whole training set.

    Args:
        start: the state of the network to go on from; None is its initialisation from the seed.
    """

    network: PlainNetwork

    def __init__(
        self, space: Space, channels: Sequence[int], data: Data, settings: TrainingSettings, seed: int,
        device: torch.device, team: Team = ALONE, start: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data.training, settings, seed, device, team)
        self.network = PlainNetwork(space, channels, seed).to(device)
        if start is not None:
            self.network.load_state_dict(start)
        team.share([*self.network.convs.parameters(), *self.network.linears.parameters()])
        self._sgd = Momentum(*self.network.decayed())
        self._step: Callable[..., None] = (
            Replay(self._work, device) if device.type == "cuda" and team.size == 1 else self._work
        )

    def state(self) -> dict[str, Tensor]:
        """The network, its momentum and the running sums."""
        momentum = {f"momentum.{i}": tensor for i, tensor in enumerate(self._sgd.moments)}
        return {f"net.{k}": v for k, v in self.network.state_dict().items()} | momentum | {"sums": self._sums}

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        self._step(rate, images, labels)

    def _work(self, rate: float, images: Tensor, labels: Tensor) -> None:
        with self._autocast(), self._team.synchronised():
            logits = self.network(images)
        self._loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        self._clip(self._sgd.parameters)
        self._sgd.step(Rule(rate, self.settings.momentum, self.settings.weight_decay))


class PruningNetTrainer(Trainer):
    """Trains a PruningNet on the sub-training set: every iteration another random structure.

    Args:
        band: structures have FLOPs between these bounds; None draws genes uniformly.

    Raises:
        InfeasibleConstraint: no structure was found in the band.
    """

    network: PruningNet

    def __init__(
        self, space: Space, data: Data, settings: TrainingSettings, seed: int,
        band: tuple[float, float] | None, device: torch.device, team: Team = ALONE,
    ) -> None:  # fmt: skip
        super().__init__(data.sub_training, settings, seed, device, team)
        self.network = PruningNet(space, settings.hidden, seed, normalised=settings.normalise).to(device)
        team.share(self.network.classifiers.parameters())
        self._structures = Structures(space, band, seed, int(settings.curriculum * self.total))
        self._modes = lru_cache(maxsize=1)(self._modes_of)
        modes, _ = self._now()
        self._blocks = {name: CroppedSGD(crop, modes) for name, crop in self.network.crops(space.largest).items()}
        self._sgd = Momentum(*self.network.ordinary())
        self._structures.at(self.done)

    def advance(self, pause: Callable[[], bool]) -> None:
        """Train until the end, or until `pause` says so; then the network's weights are those of that moment."""
        super().advance(pause)
        self._write()

    def state(self) -> dict[str, Tensor]:
        """The network, its momentum and the running sums; the blocks' modes stand for their weights."""
        written = {f"generators.{name}.{part}" for name in self._blocks for part in ("weight", "bias")}
        tensors = {f"net.{name}": one for name, one in self.network.state_dict().items() if name not in written}
        tensors |= {f"momentum.{i}": tensor for i, tensor in enumerate(self._sgd.moments)}
        for name, block in self._blocks.items():
            tensors |= {f"modes.{name}.weight": block.weight, f"modes.{name}.bias": block.bias}
        return tensors | {"sums": self._sums}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Go on where another trainer with the same arguments was when it gave these."""
        super().restore(tensors, counters)
        self._write()

    def align(self, counters: Mapping[str, Any]) -> None:
        """Go on where process 0 is, whose counters these are."""
        super().align(counters)
        self._write()

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        encoding, modes = self._structures.at(self.done), self._modes(rate)
        units, by = place(torch.tensor([modes.units(step), modes.steps(step)]), self.device)
        crops = {
            name: self._blocks[name].begin(crop.bias.shape[0], crop.bias.shape[1], units)
            for name, crop in self.network.crops(encoding).items()
        }
        hidden = self.network.hidden(encoding)
        weights = self.network.generate(encoding, crops, {name: fed(one, units) for name, one in hidden.items()})
        self._team.share(weights.values())
        with self._autocast(), self._team.synchronised():
            logits = self.network(images, encoding, weights)
        self._loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        # A bias's gradient g stands for the one of its block's weight too, which is g times each hidden unit.
        norms = torch.stack(torch._foreach_norm([hidden[name].detach() for name in crops]))
        self._clip([*self._sgd.parameters, *(crop.bias for crop in crops.values())], (1 + norms.square()).sqrt())
        with torch.no_grad():
            for name, crop in crops.items():
                self._blocks[name].end(crop, hidden[name].detach(), by, modes.renewals(step))
        self._sgd.step(self._rule(rate))

    def _end_epoch(self, rate: float) -> None:
        super()._end_epoch(rate)
        if self.done < self.total:
            old, (new, _) = self._modes(rate), self._now()
            for block in self._blocks.values():
                block.rebase(old, self.steps, new)

    def _write(self) -> None:
        for block in self._blocks.values():
            block.write(*self._now())

    def _now(self) -> tuple[Modes, int]:
        """The modes of the blocks as they are, and the steps behind them."""
        epoch = min(self.done // self.steps, self.settings.epochs - 1)
        return self._modes(self.settings.rate(epoch * self.steps, self.steps)), self.done - epoch * self.steps

    def _modes_of(self, rate: float) -> Modes:
        return Modes(self._rule(rate))

    def _rule(self, rate: float) -> Rule:
        return Rule(rate, self.settings.momentum, self.settings.weight_decay)


class Structures:
    """The random structure of every iteration.

    Args:
        band: FLOPs between which structures lie; None draws genes uniformly, as published.
        widening: iterations over which the spread of a band's structures grows to the whole space.
    """

    def __init__(self, space: Space, band: tuple[float, float] | None, seed: int, widening: int = 0) -> None:
        self._space, self._band, self._seed, self._widening = space, band, seed, widening
        self._model, self._narrowest = CostModel(space), least_choices(np.array(space.choices))
        self._drawn: tuple[int, Genes] | None = None

    def at(self, iteration: int) -> tuple[int, ...]:
        """The encoding that an iteration trains.

        Raises:
            InfeasibleConstraint: no structure was found in the band.
        """
        chunk, place = divmod(iteration, STRUCTURES)
        if self._drawn is None or self._drawn[0] != chunk:
            self._drawn = chunk, self._draw(chunk)
        encodings = self._drawn[1]
        return tuple(encodings[place % len(encodings)].tolist())

    def _draw(self, chunk: int) -> Genes:
        genes, random = len(self._space.genes), numpy_generator(self._seed, "structures", chunk)
        if self._band is None:
            return random.integers(0, CHOICES, (STRUCTURES, genes), dtype=np.int64)
        asked_low, asked_high = self._band
        smallest, largest = self._flops(np.array([self._space.smallest, self._space.largest])).tolist()
        low, high = max(asked_low, smallest), min(asked_high, largest)
        spread = min(1.0, NARROWEST + chunk * STRUCTURES / self._widening) if self._widening else 1.0
        drawn = np.empty((0, genes), dtype=np.int64)
        if low <= high:
            drawn = sample(
                self._flops, low, high, self._space.depths, STRUCTURES, random, spread, narrowest=self._narrowest
            )
        if not len(drawn):
            raise InfeasibleConstraint("flops", asked_high if asked_high < smallest else asked_low, smallest, largest)
        return drawn

    def _flops(self, encodings: Genes) -> npt.NDArray[np.float64]:
        return self._model.flops(self._model.channels(encodings)).astype(np.float64)
