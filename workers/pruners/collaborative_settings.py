"""What can be chosen in collaborative channel pruning, and the stages that follow from it."""

from dataclasses import dataclass
from typing import Literal

from latency_profiler.errors import InvalidInput
from latency_profiler.spaces.space import Space
from workers.pruners.channel_statistics import Curvature, Expansion, Loss
from workers.pruners.gates import Gate
from workers.training import TrainingSettings

Ranking = Literal["collaborative", "diagonal", "l1"]


@dataclass(frozen=True, slots=True)
class CollaborativeSettings:
    """Of the publication only its authors' summary was at hand; what that leaves open is marked as having no source."""

    fine_tuning: TrainingSettings
    """Of the pruned network. No source: the publication's are unknown."""
    ranking: Ranking = "collaborative"
    """What tells channels apart: u and S; u and the diagonal of S (no joint effects); or the L1 norm of their filters
    (Li et al., ICLR 2017). The last two are what the method is compared with."""
    loss: Loss = "cross_entropy"
    """What is expanded; the publication has a form for either."""
    curvature: Curvature = "fisher"
    """How S approximates the Hessian. The empirical Fisher matrix is the publication's likely choice."""
    gate: Gate = "activation"
    """Where channels are cut (see `gates`): `weight` is the publication's, `activation` is what removal does, `centred`
    is what is left of that after `recalibration_images` or training."""
    allocation: Literal["layerwise", "global"] = "layerwise"
    """How the budget is shared: by ratios, as published, or by one problem over all slots."""
    ratios: tuple[float, ...] | None = None
    """Layerwise: proportions of kept channels per gene; None keeps the same share of every slot."""
    floor: float = 0.1
    """Share of its channels that every slot keeps at least. No source: the spaces begin at a tenth."""
    widths: Literal["any", "choices"] = "any"
    """Whether slots may have widths that are none of the space's choices; tables interpolate their latency."""
    shortcuts: bool = True
    """Whether slots that shortcuts add up in are pruned; their layers share a gate."""
    order: Literal["one_shot", "sequential"] = "one_shot"
    """All slots from the trained network's statistics, or slot by slot from the first layer on, each from statistics of
    what is left then. Which is the publication's is unknown."""
    images: int = 2048
    """Of the sub-training set, for the statistics. No source: S has no higher rank than this."""
    batch_size: int = 128
    """Of the statistics; it changes nothing but speed, and the means of centred gates."""
    recalibration_images: int = 512
    """Of the sub-training set, on which batch norms are measured anew after every pruning round; 0 leaves them.
    Fine-tuning normalises by its batches from the first step on, so channels that only make up for old statistics are
    worth nothing. No source: chosen here."""
    auxiliaries: int = 0
    """Auxiliary heads (CCP-AC). Their number, form and weight in the publication are unknown."""
    auxiliary_weight: float = 0.3
    """Of a head's loss, in statistics and trainings. No source: chosen here."""
    auxiliary_epochs: int = 1
    """Epochs in which the heads are trained before anything is pruned, with `fine_tuning`'s other settings."""
    auxiliary_joint: bool = True
    """Whether the network learns too in these epochs."""
    fine_tune_on: Literal["training", "sub_training"] = "training"
    """Of the first, as winners of a search are trained, the images that the last judgement is made on are a part."""

    def __post_init__(self) -> None:
        if self.loss == "squared_error" and self.curvature == "fisher":
            raise InvalidInput("the squared error has no empirical Fisher matrix here: use gauss_newton or monte_carlo")
        if self.ranking == "l1" and self.allocation == "global":
            raise InvalidInput("L1 norms of different layers cannot be compared: share the budget layerwise")
        if not 0 <= self.floor <= 1:
            raise InvalidInput(f"the floor is {self.floor}; it must be a share from 0 to 1")

    @property
    def expansion(self) -> Expansion:
        """For the statistics."""
        return Expansion(self.gate, self.loss, self.curvature)


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of the plan: the slots whose statistics it gathers, and those that are pruned by them."""

    name: Literal["heads", "statistics", "fine_tuning"]
    measured: tuple[int, ...] = ()
    pruned: tuple[int, ...] = ()


def prunable(space: Space, shortcuts: bool) -> tuple[int, ...]:
    """Slots that genes choose, with or without those whose layers shortcuts add to."""
    added = {unit.target for unit in space.units if unit.shortcut is not None}
    return tuple(i for i, slot in enumerate(space.genes) if shortcuts or slot not in added)


def plan(space: Space, slots: tuple[int, ...], settings: CollaborativeSettings) -> list[Step]:
    """The stages; slot by slot, the first layers come first."""
    steps = [Step("heads")] if settings.auxiliaries else []
    if settings.order == "one_shot":
        steps.append(Step("statistics", slots, slots))
    else:
        if settings.allocation == "global":
            steps.append(Step("statistics", slots))
        steps += [Step("statistics", (i,), (i,)) for i in sorted(slots, key=lambda i: space.depths[i])]
    return [*steps, Step("fine_tuning")]
