"""Whose turn it is in a job of several methods, and what follows when a method has its winners.

A method is done when the job's queue holds a winner of it, or those among whom short trainings will choose one;
corrections take them off the queue again.
"""

from collections.abc import Sequence
from typing import Any

from service.choices import Method
from service.methods import UNSTRUCTURED
from service.store import jobs
from service.store.models import Job, JobState, Role
from service.store.session import transaction
from workers.steps.context import Context
from workers.steps.outcome import MOVED, Outcome

CHOSEN = (Role.WINNER, Role.FINALIST)
"""Roles that a method gives when it is done."""
Trial = dict[str, Any]
"""A network of the job's queue: role, method, rank, structure_id, channels, encoding, proxy_accuracy."""


def current(context: Context, job: Job) -> Method:
    """The first method without a winner; when all have one, the last."""
    return next(iter(_left(context, job.memory.get("queue", []))), context.spec.methods[-1])


def trial(
    context: Context, role: Role, method: str, channels: Sequence[int], *, rank: int = 0,
    encoding: Sequence[int] | None = None, proxy: float | None = None,
) -> Trial:  # fmt: skip
    """An entry of the queue."""
    return {
        "role": role, "method": method, "rank": rank, "structure_id": context.space.digest(channels),
        "channels": list(channels), "encoding": list(encoding) if encoding else None, "proxy_accuracy": proxy,
    }  # fmt: skip


def hand_on(context: Context, job: Job, queue: Sequence[Trial]) -> dict[str, Any]:
    """Changes of a job's row now that its queue is this: the next method's turn, or everything is trained."""
    left = _left(context, queue)
    baselines = [] if left or not context.spec.baselines else _baselines(context, job, queue)
    memory = {**job.memory, "queue": [*queue, *baselines], "again": False, "since": None, "checkpoint": None}
    return {"state": JobState.TRAINING if left else JobState.RETRAINING, "memory": memory}


def again(context: Context, job: Job, method: str, memory: dict[str, Any]) -> Outcome:
    """Let a method look for another winner, with corrections in the memory."""
    with transaction() as session:
        jobs.add_event(session, job.id, "warning", {"corrections": memory["corrections"], "figures": memory["figures"]})
        memory = {**memory, "queue": others(job, method)}
        jobs.save_step(session, context.claim, memory=memory, state=JobState.SEARCHING)
    return MOVED


def others(job: Job, method: str) -> list[Trial]:
    """What stays in the queue when a method has to look for another winner."""
    return [
        one for one in job.memory.get("queue", [])
        if one["role"] == Role.DENSE or (one["role"] in CHOSEN and one["method"] != method)
    ]  # fmt: skip


def dense(context: Context) -> Trial:
    """The network that pruning methods begin with: the whole one."""
    return trial(context, Role.DENSE, context.spec.method, context.space.channels(context.space.largest))


def _left(context: Context, queue: Sequence[Trial]) -> list[Method]:
    done = {one["method"] for one in queue if one["role"] in CHOSEN}
    return [method for method in context.spec.methods if method not in done]


def _baselines(context: Context, job: Job, queue: Sequence[Trial]) -> list[Trial]:
    """What winners are compared with and no method has asked for: the uniform width, and the dense network."""
    roles, methods = {one["role"] for one in queue}, set(context.spec.methods)
    found = []
    if Role.UNIFORM not in roles and methods - UNSTRUCTURED:
        found.append(trial(context, Role.UNIFORM, context.spec.method, context.budget(job).uniform()))
    if Role.DENSE not in roles and methods & UNSTRUCTURED and context.spec.start is None:
        found.append(dense(context))
    return found
