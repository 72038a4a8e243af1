"""From a job's state to the step that it needs."""

from collections.abc import Callable

from service.store.models import Job, JobState
from service.store.results import METAPRUNING
from workers.steps import profiling, pruning, retraining, searching, training, turns, verifying
from workers.steps.context import Context
from workers.steps.outcome import Outcome

STEPS: dict[JobState, Callable[[Context, Job], Outcome]] = {
    JobState.QUEUED: profiling.begin,
    JobState.PROFILING: profiling.step,
    JobState.TRAINING: training.step,
    JobState.SEARCHING: searching.step,
    JobState.RETRAINING: retraining.step,
    JobState.VERIFYING: verifying.step,
}
PRUNING: dict[JobState, Callable[[Context, Job], Outcome]] = {
    JobState.TRAINING: pruning.begin,
    JobState.SEARCHING: pruning.step,
}
"""Of the methods that prune a network instead of searching with a PruningNet."""
SEES_IMAGES = (JobState.TRAINING, JobState.SEARCHING, JobState.RETRAINING)


def advance(context: Context, job: Job) -> Outcome:
    """Do the next step of a claimed job.

    Raises:
        LeaseLost: the job belongs to somebody else now; nothing was stored.
        SecateursError: the job cannot succeed; the caller ends it with this reason.
    """
    if job.state in SEES_IMAGES:
        context.pin_images()
    if job.state in PRUNING and turns.current(context, job) != METAPRUNING:
        return PRUNING[job.state](context, job)
    try:
        return STEPS[job.state](context, job)
    except training.DamagedNet as error:
        return training.anew(context, job, error)
