"""From a request to a job: what the request names exists, and some structure can satisfy its budget.

Everything is checked before a row is written, so a refused request leaves nothing behind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from latency_profiler.cost import Constraint, Metric, flops, layer_flops, parameters
from latency_profiler.errors import (
    InfeasibleConstraint,
    InvalidInput,
    MissingLatencies,
    NoPruningNet,
    NotCalibrated,
    NotFound,
)
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import LatencyModel, LatencyTable
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import WEIGHTED, Space
from service.methods import UNSTRUCTURED
from service.specs import JobRequest, TrainingSpec, resolve
from service.store import datasets, devices, jobs, measurements, results, structures

FEWEST = 10
"""Training images of a dataset: a fifth of them is split off to judge on, and more than a few must be left."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request with every default filled in, and what it refers to."""

    spec: JobRequest
    space: Space
    dataset_id: str


def prepare(session: Session, request: JobRequest) -> Submission:
    """Check a request.

    Raises:
        InvalidInput: it names a space, dataset or device that does not exist, or waits for what cannot come.
        NoPruningNet: the space is none that MetaPruning can search.
        InfeasibleConstraint: no structure satisfies a constraint.
    """
    try:
        dataset = datasets.get(session, request.dataset)
        structures.device_ids(session, named_devices(request))
    except NotFound as error:
        raise InvalidInput(str(error)) from error
    if dataset.train_images < FEWEST:
        raise InvalidInput(f"{dataset.name!r} has {dataset.train_images} training images; at least {FEWEST} are needed")
    spec = resolve(request, dataset.image_size)
    assert spec.image_size is not None
    space = get_space(spec.space, spec.image_size, spec.width, dataset.classes, spec.last_layer == "free")
    check_layers(spec, space)
    channels = space.channels(space.largest)
    if spec.start is not None:
        channels = check_start(session, spec.start, space, dataset.id)
    if "metapruning" in spec.methods:
        check_steady(spec.training)
        if not space.normed:
            raise NoPruningNet(space.name)
    for bound in spec.constraints:
        constraint = bound.constraint()
        if not UNSTRUCTURED.issuperset(spec.methods):
            check_fillable(session, space, constraint)
            check_feasible(space, constraint, _table(session, space, constraint))
        if UNSTRUCTURED.intersection(spec.methods):
            keeps = "interspace" in spec.methods and spec.interspace.keeps_classifier
            check_masks(space.layers(channels), constraint, keeps_classifier=keeps)
    return Submission(spec, space, dataset.id)


def check_fillable(session: Session, space: Space, constraint: Constraint) -> None:
    """Refuse to wait for layers that nobody will measure.

    Raises:
        InvalidInput: the device's table was imported and lacks some.
    """
    if constraint.device is None:
        return
    device = devices.get(session, constraint.device)
    if device.table_id is None or measurements.measured_table(session, device) is not None:
        return
    if missing := measurements.layers_missing(session, device.name, space):
        raise InvalidInput(
            f"the table of {device.name!r} was imported and lacks {len(missing)} layers of {space.key} ({missing[0]}), "
            "which nobody can add to it; start the device's agent first, or import a table that has them"
        )


def check_steady(training: TrainingSpec) -> None:
    """Refuse weight decay of a PruningNet with which SGD with this momentum oscillates, or nearly does.

    Raises:
        InvalidInput: it is more than half of what is critical: rate * decay = (1 - sqrt(momentum))^2.
    """
    assert training.learning_rate is not None
    assert training.momentum is not None
    most = (1 - math.sqrt(training.momentum)) ** 2 / 2 / training.learning_rate
    if (training.weight_decay or 0.0) > most:
        raise InvalidInput(
            f"training.weight_decay {training.weight_decay:g} makes weights oscillate at learning rate "
            f"{training.learning_rate:g} and momentum {training.momentum:g}; at most {most:.2g} is possible"
        )


def check_layers(spec: JobRequest, space: Space) -> None:
    """See that settings of pruning methods speak of this space's layers.

    Raises:
        InvalidInput: they do not.
    """
    ratios = spec.collaborative.ratios
    if ratios is not None and len(ratios) != len(space.genes):
        raise InvalidInput(f"collaborative.ratios has {len(ratios)} numbers; {space.key} has {len(space.genes)} genes")
    known = [unit.name for unit in space.units if unit.op in WEIGHTED]
    if unknown := sorted(set(spec.magnitude.qualities) - set(known)):
        raise InvalidInput(f"magnitude.qualities: {space.name} has no layer {unknown[0]!r}; it has {', '.join(known)}")


def check_start(session: Session, job_id: str, space: Space, dataset_id: str) -> tuple[int, ...]:
    """Channels of the trained winner of a job, which pruning can begin with.

    Raises:
        InvalidInput: there is no such job, or its winner is none.
    """
    try:
        job = jobs.get(session, job_id)
    except NotFound as error:
        raise InvalidInput(str(error)) from error
    if (job.space_key, job.dataset_id) != (space.key, dataset_id):
        raise InvalidInput(f"start: job {job_id} is on another space or dataset: {job.space_key}")
    winner = results.winner(session, job_id)
    if winner is None:
        raise InvalidInput(f"start: job {job_id} has no trained winner without masks; it is {job.state.value}")
    return tuple(structures.get(session, winner.structure_id).channels)


def check_masks(layers: Sequence[Layer], constraint: Constraint, *, keeps_classifier: bool) -> None:
    """Compare a bound on what masks keep with one weight in every layer.

    Args:
        keeps_classifier: the classifier is pruned after all other layers, so its weights all have to fit.

    Raises:
        InfeasibleConstraint: not even one weight in every layer fits.
        InvalidInput: they do, but not beside a whole classifier.
    """
    layers = [layer for layer in layers if layer_flops(layer)]
    prices = [layer.out_size**2 if constraint.metric is Metric.FLOPS else 1 for layer in layers]
    weights = [layer_flops(layer) // layer.out_size**2 for layer in layers]
    if constraint.maximum < sum(prices):
        dense = sum(count * price for count, price in zip(weights, prices, strict=True))
        raise InfeasibleConstraint(constraint.metric.value, constraint.maximum, sum(prices), dense)
    least = sum(prices[:-1]) + weights[-1] * prices[-1]
    if keeps_classifier and constraint.maximum < least:
        raise InvalidInput(
            f"interspace.lottery_keeps_classifier: the classifier and one weight in every other layer count {least} "
            f"{constraint.metric.value}, {constraint.maximum:.0f} are allowed; let it be pruned, or raise the bound"
        )


def named_devices(request: JobRequest) -> list[str]:
    """The devices of a request, each once."""
    constrained = (bound.constraint().device for bound in request.constraints)
    return list(dict.fromkeys([*(name for name in constrained if name), *request.measure_on]))


def _table(session: Session, space: Space, constraint: Constraint) -> LatencyTable | None:
    """What prices the space for a bound on a latency; None where nothing does yet."""
    if constraint.device is None:
        return None
    try:
        return measurements.pricing_table(session, constraint.device, space, constraint.statistic)
    except NotCalibrated:
        return None


def check_feasible(space: Space, constraint: Constraint, table: LatencyTable | None = None) -> None:
    """Compare a constraint with the cheapest and the dearest of structures from the smallest to the largest.

    The fastest structure is none of these where widths are fast that are not the smallest (`LatencyModel.fastest`).

    A latency cannot be judged before the device's table prices them; the job then waits for its profile.

    Raises:
        InfeasibleConstraint: the constraint's range and the space's do not meet; latencies in milliseconds.
    """
    if constraint.metric is Metric.LATENCY and table is None:
        return
    try:
        values = [_value(space, encoding, constraint, table) for encoding in space.ladder]
        if table is not None and constraint.maximum < min(values):
            values.append(_value(space, LatencyModel(table, space).fastest, constraint, table))
    except MissingLatencies:
        return
    constraint.check(min(values), max(values))


def _value(space: Space, encoding: tuple[int, ...], constraint: Constraint, table: LatencyTable | None) -> float:
    channels = space.channels(encoding)
    match constraint.metric:
        case Metric.FLOPS:
            return flops(space.layers(channels))
        case Metric.PARAMETERS:
            return parameters(space.layers(channels))
        case Metric.LATENCY:
            assert table is not None
            return table.price(space, channels).seconds
