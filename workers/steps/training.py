"""`training`: the PruningNet, trained in slices, or taken from an earlier job."""

import hashlib
import json
from typing import Any

from latency_profiler.errors import DamagedCheckpoint
from service.store import blobs, jobs, pruning_nets
from service.store.models import Job, JobState
from service.store.session import transaction
from workers import checkpoints
from workers.evaluation import Scorer
from workers.pruning_net import PruningNet
from workers.steps import trainers
from workers.steps.context import Context
from workers.steps.outcome import FOR_JOB, MOVED, Outcome
from workers.steps.recipe import CODE
from workers.training import PruningNetTrainer, TrainingSettings


def step(context: Context, job: Job) -> Outcome:
    """Reuse a trained net if there is one; else train for a slice, unless another job does."""
    family, band, lost = _family(context), _band(context, job), job.memory.get("lost")
    with transaction() as session:
        if lost is not None:
            before = pruning_nets.get(session, lost)
            band = before.band_low, before.band_high
        found = None if "net" in job.memory else pruning_nets.find(session, family, *_range(job), job.id, lost)
        if found is not None and not found.ready:
            return FOR_JOB
        if found is not None:
            memory = _with(job, found.key, reused=True, trained=True)
            alike = job.reproducible and found.progress.get("environments") == [context.environment]
            jobs.save_step(session, context.claim, state=JobState.SEARCHING, memory=memory, reproducible=alike)
            return MOVED
        key = lost or _digest([family, list(band)])
        net = pruning_nets.join(
            session, key, job.id, family=family, space_key=context.space.key, dataset_id=job.dataset_id,
            settings=context.spec.training.model_dump(), band_low=band[0], band_high=band[1],
        )  # fmt: skip
        if net is None:
            return FOR_JOB
        checkpoint, counters = net.checkpoint, net.progress.get("counters")
        past = net.progress.get("environments", [])
        environments = past if context.environment in past else [*past, context.environment]
        alike = job.reproducible and len(environments) == 1
        jobs.note(session, context.claim, memory={**job.memory, "net": key, "reused": False}, reproducible=alike)
    trainer = context.keep("trainer", [key, checkpoint], lambda: _trainer(context, band, checkpoint, counters))
    return _train(context, job, key, trainer, checkpoint, environments)


class DamagedNet(DamagedCheckpoint):
    """The file of a trained PruningNet is not what was saved, or another job trains it anew because of that."""


def anew(context: Context, job: Job, error: DamagedNet) -> Outcome:
    """Back to training, without the damaged file, of the same net again: it judges as it has judged so far."""
    with transaction() as session:
        net = pruning_nets.get(session, job.memory["net"])
        memory = {name: value for name, value in job.memory.items() if name != "net"} | {"lost": net.key}
        jobs.add_event(session, job.id, "warning", {"detail": f"the PruningNet is trained anew: {error}"})
        jobs.save_step(session, context.claim, state=JobState.TRAINING, memory=memory)
    if (sha256 := net.checkpoint) is not None and not checkpoints.intact(blobs.blob_path(sha256), sha256):
        blobs.blob_path(sha256).unlink(missing_ok=True)  # an intact one is of another job, which makes the net again
    return MOVED


def scorer(context: Context, job: Job) -> Scorer:
    """Judges candidates with the job's PruningNet."""
    return context.keep("scorer", job.memory["net"], lambda: _scorer(context, job))


def pruning_net(context: Context, job: Job) -> PruningNet:
    """The job's trained PruningNet."""
    return context.keep("network", job.memory["net"], lambda: _pruning_net(context, job.memory["net"]))


def _train(
    context: Context, job: Job, key: str, trainer: PruningNetTrainer, old: str | None, environments: list[Any]
) -> Outcome:
    """Go on for a slice; `environments` are those in which the net was trained so far, now included."""

    def progress() -> dict[str, Any]:
        return {"phase": "training", "done": trainer.done, "total": trainer.total, **trainer.latest()}

    trainers.advance(context, trainer, progress)
    ready = trainer.done >= trainer.total
    tensors = trainer.network.state_dict() if ready else trainer.state()
    sha256 = checkpoints.save(context.settings.blobs, tensors)
    saved = {"counters": trainer.counters(), "environments": environments}
    with transaction() as session:
        blobs.register(session, sha256)
        pruning_nets.save(session, key, checkpoint=sha256, progress=saved, ready=ready)
        changes = {"state": JobState.SEARCHING} if ready else {}
        memory = _with(job, key, reused=False, trained=ready)
        jobs.save_step(session, context.claim, memory=memory, progress=progress(), **changes)
        dropped = blobs.discard(session, old) if old != sha256 else None
    blobs.remove(dropped)
    context.forget("trainer") if ready else context.rename("trainer", [key, sha256])
    return MOVED


def _with(job: Job, net: str, *, reused: bool, trained: bool) -> dict[str, Any]:
    """The job's memory with its net; of a trained one nothing is lost any more."""
    memory = {name: value for name, value in job.memory.items() if not (trained and name == "lost")}
    return memory | {"net": net, "reused": reused}


def _trainer(
    context: Context, band: tuple[float, float], checkpoint: str | None, counters: dict[str, Any] | None
) -> PruningNetTrainer:
    arguments = {"band": list(band) if context.spec.training.band else None}
    return trainers.build(context, trainers.pruning_net, arguments, checkpoint, counters)


def _pruning_net(context: Context, key: str) -> PruningNet:
    with transaction() as session:
        net = pruning_nets.get(session, key)
    if not net.ready or net.checkpoint is None:
        raise DamagedNet(f"PruningNet {key} is being trained again")
    settings = TrainingSettings.of(context.spec.training.model_dump())
    network = PruningNet(context.space, settings.hidden, normalised=settings.normalise)
    try:
        network.load_state_dict(checkpoints.load(blobs.blob_path(net.checkpoint), net.checkpoint))
    except DamagedCheckpoint as error:
        raise DamagedNet(str(error)) from error
    return network


def _scorer(context: Context, job: Job) -> Scorer:
    search = context.spec.search
    assert search.recalibration_images is not None
    return Scorer(
        pruning_net(context, job), context.data, recalibration_images=search.recalibration_images,
        classifier_images=search.classifier_images or 0, seed=context.spec.seed, device=context.device,
    )  # fmt: skip


def _family(context: Context) -> str:
    """All that determines a PruningNet but the FLOPs of its band, and the machine that trains it."""
    training, seed = context.spec.training.model_dump(), context.spec.seed
    return _digest([CODE, context.space.key, context.seen, training, seed])


def _band(context: Context, job: Job) -> tuple[float, float]:
    """FLOPs between which structures are sampled: around those of the budget, or everything."""
    if context.spec.training.band is None:
        return 0.0, float(2**53)
    low, high = context.spec.training.band
    least, most = _range(job)
    return low * least, high * most


def _range(job: Job) -> tuple[float, float]:
    """FLOPs at the cheap and the dear end of what is searched (`profiling`)."""
    return job.memory.get("least_flops", job.memory["flops"]), job.memory["flops"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
