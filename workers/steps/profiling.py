"""`queued` and `profiling`: wait for the lookup tables that the constraints need, pin them, and sound the budget.

A job never sees its tables change: what it searches with is stored as a file whose digest it remembers.

A table is calibrated on networks from all over a space. A search picks those of which the device is fast with every
layer, and these are off by one share together: seen were prices 9 to 21 % above what was measured, and 2.5 % around
that. So the devices measure some networks that a search under this budget begins with (`SOUNDED`). Their median is the
correction that the search starts with, and how far they lie from it is the safety margin of methods that prune (the
best of a search are measured, see `searching`).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from latency_profiler.calibration import MOST_MARGIN, Verdict
from latency_profiler.cost import Metric, Statistic, flops, split_latency
from latency_profiler.errors import (
    InfeasibleConstraint,
    MeasurementFailed,
    MissingLatencies,
    NotCalibrated,
    NothingFeasible,
)
from latency_profiler.layers import Layer
from latency_profiler.planning import plan_layers
from service.methods import UNSTRUCTURED
from service.store import blobs, devices, jobs, measurements, work
from service.store.candidates import space_arguments
from service.store.models import Job, JobState, clock
from service.store.results import METAPRUNING
from service.store.session import transaction
from workers.budget import Budget
from workers.checkpoints import write_blob
from workers.sampling import numpy_generator
from workers.steps import measuring, methods
from workers.steps.context import Context, search_margins
from workers.steps.outcome import FOR_DEVICE, MOVED, Outcome

DRAWN = 64
"""Structures that say how many multiply-adds a budget in milliseconds allows."""
SOUNDED = 12
"""Networks that tell how far prices are off where a job searches; fewer than half of them tell nothing."""


def begin(context: Context, job: Job) -> Outcome:
    """Note what the job runs on, and ask for the layers that its devices lack."""
    with transaction() as session:
        _ask(session, context)
        jobs.save_step(session, context.claim, state=JobState.PROFILING, environment=context.environment)
    return MOVED


def _ask(session: Session, context: Context) -> None:
    """Have the layers measured that the devices lack; also again, since an agent may have come with another table."""
    for name in dict.fromkeys(split_latency(latency)[0] for latency in context.constrained):
        if measurements.layers_missing(session, name, context.space):
            device = devices.get(session, name)
            measurements.request_for_job(session, device, space_arguments(context.space))


def step(context: Context, job: Job) -> Outcome:
    """Pin the tables once they can price every structure, and sound the budget once they are; until then wait."""
    return _sound(context, job) if "sounded" in job.memory else _pin(context, job)


def _pin(context: Context, job: Job) -> Outcome:
    with transaction() as session:
        waiting = [name for name in context.constrained if not _ready(session, context, *split_latency(name))]
        if waiting:
            _ask(session, context)
        tables = {name: measurements.load_table(session, *split_latency(name)) for name in context.latencies}
        verdicts = {name: _verdict(session, context, *split_latency(name)) for name in context.latencies}
        waited = jobs.phase_seconds(session, job.id).get(JobState.PROFILING, 0.0)
    if waiting:
        if waited > context.settings.profile_seconds:
            if missing := tables[waiting[0]].missing(_needed(context)):
                raise MissingLatencies(missing)
            raise MeasurementFailed(f"{waiting[0]} has not measured the networks that its table is fitted by in time")
        context.console.say({"phase": "profiling", "waits_for": waiting})
        return FOR_DEVICE

    pinned = {name: write_blob(context.settings.blobs, json.dumps(table.to_json(), sort_keys=True).encode())
              for name, table in tables.items() if not table.missing(_needed(context))}  # fmt: skip
    margins = {name: verdicts[name].margin for name in pinned}
    noise = {name: verdicts[name].noise for name in pinned}
    memory = {**job.memory, "tables": pinned, "margins": margins, "noise": noise, "corrections": {}, "round": 0}
    warnings = [] if UNSTRUCTURED.issuperset(context.spec.methods) else _sized(context, memory)
    memory["sounded"] = _drawn(context, memory)
    with transaction() as session:
        for sha256 in pinned.values():
            blobs.register(session, sha256)
        if memory["sounded"]:
            for warning in warnings:
                jobs.add_event(session, job.id, "warning", {"detail": warning})
            jobs.save_step(session, context.claim, memory=memory, warnings=[*job.warnings, *warnings])
            return MOVED
    return _go_on(context, job, memory, warnings, verdicts, {})


def _drawn(context: Context, memory: dict[str, Any]) -> list[list[int]]:
    """Channels of networks that a search begins with; none where no latency is constrained, or nothing is repaired."""
    if not context.constrained or not context.spec.search.repair:
        return []
    budget, _ = _budget(context, memory)
    drawn = budget.sample(SOUNDED, numpy_generator(context.spec.seed, "sounded"))
    return [list(map(int, channels)) for channels in budget.channels(drawn)]


def _sound(context: Context, job: Job) -> Outcome:
    """Correct prices by what the drawn networks take, and go on."""
    memory = dict(job.memory)
    networks, found = {context.space.digest(channels): channels for channels in memory["sounded"]}, {}
    patience = measuring.patience(context, job, networks.values())
    with transaction() as session:
        with suppress(MeasurementFailed):  # the search can do without them
            found = measuring.tried(session, context, f"sound-{job.id}", networks)
        verdicts = {name: _verdict(session, context, *split_latency(name)) for name in context.constrained}
        moment = clock(session)
        if not memory.get("since"):
            memory["since"] = moment
            jobs.save_step(session, context.claim, memory=memory)
    lacking = any(len(measured) < len(context.constrained) for measured in found.values())
    if lacking and moment - memory["since"] < patience:
        context.console.say({"phase": "profiling", "waits_for": list(context.constrained)})
        return FOR_DEVICE
    sounded = _corrections(context, memory, networks, found)
    memory |= {
        "corrections": {name: one["correction"] for name, one in sounded.items()},
        "margins": memory["margins"] | {name: one["margin"] for name, one in sounded.items()}, "since": None,
    }  # fmt: skip
    _, warnings = _budget(context, memory) if sounded else (None, [])
    if lacking:
        asked = f"{', '.join(context.constrained)} did not measure all of {len(networks)} networks in {patience:.0f} s"
        warnings = [*warnings, f"{asked}: prices are corrected by what was measured, or not at all"]
    return _go_on(context, job, memory, warnings, verdicts, sounded)


def _go_on(
    context: Context, job: Job, memory: dict[str, Any], warnings: Sequence[str], verdicts: Mapping[str, Verdict],
    sounded: dict[str, dict[str, float]],
) -> Outcome:  # fmt: skip
    """To `training`, with what a user should know before the latencies of a job are believed.

    Raises:
        InvalidInput: a method cannot prune to the budget.
    """
    methods.check(context, memory)
    doubted = [name for name in context.constrained if verdicts[name].reason]
    margins = search_margins(memory) if METAPRUNING in context.spec.methods else memory["margins"]
    told = dict.fromkeys([*warnings, *(_doubt(name, verdicts[name], margins[name]) for name in doubted)])
    new = [warning for warning in told if warning not in job.warnings]
    with transaction() as session:
        if sounded:
            jobs.add_event(session, job.id, "sounding", sounded)
        for warning in new:
            jobs.add_event(session, job.id, "warning", {"detail": warning})
        jobs.save_step(session, context.claim, state=JobState.TRAINING, memory=memory, warnings=[*job.warnings, *new])
    return MOVED


def _corrections(
    context: Context, memory: dict[str, Any], networks: dict[str, list[int]], found: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Latency → `correction`, `margin` and number of `networks`, where enough were measured and are off by one share.

    Networks of some 30 microseconds were seen to be off by 20 % to one side and 50 to the other: no share mends that.
    """
    budget = context.budget_of(memory)
    predicted = {key: budget.predict(channels) for key, channels in networks.items()}
    sounded = {}
    for name in context.constrained:
        ratios = np.array([seconds[name] / predicted[key][name] for key, seconds in found.items() if name in seconds])
        if len(ratios) >= SOUNDED / 2:
            middle = float(np.median(ratios))
            margin = float(np.abs(ratios / middle - 1).mean())
            if margin <= MOST_MARGIN:
                sounded[name] = {"networks": len(ratios), "correction": middle, "margin": margin}
    return sounded


def _sized(context: Context, memory: dict[str, Any]) -> list[str]:
    """Note the FLOPs of networks at the ends of what is searched; returns warnings.

    They are by the table alone, so that jobs which differ in nothing else share a PruningNet whatever they measure
    afterwards. They are those of the uniform networks there. Where other costs are bounded, they are of what a search
    begins with, which may be quite unlike: widths that the device is fast with, or early ones, which have few
    parameters. Then they are their median, or what nine of ten stay below in a range.

    Raises:
        NothingFeasible: no structure is found that satisfies all constraints together.
    """
    budget, warnings = _budget(context, memory)
    doubtful = len(context.constraints) > 1 or any(bound.minimum for bound in context.constraints)
    if METAPRUNING in context.spec.methods and doubtful and budget.empty(context.spec.seed):
        raise NothingFeasible
    memory["flops"] = flops(context.space.layers(budget.uniform()))
    if context.spec.search.repair and any(bound.metric is not Metric.FLOPS for bound in context.constraints):
        drawn = budget.costs(budget.sample(DRAWN, numpy_generator(context.spec.seed, "flops"))).flops
        share = 0.9 if context.spec.objective == "front" else 0.5
        memory["flops"] = int(np.quantile(drawn, share)) if len(drawn) else memory["flops"]
    if context.spec.objective == "front":
        [bound] = budget.constraints
        memory["least_flops"] = flops(context.space.layers(budget.uniform(bound.minimum / bound.maximum)))
    return warnings


def _budget(context: Context, memory: dict[str, Any]) -> tuple[Budget, list[str]]:
    """The job's budget; without margins, and with a warning, where they alone would make it infeasible."""
    try:
        context.search_budget(memory)
        return context.budget_of(memory), []
    except InfeasibleConstraint:
        memory["margins"] = memory["noise"] = dict.fromkeys(memory["margins"], 0.0)
        budget = context.budget_of(memory)
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


def _needed(context: Context) -> list[Layer]:
    """Layers that a table must price, so that it prices every structure."""
    return plan_layers(context.space, measurements.SAMPLED)


def _doubt(name: str, verdict: Verdict, margin: float) -> str:
    """What there is to know of a table."""
    return (
        f"{name}'s lookup table is {verdict.trust}: {verdict.reason}; the search keeps {margin:.1%} of the budget free"
    )
