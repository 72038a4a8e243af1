"""`queued` and `profiling`: wait for the lookup tables that the constraints need, and pin them.

A job never sees its tables change: what it searches with is stored as a file whose digest it remembers.
"""

import json
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from latency_profiler.calibration import Verdict
from latency_profiler.cost import Statistic, flops, split_latency
from latency_profiler.errors import InfeasibleConstraint, MeasurementFailed, MissingLatencies, NotCalibrated
from latency_profiler.layers import Layer
from service.methods import UNSTRUCTURED
from service.store import blobs, devices, jobs, measurements, work
from service.store.candidates import space_arguments
from service.store.models import Job, JobState
from service.store.session import transaction
from workers.budget import Budget
from workers.checkpoints import write_blob
from workers.sampling import numpy_generator
from workers.steps.context import Context
from workers.steps.outcome import FOR_DEVICE, MOVED, Outcome

DRAWN = 64
"""Structures that say how many multiply-adds a budget in milliseconds allows."""


def begin(context: Context, job: Job) -> Outcome:
    """Note what the job runs on, and ask for the layers that its devices lack."""
    with transaction() as session:
        for name in dict.fromkeys(split_latency(latency)[0] for latency in context.constrained):
            if measurements.layers_missing(session, name, context.space):
                device = devices.get(session, name)
                measurements.request_for_job(session, device, space_arguments(context.space))
        jobs.save_step(session, context.claim, state=JobState.PROFILING, environment=context.environment)
    return MOVED


def step(context: Context, job: Job) -> Outcome:
    """Pin the tables once they can price every structure; until then wait."""
    with transaction() as session:
        waiting = [name for name in context.constrained if not _ready(session, context, *split_latency(name))]
        tables = {name: measurements.load_table(session, *split_latency(name)) for name in context.latencies}
        verdicts = {name: _verdict(session, context, *split_latency(name)) for name in context.latencies}
        waited = jobs.phase_seconds(session, job.id).get(JobState.PROFILING, 0.0)
    if waiting:
        if waited > context.settings.profile_seconds:
            raise MissingLatencies(tables[waiting[0]].missing(_ends(context)))
        context.console.say({"phase": "profiling", "waits_for": waiting})
        return FOR_DEVICE

    pinned = {name: write_blob(context.settings.blobs, json.dumps(table.to_json(), sort_keys=True).encode())
              for name, table in tables.items() if not table.missing(_ends(context))}  # fmt: skip
    margins = {name: verdicts[name].margin for name in pinned}
    noise = {name: verdicts[name].noise for name in pinned}
    memory = {**job.memory, "tables": pinned, "margins": margins, "noise": noise, "corrections": {}, "round": 0}
    warnings = [_doubt(name, verdicts[name]) for name in context.constrained if verdicts[name].reason]
    if not UNSTRUCTURED.issuperset(context.spec.methods):
        warnings += _sized(context, job, memory)
    with transaction() as session:
        for sha256 in pinned.values():
            blobs.register(session, sha256)
        for warning in warnings:
            jobs.add_event(session, job.id, "warning", {"detail": warning})
        jobs.save_step(
            session, context.claim, state=JobState.TRAINING, memory=memory, warnings=[*job.warnings, *warnings]
        )
    return MOVED


def _sized(context: Context, job: Job, memory: dict[str, Any]) -> list[str]:
    """Note the FLOPs of networks at the ends of what is searched; returns warnings.

    They are those of the uniform networks there. Where structures are filled, they are of those that a search begins
    with, which have widths that the device is fast with: their median, or what nine of ten stay below in a range.
    """
    budget, warnings = _budget(context, job, memory)
    memory["flops"] = flops(context.space.layers(budget.uniform()))
    if context.constrained and context.spec.search.repair:
        drawn = budget.costs(budget.sample(DRAWN, numpy_generator(context.spec.seed, "flops"))).flops
        share = 0.9 if context.spec.objective == "front" else 0.5
        memory["flops"] = int(np.quantile(drawn, share)) if len(drawn) else memory["flops"]
    if context.spec.objective == "front":
        [bound] = budget.constraints
        memory["least_flops"] = flops(context.space.layers(budget.uniform(bound.minimum / bound.maximum)))
    return warnings


def _budget(context: Context, job: Job, memory: dict[str, Any]) -> tuple[Budget, list[str]]:
    """The job's budget; without margins, and with a warning, where they alone would make it infeasible."""
    job.memory = memory
    try:
        return context.budget(job), []
    except InfeasibleConstraint:
        memory["margins"] = dict.fromkeys(memory["margins"], 0.0)
        budget = context.budget(job)
        return budget, [
            "the budget is so near to the smallest structure that the table's error leaves no safety margin"
        ]


def _ready(session: Session, context: Context, name: str, statistic: Statistic) -> bool:
    """Whether a device's table prices the space, and its sum is calibrated: the median may be the sum itself.

    Raises:
        MeasurementFailed: it never will, for a layer that the device cannot measure.
        NotCalibrated: it never will, for networks that are not measured.
    """
    if missing := measurements.layers_missing(session, name, context.space):
        reasons = measurements.failures(session, devices.get(session, name))
        if failed := [key for key in missing if key in reasons]:
            raise MeasurementFailed(f"{name} could not measure {failed[0]}: {reasons[failed[0]]}")
        return False
    table_id = devices.get(session, name).table_id
    if table_id is None or context.space.key in measurements.fits(session, table_id, statistic):
        return True
    if work.open_keys(session, table_id):
        return False
    if statistic is not Statistic.P50:
        raise NotCalibrated(name, context.space.key, statistic)
    return True


def _verdict(session: Session, context: Context, name: str, statistic: Statistic) -> Verdict:
    return measurements.verdict(session, devices.get(session, name), context.space.key, statistic)


def _ends(context: Context) -> list[Layer]:
    space = context.space
    return [layer for end in (space.smallest, space.largest) for layer in space.layers(space.channels(end))]


def _doubt(name: str, verdict: Verdict) -> str:
    """What a user should know of a table before the latencies of a job are believed."""
    return (
        f"{name}'s lookup table is {verdict.trust}: {verdict.reason}; "
        f"the search keeps {verdict.margin:.1%} of the budget free"
    )
