"""`verifying`: devices measure winner and uniform network as a whole; a broken budget sends the job back."""

from typing import Any

from latency_profiler.cost import split_latency
from service.store import jobs, results
from service.store.models import Job, JobState, Role, clock
from service.store.session import transaction
from workers.steps import fidelity, measuring, pruning
from workers.steps.context import Context
from workers.steps.outcome import ENDED, FOR_DEVICE, MOVED, Outcome
from workers.steps.searching import search_on

GUEST_SECONDS = 60.0
"""How long a device that no constraint names may keep the job waiting."""


def step(context: Context, job: Job) -> Outcome:
    """Ask, wait, decide; a budget that the first measurement breaks, the second must hold with room for its noise."""
    memory = dict(job.memory)
    networks = {trial["structure_id"]: trial["channels"] for trial in memory["queue"]}
    winners = [trial for trial in memory["queue"] if trial["role"] == Role.WINNER]
    winners = [one for one in winners if context.spec.objective == "front" or not one["rank"]]
    with transaction() as session:
        moment = clock(session)
        ids = {winner["structure_id"] for winner in winners}
        found, unable = measuring.look_around(session, context, measuring.purpose(job, "verify"), networks, ids)
        if not memory.get("since"):
            memory["since"] = moment
            jobs.save_step(session, context.claim, memory=memory)
        away = [
            name for name in context.latencies
            if any(name not in found[one] and (one, name) not in unable for one in networks)
        ]  # fmt: skip
        wait = _must_wait(context, away, moment - memory["since"])
        if away and not wait and memory.get("again"):  # what was doubted stands where nothing refutes it
            first = measuring.look_around(session, context, measuring.purpose(job, "verify", False), networks, ids)[0]
            found = {one: first[one] | seconds for one, seconds in found.items()}
    noise = memory.get("noise", {}) if memory.get("again") else {}
    broken = ((one, measuring.off(context, found[one["structure_id"]], noise=noise)) for one in winners)
    winner, allowed = next(((one, allowed) for one, allowed in broken if allowed), (None, {}))
    if wait and winner is None:
        context.console.say({"phase": "verifying", "waits_for": away})
        return FOR_DEVICE
    _store(context, job, found)
    if winner is not None:
        if measuring.doubted(context, job):
            return MOVED
        look_on = search_on if winner["method"] == results.METAPRUNING else pruning.prune_on
        return look_on(context, job, [(winner["channels"], found[winner["structure_id"]])], allowed)
    constrained = [name for name in away if name in context.constrained]
    devices = dict.fromkeys(split_latency(name)[0] for name in away)
    reasons = {name: reason for (_, name), reason in unable.items()}
    late = [f"device {name} did not measure the winner in time" for name in devices]
    warnings = [*reasons.values(), *late, *_beyond(context, job, found)]
    return _end(context, job, JobState.UNVERIFIED if constrained else JobState.SUCCEEDED, warnings)


def _must_wait(context: Context, away: list[str], waited: float) -> bool:
    constrained = any(name in context.constrained for name in away)
    return bool(away) and waited < (context.settings.verify_seconds if constrained else GUEST_SECONDS)


def _store(context: Context, job: Job, found: dict[str, dict[str, float]]) -> None:
    with transaction() as session:
        jobs.load(session, context.claim)
        for trial in job.memory["queue"]:
            row = results.find(session, job.id, trial["structure_id"], Role(trial["role"]), trial["method"])
            if row is not None:
                results.measured(session, row.id, found.get(trial["structure_id"], {}))


def _beyond(context: Context, job: Job, found: dict[str, dict[str, float]]) -> list[str]:
    """What to tell of runners-up that break the budget, and of a winner below a least latency."""
    said = []
    for trial in job.memory["queue"]:
        measured = found.get(trial["structure_id"], {})
        bounds = [(bound, measured[bound.latency]) for bound in context.constraints if bound.latency in measured]
        for bound, seconds in bounds if trial["role"] == Role.WINNER else []:
            figures = f"{1000 * seconds:.4g} ms on {bound.latency} when it was measured"
            if seconds > bound.maximum:
                said.append(f"runner-up {trial['rank']} takes {figures}: more than {1000 * bound.maximum:.4g} ms")
            elif seconds < bound.minimum and not trial["rank"]:
                said.append(f"the winner takes {figures}: {1000 * bound.minimum:.4g} ms at least were asked for")
    return said


def _end(context: Context, job: Job, state: JobState, warnings: list[str]) -> Outcome:
    warnings = [*job.warnings, *warnings, *fidelity.warnings(context, job)]
    with transaction() as session:
        result = _result(context, job, session)
        jobs.finish(session, context.claim, state, result=result, warnings=warnings)
    return ENDED


def _result(context: Context, job: Job, session: Any) -> dict[str, Any]:
    """What `GET /v1/jobs/{id}` shows as the result."""
    shown: list[dict[str, Any]] = []
    for trial in job.memory["queue"]:
        row = results.find(session, job.id, trial["structure_id"], Role(trial["role"]), trial["method"])
        assert row is not None
        shown.append({**results.summary(session, row, trial["encoding"]), "role": trial["role"]})
    winners, uniforms, denses = (
        [one for one in shown if one["role"] == role] for role in (Role.WINNER, Role.UNIFORM, Role.DENSE)
    )
    first, *runners_up = [one for one in winners if one["method"] == context.spec.method]
    members: list[dict[str, Any] | None] = [*uniforms] or [None] * len(winners)
    front = [one | {"uniform": other} for one, other in zip([first, *runners_up], members, strict=False)]
    return {
        "winner": first,
        "runners_up": runners_up,
        "uniform": uniforms[0] if uniforms else None,
        "dense": denses[0] if denses else None,
        "methods": {method: next(one for one in winners if one["method"] == method) for method in context.spec.methods},
        "front": front[::-1] if context.spec.objective == "front" else None,
        "finalists": [{"structure_id": one, **scores} for one, scores in job.memory.get("finalists", {}).items()],
        "fidelity": job.memory.get("fidelity"),
        "candidates": results.candidate_count(session, job.id),
        "generations": jobs.generations(session, job.id),
        "pruning_net_reused": job.memory.get("reused"),
        "pruning_net": job.memory.get("net"),
        "rounds": job.memory["round"] + 1,
        "figures": job.memory.get("figures", []),
    }
