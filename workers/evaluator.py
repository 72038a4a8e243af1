"""`python -m workers.evaluator JOB ENVIRONMENT OWNER PARENT`: scores chunks of a job that another worker runs.

It builds the job's data and PruningNet once and stays for some seconds after the last chunk, since the next generation
comes soon. It writes nothing but the scores of the chunks that it claims, and dies with its supervisor.
"""

import logging
import os
import sys
import time

from latency_profiler.parent import die_with
from service.settings import get_settings
from service.store import jobs
from service.store.jobs import Claim
from service.store.session import snapshot
from workers.runner import Console
from workers.steps import scoring
from workers.steps.context import Context
from workers.steps.training import scorer

POLL = 0.1


def main(job_id: str, environment: str, owner: str, parent: str) -> int:
    """Exit code 0 when no chunk has waited for a while or it shall stop, `EX_CONFIG` where scores would differ."""
    if not die_with(int(parent)):
        return 1
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    context = Context(Claim(job_id, owner, 0), get_settings(), Console(), guest=True)
    if scoring.environment(context) != environment:
        logging.info("job %s: its scores need %s, this is %s", job_id, environment, scoring.environment(context))
        return os.EX_CONFIG
    _run(context)
    return 0


def _run(context: Context) -> None:
    with snapshot() as session:
        job = jobs.get(session, context.claim.job_id)
    judge, pace, patience = scorer(context, job), scoring.Pace(), context.settings.linger_seconds
    while patience > 0 and not context.console.stopping:
        if scoring.work(context, judge, pace):
            patience = context.settings.linger_seconds
        else:
            context.console.say()
            time.sleep(POLL)
            patience -= POLL


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
