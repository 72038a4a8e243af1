"""`training` and `searching` of the methods that prune a network instead of searching with a PruningNet.

`training` gives them the dense network that they begin with, if they begin with a trained one; `searching` is their
work, slice by slice. What they judge on the way are candidates, and what they end with is tested and stored as a
winner.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from latency_profiler.cost import Metric
from latency_profiler.errors import SecateursError
from latency_profiler.graphs import build_model
from service.choices import Method
from service.store import blobs, candidates, jobs, results
from service.store.models import Job, JobState, Role
from service.store.session import transaction
from workers import checkpoints
from workers.evaluation import test
from workers.networks import PlainNetwork, folded_weights
from workers.pruners.judgement import Judgement
from workers.pruners.masks import kept, sparse_flops
from workers.steps import measuring, methods, retraining, turns
from workers.steps.context import Context
from workers.steps.outcome import MOVED, Outcome


class MaskTooDear(SecateursError):
    """A pruning method keeps more than its budget; a defect of the method, which must not look like a success."""


class Pruner(Protocol):
    """What the methods have in common: shaped like a trainer."""

    judged: list[Judgement]
    held: int
    """Which of them is of the outcome."""
    done: int
    total: int

    def latest(self) -> dict[str, float]:
        """What it tells of its progress."""

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a fresh one needs."""

    def counters(self) -> dict[str, Any]:
        """The rest that it needs, as JSON."""


def begin(context: Context, job: Job) -> Outcome:
    """Train the dense network if the method wants a trained one and no former job has left one; then prune."""
    method = turns.current(context, job)
    if methods.needs_dense(context, method):
        trial = turns.dense(context)
        queue = job.memory.get("queue", [])
        if trial["structure_id"] not in [one["structure_id"] for one in queue if one["role"] == Role.DENSE]:
            with transaction() as session:
                jobs.save_step(session, context.claim, memory={**job.memory, "queue": [*queue, trial]})
            return MOVED
        with transaction() as session:
            found = results.find(session, job.id, trial["structure_id"], Role.DENSE, trial["method"])
        if found is None:
            retraining.train(context, job, trial, 0, 1)
            return MOVED
    with transaction() as session:
        jobs.save_step(session, context.claim, state=JobState.SEARCHING)
    return MOVED


def step(context: Context, job: Job) -> Outcome:
    """Prune for a slice; at the end test and store what is left."""
    method = turns.current(context, job)
    saved = job.memory.get("checkpoint") or {}
    key = [method, job.memory["round"]]
    pruner = context.keep("pruner", [*key, saved.get("sha256")], lambda: methods.build(context, job, method, saved))

    def progress() -> dict[str, Any]:
        return {"phase": "searching", "method": method, "done": pruner.done, "total": pruner.total, **pruner.latest()}

    methods.advance(context, pruner, progress)
    if pruner.done >= pruner.total:
        _finish(context, job, method, pruner)
        context.forget("pruner")
        return MOVED
    sha256 = checkpoints.save(context.settings.blobs, pruner.state())
    with transaction() as session:
        blobs.register(session, sha256)
        job.memory = {**job.memory, "told": _tell(context, job, session, method, pruner)}
        checkpoint = {"sha256": sha256, "counters": pruner.counters()}
        dropped = retraining.replace_checkpoint(context, job, session, checkpoint, progress=progress())
    blobs.remove(dropped)
    context.rename("pruner", [*key, sha256])
    return MOVED


def prune_on(context: Context, job: Job, networks: Sequence[measuring.Measured], allowed: dict[str, float]) -> Outcome:
    """Prune again, with the correction in the prediction."""
    memory = measuring.corrected(context, job, networks, allowed)
    return turns.again(context, job, "collaborative", memory | {"told": 0})


def _tell(context: Context, job: Job, session: Any, method: Method, pruner: Pruner) -> int:
    """Store what was judged since the last time; returns how much that is in all."""
    known = job.memory.get("told", 0)
    place = context.spec.methods.index(method)
    candidates.record_pruning(
        session, job, context.space, method, (place, job.memory["round"]), _as_json(pruner.judged), known
    )
    for one in _as_json(pruner.judged[known:]):
        jobs.add_event(session, job.id, "judged", {"method": method, **one})
    return len(pruner.judged)


def _finish(context: Context, job: Job, method: Method, pruner: Any) -> None:
    """Test once, and store result and artifacts; then it is the next method's turn."""
    found = methods.outcome(pruner)
    network: PlainNetwork = found.network
    facts = _kept(context, found)
    score = test(network, context.data, context.device)
    model = build_model(network.nodes, weights=folded_weights(network)).SerializeToString(deterministic=True)
    files = {
        "weights": checkpoints.save(context.settings.blobs, network.state_dict()),
        "model": checkpoints.write_blob(context.settings.blobs, model),
        "masks": checkpoints.save(context.settings.blobs, found.masks) if found.masks else None,
    }
    proxy = pruner.judged[pruner.held].accuracy
    winner = turns.trial(context, Role.WINNER, method, network.channels, proxy=proxy)
    with transaction() as session:
        for sha256 in filter(None, files.values()):
            blobs.register(session, sha256)
        _tell(context, job, session, method, pruner)
        if results.find(session, job.id, winner["structure_id"], Role.WINNER, method) is None:
            results.record(
                session, job, context.space, network.channels, Role.WINNER, method=method, rank=0,
                proxy_accuracy=proxy, settings=getattr(context.spec, method).model_dump(),
                predicted=context.predict(job, network.channels), test_accuracy=score.accuracy, test_loss=score.loss,
                pruned=facts | found.facts, **files,
            )  # fmt: skip
        old = (job.memory.get("checkpoint") or {}).get("sha256")
        changes = turns.hand_on(context, job, [*job.memory.get("queue", []), winner])
        changes["memory"] |= {"told": 0}
        jobs.save_step(session, context.claim, **changes)
        dropped = blobs.discard(session, old)
    blobs.remove(dropped)


def _kept(context: Context, found: methods.Pruned) -> dict[str, Any]:
    """What masks keep, held against the budget once more."""
    if not found.masks:
        return {}
    nodes = found.network.nodes
    facts = {"kept": kept(found.masks), "sparse_flops": sparse_flops(nodes, found.masks)}
    [bound] = context.constraints
    value = facts["sparse_flops" if bound.metric is Metric.FLOPS else "kept"]
    if value > bound.maximum:
        raise MaskTooDear(f"{value} {bound.metric.value} are kept, {bound.maximum:.0f} are allowed")
    return facts


def _as_json(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    return [asdict(one) for one in judged]
