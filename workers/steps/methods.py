"""The pruning methods as a job asks for them: what they begin with, how they are built, what they end with."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from service.choices import Method
from service.store import blobs, results, structures
from service.store.models import Job, Role
from service.store.session import transaction
from workers import checkpoints
from workers.networks import PlainNetwork
from workers.pruners import goals, sparse_storage
from workers.pruners.allowance import Allowance
from workers.pruners.basis_costs import basis_parameters, layer_costs
from workers.pruners.collaborative import CollaborativePruner, allowed_widths
from workers.pruners.collaborative_settings import CollaborativeSettings
from workers.pruners.filter_bases import Bases
from workers.pruners.interspace import InterspaceTrainer
from workers.pruners.interspace_settings import InterspaceSettings
from workers.pruners.magnitude import MagnitudePruner
from workers.pruners.schedule import MagnitudeSettings, Scan
from workers.steps import trainers, turns
from workers.steps.context import Context
from workers.training import Trainer, TrainingSettings

Network = tuple[tuple[int, ...], dict[str, Tensor] | None]
"""Channels of the network that is pruned, and its trained state if it is trained."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a method ends with; `facts` are what else is to be said of it, as JSON."""

    network: PlainNetwork
    masks: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def needs_dense(context: Context, method: Method) -> bool:
    """Whether the dense network is to be trained first, on the whole training set."""
    return context.spec.start is None and _from_trained(context, method)


def check(context: Context, memory: Mapping[str, Any]) -> None:
    """See that all methods can prune to the budget of a job with this memory, before anything is trained for them.

    Raises:
        InvalidInput: one of them cannot.
    """
    spec, space = context.spec, context.space
    if "collaborative" not in spec.methods:
        return
    channels = space.channels(space.largest)
    if spec.start is not None:
        with transaction() as session:
            found = results.winner(session, spec.start)
            assert found is not None
            channels = tuple(structures.get(session, found.structure_id).channels)
    allowed_widths(context.budget_of(memory), channels, _collaborative_settings(context))


def build(context: Context, job: Job, method: Method, kept: Mapping[str, Any]) -> Any:
    """The method's pruner, that goes on from a checkpoint if there is one."""
    if method == "collaborative":
        collaborative = partial(_collaborative, context, job)
        return context.restored(collaborative, kept["sha256"], kept["counters"]) if kept else collaborative()
    make: Callable[..., Trainer] = magnitude if method == "magnitude" else interspace
    return trainers.build(context, make, {"job_id": job.id}, kept.get("sha256"), kept.get("counters"))


def advance(context: Context, pruner: Any, progress: Callable[[], dict[str, Any]]) -> None:
    """Prune for a slice; all processes that take part end it after the same iteration."""
    if isinstance(pruner, CollaborativePruner):
        pruner.advance(context.pause(trainers.SLICE, progress))
    else:
        trainers.advance(context, pruner, progress)


def outcome(pruner: Any) -> Pruned:
    """What a method that is done ends with."""
    match pruner:
        case CollaborativePruner():
            network, _ = pruner.outcome()
            return Pruned(network)
        case MagnitudePruner():
            found = pruner.outcome()
            size = len(sparse_storage.write(found.network))
            return Pruned(
                found.network, found.masks, {"sparse_bytes": size, "points": [asdict(p) for p in pruner.points]}
            )
        case InterspaceTrainer():
            left = pruner.outcome()
            costs = [asdict(one) for one in layer_costs(pruner.network, left.masks)]
            facts = {"basis_parameters": basis_parameters(pruner.network), "layers": costs}
            return Pruned(left.network, left.masks, facts)
    raise TypeError(type(pruner))


def magnitude(context: Context, job_id: str) -> MagnitudePruner:
    """Of the job's settings."""
    spec, (channels, start) = context.spec.magnitude, _network(context, job_id, "magnitude")
    [bound] = context.constraints
    budget = goals.Budget(bound.metric.value, int(bound.maximum))  # type: ignore[arg-type]
    grown = spec.tolerance is not None
    settings = MagnitudeSettings(
        training=TrainingSettings.of(context.spec.dense.model_dump()),
        goal=goals.Growth(spec.tolerance, spec.growth, budget) if spec.tolerance is not None else budget,
        rounds=spec.rounds, retraining_epochs=spec.retraining_epochs, retraining_rate=spec.retraining_rate,
        qualities=Scan() if spec.scan else spec.qualities, std_over=spec.std_over, penalty=spec.penalty,
        retraining_penalty=spec.retraining_penalty, retraining_decay=spec.retraining_decay, dropout=spec.dropout,
        alternate=spec.alternate, optimiser=spec.optimiser,
    )  # fmt: skip
    return MagnitudePruner(
        context.space, channels, context.data, settings, context.spec.seed, context.device, context.team, start=start,
        whole=not (grown or spec.scan),
    )  # fmt: skip


def interspace(context: Context, job_id: str) -> InterspaceTrainer:
    """Of the job's settings."""
    spec, (channels, start) = context.spec.interspace, _network(context, job_id, "interspace")
    fields = spec.model_dump()
    bases = {name: fields[name] for name in Bases.__slots__}
    options = InterspaceSettings.of({**fields, "method": spec.pruning, "bases": bases})
    [bound] = context.constraints
    allowance = Allowance.within(context.space.nodes(channels), bound)
    training = TrainingSettings.of(context.spec.dense.model_dump())
    return InterspaceTrainer(
        context.space, channels, context.data, training, options, allowance, context.spec.seed, context.device,
        context.team, start=start, whole=True,
    )  # fmt: skip


def _collaborative(context: Context, job: Job) -> CollaborativePruner:
    channels, state = _network(context, job.id, "collaborative")
    assert state is not None
    network = PlainNetwork(context.space, channels)
    network.load_state_dict(state)
    return CollaborativePruner(
        network, context.data, context.budget(job), _collaborative_settings(context), context.spec.seed, context.device
    )  # fmt: skip


def _collaborative_settings(context: Context) -> CollaborativeSettings:
    fields = context.spec.collaborative.model_dump()
    ratios = fields.pop("ratios")
    return CollaborativeSettings(
        fine_tuning=TrainingSettings.of(fields.pop("fine_tuning")), ratios=None if ratios is None else tuple(ratios),
        **fields,
    )  # fmt: skip


def _from_trained(context: Context, method: Method) -> bool:
    """Whether a method prunes a trained network; one that must hold its accuracy on unseen images trains its own."""
    spec = context.spec
    match method:
        case "collaborative":
            return True
        case "magnitude":
            own = spec.magnitude.scan or spec.magnitude.tolerance is not None or spec.magnitude.dropout
            return not own and spec.magnitude.penalty == "l2"
        case "interspace":
            return spec.interspace.from_dense
        case _:
            return False


def _network(context: Context, job_id: str, method: Method) -> Network:
    """What a method prunes: a former job's winner, this job's dense network, or the space's largest untrained."""
    space, spec = context.space, context.spec
    if not _from_trained(context, method) and spec.start is None:
        return space.channels(space.largest), None
    with transaction() as session:
        if spec.start is not None:
            found = results.winner(session, spec.start)
        else:
            trial = turns.dense(context)
            found = results.find(session, job_id, trial["structure_id"], Role.DENSE, trial["method"])
        assert found is not None
        assert found.weights is not None
        channels = tuple(structures.get(session, found.structure_id).channels)
        path = blobs.blob_path(found.weights)
    return channels, checkpoints.load(path, found.weights)


MAKERS = (*trainers.MAKERS, magnitude, interspace)
"""Of all trainers that several processes build together."""
