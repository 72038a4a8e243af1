"""What a run of magnitude pruning is asked for, and the stages that it goes through."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from latency_profiler.errors import InvalidInput
from latency_profiler.spaces.space import WEIGHTED, Space
from workers.pruners.descent import Group, Optimiser, Penalty
from workers.pruners.goals import Densities, Goal
from workers.pruners.masks import StdOver
from workers.training import TrainingSettings


@dataclass(frozen=True, slots=True)
class Scan:
    """Choose qualities by the layers' sensitivity (section 5; the rule and its numbers have no source)."""

    densities: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    """To each of which every layer is pruned alone, without retraining."""
    most: float = 0.01
    """Accuracy that one layer may lose."""


@dataclass(frozen=True, slots=True)
class MagnitudeSettings:
    """Sections are of Han et al. (2015)."""

    training: TrainingSettings
    """Of the dense network."""
    goal: Goal
    """How far to prune. No source: the paper's own thresholds are unknown."""
    rounds: int = 5
    """Prune/retrain iterations, at most; 1 is one-shot. VGG-16 took 5 (section 4.3)."""
    retraining_epochs: int = 10
    """In every round, for every group of layers; 0 does not retrain. No source: the paper gives hours."""
    retraining_rate: float = 0.1
    """Share of the dense learning rate: 1/10 for LeNet (section 4.1), 1/100 for AlexNet (section 4.2)."""
    qualities: Mapping[str, float] | Scan = field(default_factory=dict)
    """Of layers by name, others have 1; or how to choose them. The paper's own are unknown."""
    std_over: StdOver = "survivors"
    """Whose deviation a quality multiplies: of the weights that are left, of all with zeros, or of the dense network's.
    No source; with zeros counted, deviations shrink as layers are pruned."""
    penalty: Penalty = "l2"
    """Of the dense training, as strong as its weight decay; L2 is best where one retrains (section 3.1)."""
    retraining_penalty: Penalty = "l2"
    """The same when retraining; L1 first and then L2 is no better than L2 (section 5)."""
    retraining_decay: float | None = None
    """How strong that is; None as in the dense training (no source)."""
    dropout: float = 0.0
    """Share of the dense network's neurons dropped behind hidden fully-connected layers, less when retraining (section
    3.2). AlexNet has 0.5; no source for LeNet."""
    alternate: bool = False
    """Whether convolutions hold still while fully-connected layers are retrained, and the reverse (section 3.3)."""
    optimiser: Optimiser = "momentum"
    """No source: the paper names none, and its networks are Caffe's, whose default is SGD with momentum."""

    @property
    def retraining(self) -> TrainingSettings:
        """Of one group in one round."""
        dense = self.training
        decay = dense.weight_decay if self.retraining_decay is None else self.retraining_decay
        rate = self.retraining_rate * dense.learning_rate
        return replace(dense, epochs=self.retraining_epochs, learning_rate=rate, weight_decay=decay)


@dataclass(frozen=True, slots=True)
class Stage:
    """So many ticks of one kind; `begins` counts the ticks before it, `iterations` the training iterations."""

    kind: Literal["train", "scan", "prune", "judge"]
    round: int
    group: Group
    ticks: int
    begins: int
    iterations: int


def stages(settings: MagnitudeSettings, dense: int, steps: int, layers: int, groups: list[Group]) -> list[Stage]:
    """The run from beginning to end, if nothing stops it; round 0 is the dense network.

    Args:
        dense: iterations of the dense training.
        steps: iterations of an epoch.
        layers: that can be pruned.
        groups: in which the layers of a round are pruned, one after the other.
    """
    scan = settings.qualities
    rows: list[tuple[Literal["train", "scan", "prune", "judge"], int, Group, int]] = [
        ("train", 0, "all", dense),
        ("judge", 0, "all", 1),
        ("scan", 0, "all", layers * len(scan.densities) if isinstance(scan, Scan) else 0),
    ]
    for number in range(1, settings.rounds + 1):
        for group in groups:
            rows += [("prune", number, group, 1), ("train", number, group, settings.retraining_epochs * steps)]
        rows.append(("judge", number, "all", 1))
    found: list[Stage] = []
    begins = iterations = 0
    for kind, number, group, ticks in rows:
        if ticks:
            found.append(Stage(kind, number, group, ticks, begins, iterations))
        begins, iterations = begins + ticks, iterations + (ticks if kind == "train" else 0)
    return found


def check_names(space: Space, settings: MagnitudeSettings) -> None:
    """Raises `InvalidInput` where settings name a layer that the space does not have."""
    named: set[str] = set(settings.qualities) if isinstance(settings.qualities, Mapping) else set()
    named |= set(settings.goal.layers) if isinstance(settings.goal, Densities) else set()
    known = [unit.name for unit in space.units if unit.op in WEIGHTED]
    if unknown := sorted(named - set(known)):
        raise InvalidInput(f"{space.name} has no layer {unknown[0]!r} to prune; it has {', '.join(known)}")
