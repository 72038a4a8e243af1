"""What a job can ask of the methods that prune a trained network, or one at its beginning.

Defaults are those of the algorithms' own settings in `workers/pruners`, which say where each is from; a test keeps them
equal. Trainings are filled in from the job's effort preset.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.choices import Method
from service.fields import Model, ScratchSpec

UNSTRUCTURED: frozenset[Method] = frozenset({"magnitude", "interspace"})
"""They prune single weights: a bound on parameters or flops bounds what is kept, and no latency changes."""
Share = Annotated[float, Field(gt=0, lt=1)]
Images = Annotated[int, Field(ge=2, le=1_000_000)]
Rounds = Annotated[int, Field(ge=1, le=1000)]
Epochs = Annotated[int, Field(ge=1, le=1000)]


class CollaborativeSpec(Model):
    """Collaborative channel pruning: channels whose removal together costs least (ICML 2019)."""

    ranking: Literal["collaborative", "diagonal", "l1"] = "collaborative"
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    curvature: Literal["fisher", "gauss_newton", "monte_carlo"] = "fisher"
    gate: Literal["weight", "activation", "centred"] = "activation"
    allocation: Literal["layerwise", "global"] = "layerwise"
    ratios: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=500)] | None = None
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    widths: Literal["any", "choices"] = "any"
    shortcuts: bool = True
    order: Literal["one_shot", "sequential"] = "one_shot"
    images: Annotated[int, Field(ge=16, le=1_000_000)] = 2048
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 128
    recalibration_images: Literal[0] | Annotated[int, Field(ge=16, le=1_000_000)] = 512
    auxiliaries: Annotated[int, Field(ge=0, le=20)] = 0
    auxiliary_weight: Annotated[float, Field(gt=0, le=10)] = 0.3
    auxiliary_epochs: Epochs = 1
    auxiliary_joint: bool = True
    fine_tune_on: Literal["training", "sub_training"] = "training"
    fine_tuning: ScratchSpec = ScratchSpec()
    """As `dense` at a tenth of its learning rate, and without a warm-up, where it says nothing."""

    @model_validator(mode="after")
    def _fits(self) -> "CollaborativeSpec":
        if self.loss == "squared_error" and self.curvature == "fisher":
            raise ValueError("the squared error has no empirical Fisher matrix: use gauss_newton or monte_carlo")
        if self.ranking == "l1" and self.allocation == "global":
            raise ValueError("L1 norms of different layers cannot be compared: use layerwise allocation")
        return self


class MagnitudeSpec(Model):
    """Learning both weights and connections: prune what is small, retrain, again (NIPS 2015)."""

    rounds: Rounds = 5
    retraining_epochs: Annotated[int, Field(ge=0, le=1000)] = 10
    retraining_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    scan: bool = False
    """Choose the layers' qualities by their sensitivity, instead of one quality for all."""
    qualities: dict[str, Annotated[float, Field(gt=0, le=100)]] = {}  # noqa: RUF012 - pydantic copies it
    """Of layers by name; others have 1."""
    tolerance: Annotated[float, Field(ge=0, le=1)] | None = None
    """Prune on while retraining brings the accuracy back to within so much of the dense one; None prunes straight to
    the budget in `rounds`."""
    growth: Annotated[float, Field(gt=0, le=10)] = 0.25
    """With a tolerance: what qualities grow by in every round."""
    std_over: Literal["survivors", "all", "initial"] = "survivors"
    penalty: Literal["l1", "l2"] = "l2"
    retraining_penalty: Literal["l1", "l2"] = "l2"
    retraining_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    alternate: bool = False
    optimiser: Literal["momentum", "adam"] = "momentum"

    @model_validator(mode="after")
    def _one_choice_of_qualities(self) -> "MagnitudeSpec":
        if self.scan and self.qualities:
            raise ValueError("qualities are given or scanned for, not both")
        return self


class InterspaceSpec(Model):
    """Interspace pruning: coefficients of trainable filter bases (CVPR 2022); `spatial` is standard pruning."""

    pruning: Literal["random", "snip", "grasp", "synflow", "magnitude", "set", "rigl"] = "synflow"
    sharing: Literal["spatial", "coarse", "medium", "fine"] = "fine"
    first: bool = True
    initialisation: Literal["standard", "orthonormal"] = "standard"
    trained: bool = True
    rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Learning rate of the bases over that of all else."""
    decayed: bool = False
    snip_images: Images = 100
    snip_second_start: bool = True
    grasp_temperature: Annotated[float, Field(gt=0, le=1e6)] = 200.0
    grasp_images: Images = 10
    grasp_xavier: bool = True
    synflow_rounds: Rounds = 100
    lottery_share: Share = 0.2
    lottery_rewinds: bool | None = None
    """Whether levels of magnitude pruning begin from the first weights; None: unless these are trained already, by
    `from_dense` or `start`."""
    lottery_keeps_classifier: bool = True
    lottery_basis_norms: bool = False
    set_share: Share = 0.3
    set_densities: Literal["er", "erk", "uniform"] = "er"
    rigl_share: Share = 0.3
    rigl_annealed: bool = False
    rigl_every: Annotated[int, Field(ge=1, le=10_000_000)] = 100
    rigl_until: Annotated[int, Field(ge=1, le=10_000_000)] = 25_000
    rigl_densities: Literal["er", "erk", "uniform"] = "erk"
    from_dense: bool = False
    """Prune a trained dense network instead of random weights."""

    @property
    def keeps_classifier(self) -> bool:
        """Whether all other layers are pruned before the classifier is."""
        return self.pruning == "magnitude" and self.lottery_keeps_classifier
