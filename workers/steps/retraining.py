"""`retraining`: winners and the uniform network from scratch on the whole training set, then tested once.

Where there are finalists, they come first: each is trained for a few epochs on the sub-training set, and those that are
best on the sub-validation set are the winners: a PruningNet hardly tells the best of a search apart.

A training that was done before, by any job, on the same machine with the same code, is not done again.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from latency_profiler.graphs import build_model
from service.store import blobs, jobs, results
from service.store.models import Job, JobState, Role
from service.store.session import snapshot, transaction
from workers import checkpoints
from workers.evaluation import BATCH, evaluate, recalibrate, test
from workers.networks import folded_weights
from workers.steps import fidelity, trainers
from workers.steps.context import Context
from workers.steps.outcome import MOVED, Outcome
from workers.steps.recipe import recipe
from workers.steps.turns import Trial
from workers.training import ScratchTrainer, TrainingSettings


def step(context: Context, job: Job) -> Outcome:
    """Train the first structure of the queue without a result for a slice; when all have one, go on."""
    if finalists := [trial for trial in job.memory["queue"] if trial["role"] == Role.FINALIST]:
        return _try(context, job, finalists)
    to_judge = any(trial["role"] == Role.FIDELITY for trial in job.memory["queue"])
    with transaction() as session:
        waiting = [
            trial for trial in job.memory["queue"]
            if results.find(session, job.id, trial["structure_id"], Role(trial["role"]), trial["method"]) is None
        ]  # fmt: skip
        if not waiting and not to_judge:
            state = JobState.VERIFYING
            jobs.save_step(session, context.claim, state=state, memory={**job.memory, "since": None})
            return MOVED
    if not waiting:
        return fidelity.step(context, job)
    tried, queue = len(job.memory.get("finalists", {})), len(job.memory["queue"])
    train(context, job, waiting[0], tried + queue - len(waiting), tried + queue)
    return MOVED


def _try(context: Context, job: Job, finalists: list[Trial]) -> Outcome:
    """Train the first finalist without a score for a slice; when all have one, the best are the winners."""
    scores, top = job.memory.get("finalists", {}), context.spec.retraining.top or 1
    waiting = [trial for trial in finalists if trial["structure_id"] not in scores]
    if waiting:
        others = len(job.memory["queue"]) - len(finalists)
        train(context, job, waiting[0], len(finalists) - len(waiting), len(finalists) + top + others)
        return MOVED
    tried = {trial["structure_id"]: scores[trial["structure_id"]] for trial in finalists}  # not those of former rounds
    best = sorted(finalists, key=lambda trial: tried[trial["structure_id"]]["loss"])
    winners = [{**trial, "role": Role.WINNER, "rank": rank} for rank, trial in enumerate(best[:top])]
    queue = [*winners, *(trial for trial in job.memory["queue"] if trial["role"] != Role.FINALIST)]
    with transaction() as session:
        jobs.save_step(session, context.claim, memory={**job.memory, "queue": queue, "finalists": tried})
    return MOVED


def train(context: Context, job: Job, trial: Trial, done: int, total: int) -> None:
    """Train a network for a slice, test and store it at the end, or take an earlier training's outcome over.

    Args:
        done: networks that are trained, of so many in all; for the progress.
    """
    if _take_over(context, job, trial):
        return
    held = job.memory.get("checkpoint") or {}
    sha256 = held.get("sha256")
    trainer = context.keep(
        "scratch", [trial["structure_id"], trial["role"], sha256], lambda: _trainer(context, trial, held)
    )

    def progress() -> dict[str, Any]:
        share = done + trainer.done / trainer.total
        shown = {"phase": job.state.value, "structure": trial["role"], "done": share, "total": total}
        return {**shown, **trainer.latest()}

    trainers.advance(context, trainer, progress)
    if trainer.done < trainer.total:
        _save(context, job, trial, trainer, progress())
    elif trial["role"] == Role.FINALIST:
        _judge(context, job, trial, trainer)
    else:
        _finish(context, job, trial, trainer)


def _settings(context: Context, trial: Trial) -> dict[str, Any]:
    """The request's fields for a trial: finalists, and those that are trained to judge the proxy, have own epochs."""
    if trial["role"] == Role.DENSE:
        return context.spec.dense.model_dump()
    settings = context.spec.retraining
    own = {Role.FIDELITY: context.spec.fidelity.epochs, Role.FINALIST: settings.trial_epochs}
    return settings.model_dump() | {"epochs": own.get(trial["role"], settings.epochs)}


def _recipe(context: Context, trial: Trial) -> str:
    return recipe(context, trial["channels"], TrainingSettings.of(_settings(context, trial)))


def _take_over(context: Context, job: Job, trial: Trial) -> bool:
    """Store what an earlier training by the same recipe gave; False where there is none with its files."""
    if trial["role"] == Role.FINALIST:
        return False
    with snapshot() as session:
        found = results.same_training(session, _recipe(context, trial))
    if found is None or not all(_intact(sha256) for sha256 in (found.weights, found.model)):
        return False
    with transaction() as session:
        _record(
            session, context, job, trial, test_accuracy=found.test_accuracy, test_loss=found.test_loss,
            weights=found.weights, model=found.model, reused=True,
        )  # fmt: skip
        dropped = replace_checkpoint(context, job, session, None)
    blobs.remove(dropped)
    context.forget("scratch")
    return True


def _intact(sha256: str | None) -> bool:
    return sha256 is not None and checkpoints.intact(blobs.blob_path(sha256), sha256)


def _record(session: Session, context: Context, job: Job, trial: Trial, **outcome: Any) -> None:
    """The row of a trial; others may take it over only if one machine has made it."""
    channels = tuple(trial["channels"])
    results.record(
        session, job, context.space, channels, Role(trial["role"]), method=trial["method"], rank=trial["rank"],
        proxy_accuracy=trial["proxy_accuracy"], settings=_settings(context, trial),
        predicted=context.predict(job, channels), recipe=_recipe(context, trial) if job.reproducible else None,
        **outcome,
    )  # fmt: skip


def _trainer(context: Context, trial: Trial, held: dict[str, Any]) -> ScratchTrainer:
    whole = trial["role"] != Role.FINALIST
    arguments = {"channels": trial["channels"], "settings": _settings(context, trial), "whole": whole}
    return trainers.build(context, trainers.scratch, arguments, held.get("sha256"), held.get("counters"))


def _save(context: Context, job: Job, trial: Trial, trainer: ScratchTrainer, progress: dict[str, Any]) -> None:
    sha256 = checkpoints.save(context.settings.blobs, trainer.state())
    held = {"sha256": sha256, "counters": trainer.counters()}
    with transaction() as session:
        blobs.register(session, sha256)
        dropped = replace_checkpoint(context, job, session, held, progress=progress)
    blobs.remove(dropped)
    context.rename("scratch", [trial["structure_id"], trial["role"], sha256])


def _judge(context: Context, job: Job, trial: Trial, trainer: ScratchTrainer) -> None:
    """Keep what a finalist does on images that it has not seen, with batch norms of its last weights."""
    count = context.spec.search.recalibration_images or fidelity.RECALIBRATION
    recalibrate(trainer.network, context.data.sub_training.sample(count, context.spec.seed), BATCH, context.device)
    score = evaluate(trainer.network, context.data.sub_validation, context.device)
    found = {"proxy_accuracy": trial["proxy_accuracy"], "accuracy": score.accuracy, "loss": score.loss}
    scores = {**job.memory.get("finalists", {}), trial["structure_id"]: found}
    with transaction() as session:
        jobs.add_event(session, job.id, "finalist", {"structure_id": trial["structure_id"], **found})
        dropped = replace_checkpoint(context, job, session, None, {"finalists": scores})
    blobs.remove(dropped)
    context.forget("scratch")


def _finish(context: Context, job: Job, trial: Trial, trainer: ScratchTrainer) -> None:
    """Test once, and store result and artifacts."""
    network, channels = trainer.network, tuple(trial["channels"])
    score = test(network, context.data, context.device)
    weights = checkpoints.save(context.settings.blobs, network.state_dict())
    model = build_model(context.space.nodes(channels), weights=folded_weights(network))
    onnx = checkpoints.write_blob(context.settings.blobs, model.SerializeToString(deterministic=True))
    with transaction() as session:
        for sha256 in (weights, onnx):
            blobs.register(session, sha256)
        _record(
            session, context, job, trial, test_accuracy=score.accuracy, test_loss=score.loss, weights=weights,
            model=onnx,
        )  # fmt: skip
        dropped = replace_checkpoint(context, job, session, None)
    blobs.remove(dropped)
    context.forget("scratch")


def replace_checkpoint(
    context: Context, job: Job, session: Any, checkpoint: dict[str, Any] | None, memory: Mapping[str, Any] = {},
    **changes: Any,
) -> str | None:  # fmt: skip
    """The checkpoint that counts from now on; returns the one whose file may go."""
    old = (job.memory.get("checkpoint") or {}).get("sha256")
    jobs.save_step(session, context.claim, memory={**job.memory, **memory, "checkpoint": checkpoint}, **changes)
    same = checkpoint is not None and checkpoint["sha256"] == old
    return None if same else blobs.discard(session, old)
