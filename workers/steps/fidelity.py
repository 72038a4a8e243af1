"""How well the PruningNet ranks: random structures of the budget, judged by it and trained from scratch.

The trainings stand in the queue of `retraining` like every other one. When all are done, Kendall's tau is computed
between their accuracy on the test set and what the PruningNet says of them, by accuracy and by loss: with batch norms
(and classifiers, where the search does that) fitted anew, and as they were trained. Without weight prediction is
another PruningNet: that of a job with `training.weights` shared, which takes over the same trainings from scratch.
"""

import math
from collections.abc import Sequence
from typing import Any

from service.store import jobs, pruning_nets, results
from service.store.models import Job, Role
from service.store.session import transaction
from workers.evaluation import Scorer
from workers.evolution import Score
from workers.sampling import numpy_generator
from workers.steps.context import Context
from workers.steps.outcome import MOVED, Outcome
from workers.steps.training import pruning_net

ROUNDS = 20
LEAST = 4
"""Fewer structures have no order worth comparing."""
RECALIBRATION = 1000
"""Images for recalibrating in a job whose search recalibrates nothing."""


def draw(context: Context, job: Job) -> list[tuple[int, ...]]:
    """Encodings of the distinct random structures that are asked for, or of all that were found if those are fewer."""
    wanted, space, budget = context.spec.fidelity.structures, context.space, context.search_budget(job.memory)
    if not wanted or "fidelity" in job.memory:
        return []
    random, found = numpy_generator(context.spec.seed, "fidelity"), dict[str, tuple[int, ...]]()
    for _ in range(ROUNDS):
        for genes in budget.sample(2 * wanted, random).tolist():
            found.setdefault(space.digest(space.channels(genes)), tuple(genes))
        if len(found) >= wanted:
            break
    return list(found.values())[:wanted] if len(found) >= LEAST else []


def step(context: Context, job: Job) -> Outcome:
    """Judge what was trained, store how the two agree, and take the trials off the queue."""
    trials = [trial for trial in job.memory["queue"] if trial["role"] == Role.FIDELITY]
    proxies = {recalibrated: _judge(context, job, trials, recalibrated) for recalibrated in (True, False)}
    with transaction() as session:
        tested = [results.find(session, job.id, trial["structure_id"], Role.FIDELITY) for trial in trials]
    accuracies = [row.test_accuracy for row in tested if row is not None]
    facts = {
        "job_id": job.id, "weights": context.spec.training.weights, "structures": len(trials),
        "epochs": context.spec.fidelity.epochs,
    }  # fmt: skip
    variants = [
        {**facts, "recalibrated": recalibrated, "rank_by": rank_by, **_agreement(values, accuracies)}
        for recalibrated, scores in proxies.items()
        for rank_by, values in (("accuracy", [s.accuracy for s in scores]), ("loss", [-s.loss for s in scores]))
    ]
    points = [
        {"structure_id": trial["structure_id"], "test_accuracy": accuracy, "recalibrated": _shown(proxies[True][i]),
         "as_trained": _shown(proxies[False][i])}
        for i, (trial, accuracy) in enumerate(zip(trials, accuracies, strict=True))
    ]  # fmt: skip
    queue = [trial for trial in job.memory["queue"] if trial["role"] != Role.FIDELITY]
    memory = {**job.memory, "queue": queue, "fidelity": {"variants": variants, "structures": points}}
    with transaction() as session:
        jobs.save_step(session, context.claim, memory=memory)
        pruning_nets.judge(session, job.memory["net"], variants)
        for trial, score in zip(trials, proxies[True], strict=True):
            results.judged(session, job.id, trial["structure_id"], Role.FIDELITY, score.accuracy)
    return MOVED


def warnings(context: Context, job: Job) -> list[str]:
    """What to tell of a budget that holds fewer structures than were asked for."""
    wanted = context.spec.fidelity.structures
    found = len(job.memory.get("fidelity", {}).get("structures", []))
    if found >= wanted:
        return []
    reason = f"of {wanted} structures for the fidelity only {found or f'fewer than {LEAST}'} were found in the budget"
    return [reason if found else f"{reason}; it was not measured"]


def _judge(context: Context, job: Job, trials: Sequence[dict[str, Any]], recalibrated: bool) -> list[Score]:
    """What the PruningNet says of each trial."""
    search = context.spec.search
    images = (search.recalibration_images or RECALIBRATION, search.classifier_images or 0) if recalibrated else (0, 0)
    judge = Scorer(
        pruning_net(context, job), context.data, recalibration_images=images[0], classifier_images=images[1],
        seed=context.spec.seed, device=context.device,
    )  # fmt: skip
    scores = []
    for done, trial in enumerate(trials):
        context.console.say(
            {"phase": "retraining", "structure": "judged", "done": done + (not recalibrated) * len(trials),
             "total": 2 * len(trials)}
        )  # fmt: skip
        scores.append(judge.score(trial["encoding"]))
    return scores


def _agreement(proxies: Sequence[float], accuracies: Sequence[float]) -> dict[str, float | None]:
    """Kendall's tau-b and its p-value; None where one of the rows holds a single value, which has no order."""
    from scipy.stats import kendalltau  # heavy, and few jobs need it

    found = kendalltau(proxies, accuracies)
    tau, p_value = float(found.statistic), float(found.pvalue)
    return {"tau": None, "p_value": None} if math.isnan(tau) else {"tau": tau, "p_value": p_value}


def _shown(score: Score) -> dict[str, float]:
    return {"accuracy": score.accuracy, "loss": score.loss}
