"""From a request to a job: what the request names exists, and some structure can satisfy its budget.

Everything is checked before a row is written, so a refused request leaves nothing behind.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from latency_profiler.cost import Constraint, Metric, flops, parameters
from latency_profiler.errors import InfeasibleConstraint, InvalidInput, MissingLatencies, NotCalibrated, NotFound
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.specs import JobRequest, resolve
from service.store import datasets, measurements, structures


@dataclass(frozen=True, slots=True)
class Submission:
    """A request with every default filled in, and what it refers to."""

    spec: JobRequest
    space: Space
    dataset_id: str


def prepare(session: Session, request: JobRequest) -> Submission:
    """Check a request.

    Raises:
        InvalidInput: it names a space, dataset or device that does not exist.
        InfeasibleConstraint: no structure satisfies a constraint.
    """
    try:
        dataset = datasets.get(session, request.dataset)
        structures.device_ids(session, named_devices(request))
    except NotFound as error:
        raise InvalidInput(str(error)) from error
    spec = resolve(request, dataset.image_size)
    assert spec.image_size is not None
    space = get_space(spec.space, spec.image_size, spec.width, dataset.classes, spec.last_layer == "free")
    for bound in spec.constraints:
        check_feasible(space, bound.constraint(), _table(session, space, bound.constraint()))
    return Submission(spec, space, dataset.id)


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
    """Compare a constraint with the smallest and the largest structure.

    A latency cannot be judged before the device's table prices both; the job then waits for its profile.

    Raises:
        InfeasibleConstraint: the constraint's range and the space's do not meet; latencies in milliseconds.
    """
    if constraint.metric is Metric.LATENCY and table is None:
        return
    try:
        smallest, largest = (_value(space, encoding, constraint, table) for encoding in (space.smallest, space.largest))
    except MissingLatencies:
        return
    if constraint.maximum >= smallest and constraint.minimum <= largest:
        return
    asked = constraint.maximum if constraint.maximum < smallest else constraint.minimum
    if constraint.metric is Metric.LATENCY:
        asked, smallest, largest = asked * 1000, smallest * 1000, largest * 1000
    name = "latency_ms" if constraint.metric is Metric.LATENCY else constraint.metric.value
    raise InfeasibleConstraint(name, asked, smallest, largest, constraint.latency)


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
