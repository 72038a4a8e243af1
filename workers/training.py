"""Training: a PruningNet on random structures, and one structure from scratch.

Both trainers advance one iteration at a time and can stop after any; what they hand over as tensors and counters is all
that a fresh process needs to go on, bit for bit (on the same machine and number of threads, which the process pins).
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_profiler.cost import CostModel
from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.spaces.space import CHOICES, Space
from workers.datasets import Batches, Data
from workers.evolution import DIVERGED
from workers.networks import PlainNetwork
from workers.pruning_net import SHARED, PruningNet
from workers.sampling import Genes, numpy_generator, sample
from workers.sgd import CroppedSGD, Momentum, Rule

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
    schedule: Literal["linear"] = "linear"
    clip_norm: float | None = None
    """Gradients are scaled down to this norm, and dropped where they are not finite; None leaves them. In networks of
    very few channels a dead one makes gradients explode through its batch norm."""
    normalise: bool = False
    """Whether generated weights are scaled to one deviation (`PruningNet`)."""
    weights: Literal["generated", "shared"] = "generated"
    """Whether a PruningNet generates weights, or structures share plain ones."""
    curriculum: float = 0.0
    """Share of the training over which sampled structures widen from nearly uniform widths to the whole space."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "TrainingSettings":
        """From a request's fields; those that are no setting of training are left out."""
        return cls(**{name: fields[name] for name in cls.__slots__ if fields.get(name) is not None})

    @property
    def hidden(self) -> int | None:
        """Hidden units of a PruningNet's blocks, for `PruningNet`."""
        return SHARED if self.weights == "shared" else None

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch."""
        return self.learning_rate * (1 - epoch / self.epochs)


class Trainer(abc.ABC):
    """What both trainers share: the loop, the history, the state."""

    network: nn.Module

    def __init__(self, batches: Batches, settings: TrainingSettings, seed: int, device: torch.device) -> None:
        self.batches, self.settings, self.seed, self.device = batches, settings, seed, device
        self.steps = batches.steps(settings.batch_size)
        self.total = settings.epochs * self.steps
        self.done = 0
        """Iterations behind."""
        self.history: list[dict[str, float]] = []
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Of the epoch so far: loss, right answers, images."""

    def latest(self) -> dict[str, float]:
        """Loss, accuracy and learning rate of the last finished epoch; empty in the first."""
        return dict(self.history[-1]) if self.history else {}

    def advance(self, pause: Callable[[], bool]) -> None:
        """Train until the end, or until `pause`, asked after every iteration, says so."""
        self.network.train()
        while self.done < self.total:
            epoch, step = divmod(self.done, self.steps)
            images, labels = self.batches.training(self.settings.batch_size, self.seed, self.done, self.device)
            self._update(images, labels, self.settings.rate(epoch), step)
            self.done += 1
            if self.done % self.steps == 0:
                self._end_epoch(self.settings.rate(epoch))
            if pause():
                return

    def counters(self) -> dict[str, Any]:
        """What is not a tensor of the state, as JSON."""
        return {"done": self.done, "history": self.history}

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

    @abc.abstractmethod
    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        """One iteration, the `step`-th of its epoch."""

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.settings.label_smoothing)
        right = (logits.detach().argmax(1) == labels).sum()
        count = torch.full_like(right, len(labels))
        self._sums += torch.stack([loss.detach().double() * len(labels), right.double(), count.double()])
        return loss

    def _end_epoch(self, rate: float) -> None:
        loss, right, count = self._sums.tolist()
        loss = loss / count if math.isfinite(loss) else DIVERGED
        self.history.append({"epoch": len(self.history), "loss": loss, "accuracy": right / count, "rate": rate})
        self._sums.zero_()

    def _clip(self, leaves: Sequence[Tensor]) -> None:
        if self.settings.clip_norm is None:
            return
        if not torch.isfinite(nn.utils.clip_grad_norm_(leaves, self.settings.clip_norm)):
            for leaf in leaves:
                leaf.grad = torch.zeros_like(leaf)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


class ScratchTrainer(Trainer):
    """Trains one structure as an ordinary network, on the whole training set."""

    network: PlainNetwork

    def __init__(
        self, space: Space, channels: Sequence[int], data: Data, settings: TrainingSettings, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(data.training, settings, seed, device)
        self.network = PlainNetwork(space, channels, seed).to(device)
        self._sgd = Momentum(*self.network.decayed())

    def state(self) -> dict[str, Tensor]:
        """The network, its momentum and the running sums."""
        momentum = {f"momentum.{i}": tensor for i, tensor in enumerate(self._sgd.moments)}
        return {f"net.{k}": v for k, v in self.network.state_dict().items()} | momentum | {"sums": self._sums}

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        with self._autocast():
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
        band: tuple[float, float] | None, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(data.sub_training, settings, seed, device)
        self.network = PruningNet(space, settings.hidden, seed, normalised=settings.normalise).to(device)
        self._structures = Structures(space, band, seed, int(settings.curriculum * self.total))
        self._blocks = {name: CroppedSGD(crop) for name, crop in self.network.crops(space.largest).items()}
        self._sgd = Momentum(*self.network.ordinary())
        self._powers: tuple[Rule, Tensor] | None = None
        self._structures.at(self.done)

    def state(self) -> dict[str, Tensor]:
        """The network, momentum, the steps that each entry of the generators contains, and the running sums."""
        tensors = {f"net.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"momentum.{i}": tensor for i, tensor in enumerate(self._sgd.moments)}
        for name, block in self._blocks.items():
            tensors[f"momentum.{name}.weight"] = block.momentum.weight
            tensors[f"momentum.{name}.bias"] = block.momentum.bias
            tensors[f"done.{name}"] = block.done
        return tensors | {"sums": self._sums}

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        encoding = self._structures.at(self.done)
        rule, powers = self._rule(rate)
        crops = {
            name: self._blocks[name].current(crop, step, powers) for name, crop in self.network.crops(encoding).items()
        }
        with self._autocast():
            logits = self.network(images, encoding, crops)
        self._loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        self._clip(self._sgd.parameters + [leaf for crop in crops.values() for leaf in (crop.weight, crop.bias)])
        for name, crop in crops.items():
            self._blocks[name].step(crop, step, powers, rule.rate)
        self._sgd.step(rule)

    def _end_epoch(self, rate: float) -> None:
        super()._end_epoch(rate)
        for block in self._blocks.values():
            block.catch_up(self.steps, self._rule(rate)[1])

    def _rule(self, rate: float) -> tuple[Rule, Tensor]:
        rule = Rule(rate, self.settings.momentum, self.settings.weight_decay)
        if self._powers is None or self._powers[0] != rule:
            self._powers = rule, rule.powers(self.steps).to(self.device)
        return self._powers


class Structures:
    """The random structure of every iteration.

    Args:
        band: FLOPs between which structures lie; None draws genes uniformly, as published.
        widening: iterations over which the spread of a band's structures grows to the whole space.
    """

    def __init__(self, space: Space, band: tuple[float, float] | None, seed: int, widening: int = 0) -> None:
        self._space, self._band, self._seed, self._widening = space, band, seed, widening
        self._model, self._widths = CostModel(space), np.array(space.choices)
        self._fixed = np.array([slot.base for slot in space.fixed], dtype=np.int64)
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
            drawn = sample(self._flops, low, high, genes, STRUCTURES, random, spread)
        if not len(drawn):
            raise InfeasibleConstraint("flops", asked_high if asked_high < smallest else asked_low, smallest, largest)
        return drawn

    def _flops(self, encodings: Genes) -> npt.NDArray[np.float64]:
        chosen = self._widths[np.arange(len(self._widths)), encodings]
        fixed = np.broadcast_to(self._fixed, (len(encodings), len(self._fixed)))
        return self._model.flops(np.concatenate([chosen, fixed], axis=1)).astype(np.float64)
