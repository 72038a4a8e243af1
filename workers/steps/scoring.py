"""The scores of a generation: given in the job's own process, or in chunks by all workers that are free.

Scores depend on the PruningNet, the images, the encoding and the environment, and on nothing else; so who gives them,
and in how many chunks, changes only how long it takes. The job's process offers a long generation's chunks to all and
works on them itself until each has its scores. It waits for a chunk that another worker holds as long as that worker
renews its lease, and takes it over afterwards.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence

from service.store import chunks, jobs
from service.store.models import Job
from service.store.session import snapshot, transaction
from workers.evaluation import Scorer
from workers.evolution import Encoding, Score
from workers.steps.context import Context
from workers.steps.training import scorer

CHUNK_SECONDS = 1.0
"""What a chunk should take; less costs too many transactions, more leaves workers idle at a generation's end."""
LEAST_CHUNKS = 16
"""A shared generation is cut into at least so many chunks, if it has so many candidates."""
POLL = 0.05

Told = Callable[[float], None]
"""Hears which share of the generation is scored."""


class Pace:
    """How long the last candidate took to score, in seconds; it decides about sharing, never about a score."""

    seconds = 0.0

    def score(self, judge: Scorer, encoding: Encoding) -> Score:
        """Score and time it."""
        begun = time.perf_counter()
        score = judge.score(encoding)
        self.seconds = time.perf_counter() - begun
        return score


def score(context: Context, job: Job, encodings: Sequence[Encoding], told: Told) -> list[Score] | None:
    """One score for each encoding; None when the worker shall stop first: what other workers know by then is kept.

    Raises:
        LeaseLost: the job belongs to somebody else now.
    """
    judge, batch = scorer(context, job), _batch(context, job, encodings)
    pace = context.keep("pace", job.memory["net"], Pace)
    with snapshot() as session:
        shared = chunks.published(session, job.id, batch)
    done: dict[Encoding, Score] = {}
    for place, encoding in enumerate(encodings):
        rest = encodings[place:]
        shared = shared or pace.seconds * len(rest) >= context.settings.share_seconds
        if shared:
            break
        told(place / len(encodings))
        done[encoding] = pace.score(judge, encoding)
    if shared and not _together(context, job, judge, batch, rest, pace, told):
        return None
    with snapshot() as session:
        done |= {encoding: Score(*pair) for encoding, pair in chunks.scores(session, job.id, batch).items()}
    return [done[encoding] if encoding in done else judge.score(encoding) for encoding in encodings]


def environment(context: Context) -> str:
    """What scores are reproducible with; a worker with another one must not score a job's chunks."""
    return json.dumps(context.environment, sort_keys=True)


def work(context: Context, judge: Scorer, pace: Pace) -> bool:
    """Score one of the job's chunks that waits for a worker; False when none does."""
    claim, wanted = context.claim, environment(context)
    with snapshot() as session:
        if (claim.job_id, wanted) not in chunks.waiting(session):
            return False
    with transaction() as session:
        held = chunks.claim(session, claim.job_id, wanted, claim.owner, context.settings.lease_seconds)
    if held is None:
        return False
    scores = []
    for encoding in held.encodings:
        context.console.say()
        scores.append(pace.score(judge, encoding))
    with transaction() as session:
        chunks.finish(session, held, [(score.accuracy, score.loss) for score in scores])
    return True


def _together(
    context: Context, job: Job, judge: Scorer, batch: str, rest: Sequence[Encoding], pace: Pace, told: Told
) -> bool:
    """Offer a generation's chunks, and work on them until all are done; False when told to stop before."""
    parts = _parts(rest, pace.seconds)
    with transaction() as session:
        jobs.load(session, context.claim)
        chunks.publish(session, job.id, batch, environment(context), parts)
    while not context.console.stopping:
        with snapshot() as session:
            undone = chunks.undone(session, job.id, batch)
        if not undone:
            return True
        told(1.0 - undone / max(undone, len(parts)))
        if not work(context, judge, pace):
            time.sleep(POLL)
    return False


def _parts(encodings: Sequence[Encoding], seconds: float) -> list[Sequence[Encoding]]:
    """Equal parts that take about `CHUNK_SECONDS` each, at `seconds` per encoding."""
    most = -(-len(encodings) // LEAST_CHUNKS)
    size = max(1, min(most, int(CHUNK_SECONDS / seconds))) if seconds else most
    return [encodings[start : start + size] for start in range(0, len(encodings), size)]


def _batch(context: Context, job: Job, encodings: Sequence[Encoding]) -> str:
    """Names a generation by all that its scores depend on."""
    content = [job.memory["net"], environment(context), [list(encoding) for encoding in encodings]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
