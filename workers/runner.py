"""`python -m workers.runner JOB OWNER FENCE PARENT`: one job under its claim, step by step, until it ends or must wait.

It dies with its supervisor. Progress goes to standard output, one JSON object a line; an empty object says only that
it is alive.

With several training processes it becomes torchrun's launcher, whose children run this module again: process 0 does
the job, the others train with it. The death of one ends all, and they die with the launcher.
"""

import errno
import json
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from latency_profiler.errors import InfeasibleConstraint, SecateursError
from latency_profiler.parent import die_with
from service.settings import get_settings
from service.store import jobs
from service.store.jobs import Claim, LeaseLost
from service.store.models import JobState
from service.store.session import DATABASE_AWAY, transaction
from workers.parallel import ALONE, Ranks, launch, launched, local_rank
from workers.placement import choose
from workers.steps.advance import advance
from workers.steps.context import Context
from workers.steps.methods import MAKERS
from workers.steps.trainers import follow

log = logging.getLogger(__name__)
PATIENCE = 20.0
"""Seconds for which a runner waits itself before it gives the job back: starting another one costs about three."""
POLL = 0.5
LOST_SECONDS, FULL_SECONDS = 2.0, 60.0
"""Until another runner tries what one could not do, and what one had no room on the disk for."""
LONGEST = 1000
"""Characters of a reason."""
AWAY_SECONDS = 600.0
"""For which the database may have been away, a long step included; the supervisor stops who has lost the lease."""


class Console:
    """What the runner tells its supervisor, and what it is told by it."""

    def __init__(self) -> None:
        self.stopping = False
        self._said = 0.0
        signal.signal(signal.SIGTERM, self._stop)

    def say(self, progress: dict[str, Any] | None = None) -> None:
        """Report progress; at most twice a second."""
        if time.monotonic() - self._said > 0.5:
            self._said = time.monotonic()
            sys.stdout.write(json.dumps(progress or {}) + "\n")
            sys.stdout.flush()

    def _stop(self, *_: object) -> None:
        self.stopping = True


class Silence:
    """Of the processes that only train with the runner."""

    stopping = False

    def say(self, progress: dict[str, Any] | None = None) -> None:
        """Process 0 reports for all."""


def main(job_id: str, owner: str, fence: str, parent: str) -> int:
    """Exit code 0 when the job has ended, waits, or belongs to somebody else."""
    if not die_with(int(parent)):
        return 1
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    settings, claim, team = get_settings(), Claim(job_id, owner, int(fence)), ALONE
    if settings.training_processes > 1 and not launched():
        return launch(settings.training_processes, "workers.runner", [job_id, owner, fence, str(os.getpid())])
    try:
        if launched():
            team = Ranks(choose(settings.device, local_rank(), settings.training_processes), settings.stall_seconds)
        if isinstance(team, Ranks) and team.rank:
            follow(team, lambda: Context(claim, settings, Silence(), guest=True, team=team), MAKERS)
            return 0
        _run(Context(claim, settings, Console(), team=team))
    except LeaseLost as error:
        log.warning("%s", error)
    except SecateursError as error:
        log.exception("job %s failed", job_id)
        _fail(claim, error)
    except Exception as error:
        if team is not ALONE:
            raise  # the launcher ends the others, and the supervisor sees that
        log.exception("job %s: its runner cannot go on", job_id)
        _lose(claim, error)
        return 1
    team.tell(None)
    return 0


def _run(context: Context) -> None:
    claim, console = context.claim, context.console
    patience, heard = PATIENCE, time.monotonic()
    while not console.stopping:
        try:
            with transaction() as session:
                job = jobs.load(session, claim)
            outcome, heard = advance(context, job), time.monotonic()
        except DATABASE_AWAY as error:
            if context.team is not ALONE or time.monotonic() - heard > AWAY_SECONDS:
                raise
            log.warning("job %s: the database is away, the step begins anew: %s", claim.job_id, error)
            context.kept.clear()  # it may be ahead of what is stored
            time.sleep(POLL)
            continue
        console.say()
        if outcome.ended:
            return
        if outcome.wait is None:
            patience = PATIENCE
        elif patience > 0:
            time.sleep(POLL)
            patience -= POLL
        else:
            _give_back(claim, outcome.wait)
            return
    _give_back(claim, 0.0)


def _give_back(claim: Claim, seconds: float) -> None:
    with transaction() as session:
        jobs.release(session, claim, seconds)


def _fail(claim: Claim, error: SecateursError) -> None:
    with suppress(LeaseLost), transaction() as session:
        jobs.finish(session, claim, JobState.FAILED, error=_problem(error))


def _lose(claim: Claim, error: Exception) -> None:
    """Give the job back with the reason; one that waits for room on the disk loses no attempt."""
    full = _disk_is_full(error)
    with suppress(LeaseLost, *DATABASE_AWAY), transaction() as session:
        if full:
            jobs.excuse(session, claim)
        jobs.lose(session, claim, f"{type(error).__name__}: {error}"[:LONGEST], FULL_SECONDS if full else LOST_SECONDS)


def _disk_is_full(error: Exception) -> bool:
    """Also where a library has made its own error of the system's."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)


def _problem(error: SecateursError) -> dict[str, Any]:
    facts: dict[str, Any] = {"title": type(error).__name__, "detail": str(error)}
    if isinstance(error, InfeasibleConstraint):
        facts |= {"metric": error.metric, "asked": error.asked, "smallest": error.smallest, "largest": error.largest}
    return facts


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
