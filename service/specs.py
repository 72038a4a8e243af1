"""What a job can ask for, with the presets that fill in what the user left out.

`JobRequest` is the request's JSON; `resolve` fills in every default, so that a stored job says everything that
determines its result.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from latency_profiler.cost import Constraint, Metric, Statistic
from service.choices import Effort, LastLayer, Method, Objective, Strategy
from service.fields import ID, DescentSpec, Model, Name, ScratchSpec, Text
from service.methods import UNSTRUCTURED, CollaborativeSpec, InterspaceSpec, MagnitudeSpec

Count = Annotated[int, Field(ge=1, le=2**53)]


class CountConstraint(Model):
    """Bounds on multiply-adds or parameters."""

    metric: Literal["flops", "parameters"]
    max: Count
    min: Annotated[int, Field(ge=0, le=2**53)] | None = None

    def constraint(self) -> Constraint:
        """In the profiler's terms."""
        return Constraint(Metric(self.metric), self.max, self.min or 0)


class LatencyConstraint(Model):
    """Bounds on a device's milliseconds for one image batch."""

    metric: Literal["latency"]
    device: Name
    max_ms: Annotated[float, Field(gt=0, le=1e6)]
    min_ms: Annotated[float, Field(ge=0, le=1e6)] | None = None
    statistic: Statistic = Statistic.P50
    """Of the runs of the whole network on that device: `p90` bounds what nine of ten take."""

    def constraint(self) -> Constraint:
        """In the profiler's terms: seconds."""
        return Constraint(
            Metric.LATENCY, self.max_ms / 1000, (self.min_ms or 0) / 1000, self.device, self.statistic
        )  # fmt: skip


AnyConstraint = Annotated[CountConstraint | LatencyConstraint, Field(discriminator="metric")]


NARROWEST = 1.05
"""Of a band: neighbouring structures of small spaces are some percent apart."""


class TrainingSpec(DescentSpec):
    """How the PruningNet is trained. `band` limits sampled structures to these shares of the budget's FLOPs."""

    band: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1, le=100)]] | None = None
    normalise: bool | None = None
    """Scale generated weights to one deviation; not in the publication."""
    weights: Literal["generated", "shared"] = "generated"
    """`shared`: structures share plain weights of which each uses a part; the publication's ablation."""
    curriculum: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the training over which sampled structures widen from nearly uniform widths to the whole space."""
    validation_images: Annotated[int, Field(ge=10, le=1_000_000)] | None = None
    """Images split from the training set to judge candidates on; at most a fifth of it."""

    @field_validator("band")
    @classmethod
    def _wide_enough(cls, band: tuple[float, float] | None) -> tuple[float, float] | None:
        if band is not None and band[1] < NARROWEST * band[0]:
            raise ValueError(f"too narrow to hold structures; its end must be {NARROWEST} times its beginning or more")
        return band


class SearchSpec(Model):
    """The search; one generation is `population` candidates.

    Where a budget leaves no more structures than there are candidates, all are judged, unless `strategy` is random.
    """

    strategy: Strategy = "evolution"
    """`random` judges as many random structures: what evolution is to be compared with."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """Of the search alone, so that several can share a PruningNet; None is the job's."""
    generations: Annotated[int, Field(ge=1, le=1000)] | None = None
    population: Annotated[int, Field(ge=2, le=1000)] | None = None
    parents: Annotated[int, Field(ge=1, le=1000)] | None = None
    mutation_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    recalibration_images: Literal[0] | Annotated[int, Field(ge=16, le=1_000_000)] | None = None
    """0 judges candidates with the batch norm statistics that the PruningNet was trained with."""
    classifier_images: Literal[0] | Annotated[int, Field(ge=16, le=1_000_000)] | None = None
    """Training images on which every candidate's classifier is fitted anew; 0 judges with the PruningNet's, which knows
    wide last layers too little."""
    rank_by: Literal["accuracy", "loss"] | None = None
    repair: bool | None = None
    """Whether offspring that miss the budget are moved into it, and structures within milliseconds as wide as is free;
    not in the publication, which drops what misses."""
    screening: Annotated[int, Field(ge=1, le=100)] | None = None
    """Offspring bred for each candidate; those that a model of the judged ones expects most of are judged."""
    least_budget_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Candidates must use at least this share of the tightest upper bound (0: upper bounds only, as for fronts)."""


class RetrainingSpec(ScratchSpec):
    """Training from scratch; `top` structures of the search are trained, of a front evenly spread over its cost."""

    top: Annotated[int, Field(ge=1, le=10)] | None = None
    finalists: Annotated[int, Field(ge=1, le=50)] | None = None
    """So many of the search's best, spread over ten times as many, are trained for `trial_epochs` on the part of the
    training set that the PruningNet saw; the `top` of them on the other part are the winners. No more than `top`: none,
    as for fronts."""
    trial_epochs: Annotated[int, Field(ge=1, le=1000)] | None = None


class FidelitySpec(Model):
    """How well the PruningNet ranks: so many random structures of the budget are also trained from scratch; 0 is none.

    They are trained as `retraining` says, but for `epochs` where it is given.
    """

    structures: Literal[0] | Annotated[int, Field(ge=4, le=200)] = 0
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None


class JobRequest(Model):
    """A search, as a user submits it; `resolve` fills in what is None."""

    method: Method = "metapruning"
    compare_with: Annotated[list[Method], Field(max_length=3)] = []  # noqa: RUF012 - pydantic copies it
    """Further methods that work under the same budget, one after the other; the result has all winners side by side."""
    name: Annotated[Text, Field(max_length=200)] | None = None
    space: Name
    image_size: Annotated[int, Field(ge=8, le=512)] | None = None
    width: Annotated[float, Field(ge=0.05, le=4)] = 1.0
    last_layer: LastLayer | None = None
    """Whether the width before the classifier is a gene; fixed is as published."""
    dataset: Name
    constraints: Annotated[list[AnyConstraint], Field(min_length=1, max_length=8)]
    objective: Objective = "best"
    """`front` looks for the best structures at every cost within the one constraint."""
    measure_on: Annotated[list[Name], Field(max_length=8)] = []  # noqa: RUF012 - pydantic copies it
    """Devices that measure the winner although no constraint names them."""
    effort: Effort = "standard"
    training: TrainingSpec = TrainingSpec()
    search: SearchSpec = SearchSpec()
    retraining: RetrainingSpec = RetrainingSpec()
    fidelity: FidelitySpec = FidelitySpec()
    dense: ScratchSpec = ScratchSpec()
    """Training of the network that pruning methods begin with; as `retraining` where it says nothing."""
    start: Annotated[str, Field(max_length=64, pattern=ID)] | None = None
    """A job on this space and dataset whose winner pruning methods begin with, instead of training a dense network."""
    collaborative: CollaborativeSpec = CollaborativeSpec()
    magnitude: MagnitudeSpec = MagnitudeSpec()
    interspace: InterspaceSpec = InterspaceSpec()
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    baselines: bool = True
    """Whether the uniform network at the same budget is trained for comparison."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "JobRequest":
        seen = set()
        for bound in self.constraints:
            constraint = bound.constraint()
            if constraint.minimum > constraint.maximum:
                raise ValueError(f"the lower bound on {bound.metric} is above its upper bound")
            if (constraint.metric, constraint.latency) in seen:
                raise ValueError(f"{bound.metric} is constrained twice; give one constraint with both bounds")
            seen.add((constraint.metric, constraint.latency))
        return self

    @model_validator(mode="after")
    def _one_cost(self) -> "JobRequest":
        if self.objective == "front" and len(self.constraints) > 1:
            raise ValueError("a front is searched against one cost; give one constraint")
        if self.objective == "front" and self.search.least_budget_share:
            raise ValueError("a front has no least_budget_share; give its constraint a lower bound")
        if self.objective == "front" and (self.retraining.finalists or 1) > 1:
            raise ValueError("a front has no finalists: all its members are retrained")
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> "JobRequest":
        methods = self.methods
        if len(set(methods)) < len(methods):
            raise ValueError("every method can be named once")
        if "metapruning" not in methods and (self.objective == "front" or self.fidelity.structures):
            raise ValueError("fronts and fidelity belong to the method metapruning")
        if self.objective == "front" and self.method != "metapruning":
            raise ValueError("a front is metapruning's: make that the method, and compare with the others")
        unstructured = [method for method in methods if method in UNSTRUCTURED]
        bound = self.constraints[0]
        if unstructured and (len(self.constraints) > 1 or bound.metric == "latency" or bound.min):
            raise ValueError(
                f"{unstructured[0]} prunes single weights, which changes no latency: give one upper bound, on the "
                "parameters or flops that are kept"
            )
        if self.start and set(methods) == {"metapruning"}:
            raise ValueError("start: metapruning trains from scratch; name a pruning method, or leave it out")
        held = self.magnitude.scan or self.magnitude.tolerance is not None
        if self.start and "magnitude" in methods and held:
            raise ValueError(
                "start: the winner was trained on the images that magnitude's scan and tolerance judge by; leave it out"
            )
        return self

    @property
    def methods(self) -> list[Method]:
        """All methods of the job, in the order in which they work."""
        return [self.method, *self.compare_with]


SGD = {"momentum": 0.9, "weight_decay": 4e-5, "label_smoothing": 0.1, "augment": True}
CLIPPED = {**SGD, "clip_norm": 10.0}
STEADY = {**CLIPPED, "clip_norm": 2.0, "learning_rate": 0.1, "normalise": True, "curriculum": 0.2}
PLAIN = {"label_smoothing": 0.0, "augment": False}
"""In a few epochs a network near a tight budget fits not even the images as they are: +5 points on CIFAR-10."""
FAST = {"learning_rate": 0.3, "warm_up": 0.05}
"""Without the warm-up 2 of 24 networks near an eighth of MobileNetV1 stayed at chance."""
SEARCH = {"rank_by": "loss", "mutation_probability": 0.2, "repair": True, "screening": 4}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {
        "training": {"epochs": 1, "batch_size": 128, "band": (0.5, 2.0), "validation_images": 200, **STEADY},
        "search": {
            "generations": 2, "population": 8, "parents": 4, "recalibration_images": 128, "classifier_images": 0,
            "least_budget_share": 0.9, **SEARCH,
        },
        "retraining": {"epochs": 1, "batch_size": 128, "learning_rate": 0.1, "top": 1, "finalists": 1, **CLIPPED},
    },
    "quick": {
        "training": {"epochs": 24, "batch_size": 64, "band": (0.4, 2.5), "validation_images": 280, **STEADY},
        "search": {
            "generations": 6, "population": 24, "parents": 8, "recalibration_images": 512, "classifier_images": 0,
            "least_budget_share": 0.95, **SEARCH,
        },
        "retraining": {"epochs": 20, "batch_size": 64, "learning_rate": 0.1, "top": 1, "finalists": 1, **CLIPPED},
    },
    "standard": {
        "training": {"epochs": 12, "batch_size": 128, "band": (0.6, 1.4), "validation_images": 5000, **STEADY, **PLAIN},
        "search": {
            "generations": 6, "population": 40, "parents": 10, "recalibration_images": 1000, "classifier_images": 5000,
            "least_budget_share": 0.97, **SEARCH,
        },
        "retraining": {"epochs": 8, "batch_size": 64, "top": 1, "finalists": 8, **FAST, **CLIPPED, **PLAIN},
    },
    "paper": {
        "training": {"epochs": 64, "batch_size": 512, "learning_rate": 0.25, "validation_images": 50_000, **SGD},
        "search": {
            "generations": 20, "population": 50, "parents": 10, "recalibration_images": 20_000, "classifier_images": 0,
            "least_budget_share": 0.0, "rank_by": "accuracy", "mutation_probability": 0.1, "repair": False,
            "screening": 1,
        },
        "retraining": {"epochs": 256, "batch_size": 1024, "learning_rate": 0.5, "top": 1, "finalists": 1, **SGD},
    },
}  # fmt: skip
"""`paper` is MetaPruning's published schedule for MobileNetV1, and `PUBLISHED` what differs for the others.

Not as published are the augmentation (shifts and mirrors, not resized crops and changes of light) and the attempts: up
to 100 litters of mutants and of children instead of 10, unless 20 in a row bear nothing, and 65,536 random draws, what
these lack being drawn as in the other efforts. Batch norms are measured anew by cumulative averages over plain images,
not by moving ones over augmented ones. One finalist is to take the PruningNet's word.
"""
STEPS = {"schedule": "steps", "weight_decay": 1e-4}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "mobilenet_v2": {"training": {"weight_decay": 0.0}},
    "resnet50": {
        "training": {"epochs": 32, "batch_size": 256, "learning_rate": 0.1, **STEPS},
        "retraining": {"epochs": 128, "batch_size": 512, "learning_rate": 0.2, **STEPS},
    },
}
FRONT: dict[str, dict[str, Any]] = {
    "search": {"least_budget_share": 0.0}, "retraining": {"top": 3, "finalists": 1},
}  # fmt: skip
"""A front has members of all costs, some of which are trained from scratch."""
TRIAL_SHARE = 3 / 8
"""Epochs of a finalist's training beside those of a winner's, where the request names no number."""


def resolve(request: JobRequest, native_image_size: int) -> JobRequest:
    """The request with every default filled in from its effort preset.

    Args:
        native_image_size: the dataset's, used where the request names none.
    """
    filled: dict[str, Any] = {part: _filled(request, part) for part in ("training", "search", "retraining")}
    epochs = request.fidelity.epochs or filled["retraining"].epochs
    filled["fidelity"] = request.fidelity.model_copy(update={"epochs": epochs})
    if filled["search"].seed is None:
        filled["search"] = filled["search"].model_copy(update={"seed": request.seed})
    filled["dense"] = _descent(request.dense, filled["retraining"])
    tenth = {"learning_rate": filled["dense"].learning_rate / 10, "warm_up": 0.0}
    fine_tuning = _descent(request.collaborative.fine_tuning, filled["dense"].model_copy(update=tenth))
    filled["collaborative"] = request.collaborative.model_copy(update={"fine_tuning": fine_tuning})
    if request.interspace.lottery_rewinds is None:
        untrained = not (request.interspace.from_dense or request.start)
        filled["interspace"] = request.interspace.model_copy(update={"lottery_rewinds": untrained})
    filled["image_size"] = request.image_size or native_image_size
    filled["last_layer"] = request.last_layer or ("fixed" if request.effort == "paper" else "free")
    return request.model_copy(update=filled)


def _filled(request: JobRequest, part: str) -> Any:
    """A part of the request, with the preset's values where it gives none."""
    named = getattr(request, part)
    fields = dict(PRESETS[request.effort][part])
    if request.effort == "paper":
        fields |= PUBLISHED.get(request.space, {}).get(part, {})
    if request.objective == "front":
        fields |= FRONT.get(part, {})
    fields |= named.model_dump(exclude_none=True)
    if part == "retraining":
        fields = {"trial_epochs": max(1, int(TRIAL_SHARE * fields["epochs"]))} | fields
    return type(named).model_validate(fields)


def _descent(given: ScratchSpec, other: ScratchSpec) -> ScratchSpec:
    """What is given, and else what another training has."""
    fields = {name: getattr(other, name) for name in ScratchSpec.model_fields}
    return ScratchSpec.model_validate(fields | given.model_dump(exclude_none=True))
