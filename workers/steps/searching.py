"""`searching`: one generation a step; then the best are measured before anything is spent on retraining one of them.

Within milliseconds winners and finalists are those of the best that hold the budget when they are measured. So the
search need not keep free what prices are off by, which half of all networks would not have needed, but only what the
next measurement may differ by.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from latency_profiler.cost import Metric, split_latency
from latency_profiler.errors import InfeasibleConstraint, MeasurementFailed, NothingFeasible
from service.store import candidates, chunks, devices, jobs
from service.store.candidates import Judged
from service.store.models import Job, Role, clock
from service.store.results import METAPRUNING
from service.store.session import transaction
from workers import evolution
from workers.budget import Budget
from workers.evolution import Evolution, Proposal, Score
from workers.front import Front
from workers.sampling import numpy_generator
from workers.steps import fidelity, measuring, scoring, turns
from workers.steps.context import Context
from workers.steps.outcome import FOR_DEVICE, MOVED, Outcome

LEAST_USED = 0.93
"""A winner whose first measurement is under this share of the prediction, and of the budget, shows that the prediction
is too pessimistic; one that uses less of the budget but takes what was predicted is just what the search has found."""
UNIFORM_SHARES = (0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
"""Of a budget in milliseconds that uniform networks use by their prices, which are measured with the best structures:
the widest that holds the budget is the baseline. By its price alone one was seen to leave 17 % of a budget unused."""
SHORTLIST = 8
"""At least so many of the best structures are measured to find the winner; of a front, only its first."""


def step(context: Context, job: Job) -> Outcome:
    """Judge a generation, or hand the best structures on."""
    budget = _budget(context, job)
    search = _search(context, job, budget)
    proposals = search.propose()
    if proposals:
        return _judge(context, job, budget, search, proposals)
    if search.exhausted and not job.memory["evolution"]["exhausted"]:  # finding that out may have taken long
        with transaction() as session:
            jobs.save_step(session, context.claim, memory={**job.memory, "evolution": search.to_json()})
        return MOVED
    return _hand_on(context, job, search)


def _budget(context: Context, job: Job) -> Budget:
    """The job's budget; one that only corrections have made infeasible is one that measurements have broken."""
    try:
        return context.search_budget(job.memory)
    except InfeasibleConstraint as error:
        if figures := job.memory.get("figures"):
            raise measuring.BudgetBroken(figures) from error
        raise


def _search(context: Context, job: Job, budget: Budget) -> Evolution:
    state, kind = job.memory.get("evolution"), Front if context.spec.objective == "front" else Evolution
    if state is not None:
        return kind.from_json(state, budget)
    spec = context.spec.search
    given = {name: value for name, value in spec.model_dump().items() if name in evolution.Settings.__slots__}
    return kind(evolution.Settings(**given), context.spec.seed if spec.seed is None else spec.seed, budget)


def _judge(context: Context, job: Job, budget: Budget, search: Evolution, proposals: list[Proposal]) -> Outcome:
    generation = search.generation

    def told(share: float) -> None:
        context.console.say(
            {"phase": "searching", "generation": generation, "generations": search.generations,
             "done": generation + share, "total": search.generations}
        )  # fmt: skip

    scores = scoring.score(context, job, [proposal.encoding for proposal in proposals], told)
    if scores is None:
        return MOVED
    search.tell(scores)
    judged = _rows(budget, proposals, scores)
    best = search.winner()
    summary = {
        "generation": generation, "generations": search.generations, "candidates": len(search.judged),
        "best_accuracy": best.score.accuracy if best else None, "best_loss": best.score.loss if best else None,
        "mean_accuracy": float(np.mean([score.accuracy for score in scores])), "diversity": search.diversity(),
        "exhaustive": bool(search.exhaustive),
    }  # fmt: skip
    if isinstance(search, Front):
        summary |= {"hypervolume": search.hypervolume(), "front": len(search.front())}
    with transaction() as session:
        names = dict.fromkeys(split_latency(name)[0] for name in job.memory["tables"])
        predicted = {name: devices.get(session, name).id for name in names}
        jobs.save_step(session, context.claim, memory={**job.memory, "evolution": search.to_json()})
        chunks.drop(session, job.id)
        candidates.record_generation(session, job, context.space, generation, judged, predicted)
        jobs.add_event(session, job.id, "generation", summary)
    return MOVED


def _rows(budget: Budget, proposals: list[Proposal], scores: list[Score]) -> list[Judged]:
    costs = budget.costs(np.array([proposal.encoding for proposal in proposals]))
    return [
        Judged(
            proposal.encoding, proposal.birth, proposal.parents, int(costs.flops[i]), int(costs.parameters[i]),
            {name: float(seconds[i]) for name, seconds in costs.seconds.items()}, score.accuracy, score.loss,
        )
        for i, (proposal, score) in enumerate(zip(proposals, scores, strict=True))
    ]  # fmt: skip


def _hand_on(context: Context, job: Job, search: Evolution) -> Outcome:
    """To `retraining` with the best structures that hold the budget when they are measured; back where none does."""
    listed = _shortlist(context, search)
    if not listed:  # corrections have made all that was judged infeasible, and nothing else was found
        raise measuring.BudgetBroken(job.memory["figures"]) if job.memory.get("figures") else NothingFeasible()
    memory = dict(job.memory)
    uniforms = _uniform_networks(context, job, search)
    patience = measuring.patience(context, job, [*listed.values(), *uniforms.values()])
    with transaction() as session:
        moment = clock(session)
        found = measuring.tried(session, context, measuring.purpose(job, "check"), listed)
        beside = _measured_beside(session, context, job, uniforms)
        if not memory.get("since"):
            memory["since"] = moment
            jobs.save_step(session, context.claim, memory=memory)
        whole = _whole(context, found)
        lacking = len(whole) < len(found) or len(_whole(context, beside)) < len(beside)
        if lacking and moment - memory["since"] < patience:
            return FOR_DEVICE
        if not whole and memory.get("again"):  # what was doubted stands where nothing refutes it
            found = measuring.tried(session, context, measuring.purpose(job, "check", False), listed)
            whole = _whole(context, found)
    networks = [(listed[structure_id], measured) for structure_id, measured in found.items()]
    broken = {one: measuring.off(context, found[one], noise=memory.get("noise", {})) for one in found}
    held = [one for one in whole if not broken[one]] or [one for one in found if found[one] and not broken[one]]
    if any(broken.values()) and not held:
        if measuring.doubted(context, job):
            return MOVED
        over = {name: maximum for allowed in broken.values() for name, maximum in allowed.items()}
        return search_on(context, job, networks, over)
    warnings = [] if held else [_unmeasured(context, patience)]
    held = held or list(found)
    if unused := _unused(context, job, search, networks, found[held[0]]):
        return search_on(context, job, networks, unused, shy=True)
    refused, noise = {one for one in listed if broken.get(one, True)}, memory.get("noise", {})
    fast = [uniforms[one] for one in _whole(context, beside) if not measuring.off(context, beside[one], noise=noise)]
    queue = [*turns.others(job, METAPRUNING), *_queue(context, job, search, refused, held, fast)]
    with transaction() as session:
        for warning in warnings:
            jobs.add_event(session, job.id, "warning", {"detail": warning})
        changes = turns.hand_on(context, job, queue)
        jobs.save_step(session, context.claim, **changes, warnings=[*job.warnings, *warnings])
    return MOVED


def _whole(context: Context, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Those that every device that is constrained has measured."""
    return [one for one, measured in found.items() if len(measured) == len(context.constrained)]


def _uniform_networks(context: Context, job: Job, search: Evolution) -> dict[str, tuple[int, ...]]:
    """Structure id → channels of uniform networks around a budget in milliseconds, the narrowest first."""
    if isinstance(search, Front) or not context.constrained or not context.spec.baselines:
        return {}
    budget = _budget(context, job)
    return {context.space.digest(channels): channels for channels in map(budget.uniform, UNIFORM_SHARES)}


def _measured_beside(
    session: Session, context: Context, job: Job, uniforms: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, float]]:  # fmt: skip
    """What uniform networks take, as far as devices have measured them, without those that a device cannot run."""
    with suppress(MeasurementFailed):
        return measuring.tried(session, context, measuring.purpose(job, "check"), uniforms)
    return {}


def _unmeasured(context: Context, patience: float) -> str:
    """What a user is told whose devices did not answer."""
    names = ", ".join(context.constrained)
    return f"{names} measured none of the search's best structures in {patience:.0f} s; the winner may break the budget"


def _shortlist(context: Context, search: Evolution) -> dict[str, tuple[int, ...]]:
    """Structure id → channels of the best, best first; of several finalists they are spread."""
    finalists, most = context.spec.retraining.finalists or 1, 1 if isinstance(search, Front) else SHORTLIST
    key = _structure_id(context)
    if finalists > 1:
        best = search.apart(max(most, finalists) if context.constrained else finalists, key, context.space.channels)
    else:
        best = search.top(most, key)
    channels = [context.space.channels(one.proposal.encoding) for one in best]
    return {context.space.digest(each): each for each in channels}


def _structure_id(context: Context) -> Callable[[Sequence[int]], str]:
    return lambda encoding: context.space.digest(context.space.channels(encoding))


def _unused(
    context: Context, job: Job, search: Evolution, networks: Sequence[measuring.Measured], winner: Mapping[str, float]
) -> dict[str, float]:
    """Latency → seconds that are allowed, where prices are so pessimistic that the winner leaves budget unused."""
    if job.memory["round"] >= measuring.SHY_ROUNDS or not _latency_binds(context, job, search):
        return {}
    unused = measuring.off(context, winner, LEAST_USED)
    if any(measuring.ratio(context, job, networks, name) >= LEAST_USED for name in winner):
        return {}
    room = unused and _has_room(context, measuring.corrected(context, job, networks, unused, shy=True))
    return unused if room else {}


def _has_room(context: Context, memory: dict[str, Any]) -> bool:
    """Whether some structure uses the budget with the corrections of this memory; else the winner is what there is."""
    try:
        budget = context.search_budget(memory)
    except InfeasibleConstraint:
        return False
    return len(budget.sample(1, numpy_generator(context.spec.seed, "room"))) > 0


def _latency_binds(context: Context, job: Job, search: Evolution) -> bool:
    """Whether latency is what keeps the winner from growing, and not its FLOPs or parameters."""
    best, budget = search.winner(), _budget(context, job)
    assert best is not None
    counts = [bound for bound in context.constraints if bound.metric is not Metric.LATENCY]
    if isinstance(search, Front):
        return False
    if not context.constrained or not counts:
        return bool(context.constrained)
    return bool(budget.tightness(np.array([best.proposal.encoding]), counts)[0] < LEAST_USED)


def search_on(
    context: Context, job: Job, networks: Sequence[measuring.Measured], allowed: dict[str, float], *, shy: bool = False
) -> Outcome:
    """Back to the search, for some generations more, with the correction in the prediction."""
    evolution = dict(job.memory["evolution"])
    more = max(2, evolution["settings"]["generations"] // 3)
    evolution |= {"generations": evolution["generation"] + more, "exhausted": False, "exhaustive": None}
    memory = measuring.corrected(context, job, networks, allowed, shy=shy)
    return turns.again(context, job, METAPRUNING, memory | {"evolution": evolution})


def _queue(
    context: Context, job: Job, search: Evolution, refused: Collection[str], held: Collection[str],
    fast: Sequence[tuple[int, ...]],
) -> list[turns.Trial]:  # fmt: skip
    """What to retrain: the best distinct structures, uniform networks (the last that is `fast` enough) and random ones.

    Where finalists are asked for, they are those of the shortlist that have held the budget.
    """
    space, key, count = context.space, _structure_id(context), context.spec.retraining.top or 1
    best = best_of(search, key, count, held if context.constrained else (), refused)
    finalists = _among(search, key, held)[: context.spec.retraining.finalists or 1]
    role = Role.WINNER
    if context.spec.objective == "best" and len(finalists) > count:
        role, best = Role.FINALIST, finalists
    queue = []
    for rank, one in enumerate(best):
        encoding, proxy = one.proposal.encoding, one.score.accuracy
        channels = space.channels(encoding)
        queue.append(turns.trial(context, role, METAPRUNING, channels, rank=rank, encoding=encoding, proxy=proxy))
    if context.spec.baselines:
        for rank, uniform in enumerate(fast[-1:] or _uniforms(_budget(context, job), search, best)):
            queue.append(turns.trial(context, Role.UNIFORM, context.spec.method, uniform, rank=rank))
    for rank, encoding in enumerate(fidelity.draw(context, job)):
        channels = space.channels(encoding)
        queue.append(turns.trial(context, Role.FIDELITY, METAPRUNING, channels, rank=rank, encoding=encoding))
    return queue


def best_of(
    search: Evolution, key: evolution.Key, count: int, held: Collection[str], refused: Collection[str]
) -> list[evolution.Judged]:
    """So many distinct structures: those that have `held` the budget come before those that nobody has measured.

    Of a front, members that are spread over its cost.
    """
    if isinstance(search, Front):
        return search.top(count, key, without=refused)
    return [*_among(search, key, held), *search.top(count, key, without={*held, *refused})][:count]


def _among(search: Evolution, key: evolution.Key, structure_ids: Collection[str]) -> list[evolution.Judged]:
    return [one for one in search.top(len(search.judged), key) if key(one.proposal.encoding) in structure_ids]


def _uniforms(budget: Budget, search: Evolution, best: Sequence[evolution.Judged]) -> list[tuple[int, ...]]:
    """The uniform network at the budget, or one at the cost of each member of a front; under the corrections of now."""
    if not isinstance(search, Front):
        return [budget.uniform()]
    costs = budget.tightness(np.array([one.proposal.encoding for one in best]))
    return [budget.uniform(cost) for cost in costs.tolist()]
