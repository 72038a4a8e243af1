"""A generation's scores do not depend on who gives them, in how many chunks, or who is killed meanwhile."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from sqlalchemy import func, select, update

from service.settings import get_settings
from service.specs import JobRequest, resolve
from service.store import chunks, jobs
from service.store.jobs import Claim
from service.store.models import TERMINAL, Candidate, Chunk, Dataset, Job, JobState
from service.store.session import transaction
from workers import supervisor
from workers.evaluation import Scorer
from workers.evolution import Score
from workers.steps import scoring
from workers.steps.advance import advance
from workers.steps.context import Context
from workers.supervisor import evaluate_next, supervise_next

KEY = "mobilenet_v1@8x0.1/10+last"
ALONE, SHARED = "1e9", "0"
"""Seconds from which on a generation is shared."""


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Console:
    """Hears nothing; tells the steps to stop when `stopping` is set."""

    stopping = False

    def say(self, progress: dict[str, Any] | None = None) -> None:
        pass


@pytest.fixture
def share(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets from how many seconds on a generation is shared; there is a dataset, and nothing is left behind."""
    threads = torch.get_num_threads()
    with transaction() as session:
        facts = {"classes": 10, "train_images": 1437, "test_images": 360, "image_size": 8}
        session.add(Dataset(name="digits", kind="digits", **facts))

    def choose(seconds: str) -> None:
        settings = {"THREADS": "1", "BEAT_SECONDS": "0.2", "LEASE_SECONDS": "5", "LINGER_SECONDS": "2"}
        for name, value in {**settings, "SHARE_SECONDS": seconds}.items():
            monkeypatch.setenv(f"SECATEURS_{name}", value)
        get_settings.cache_clear()

    choose(ALONE)
    monkeypatch.setattr(supervisor, "in_vain", type(supervisor.in_vain)())
    yield choose
    torch.set_num_threads(threads)
    assert not processes("workers.")


def submit(population: int = 6, **search: Any) -> str:
    request = {
        "space": "mobilenet_v1", "width": 0.1, "image_size": 8, "dataset": "digits", "effort": "smoke",
        "constraints": [{"metric": "flops", "max": 25_000}], "baselines": False,
        "search": {"generations": 2, "population": population, **search},
    }  # fmt: skip
    with transaction() as session:
        dataset = session.scalars(select(Dataset)).one()
        spec = resolve(JobRequest.model_validate(request), 8)
        return jobs.submit(session, spec, space_key=KEY, dataset_id=dataset.id, created_by=None).id


def take(job_id: str) -> Context:
    """A runner's context under a new claim of the job, whoever held it."""
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(owner=None, lease_until=None, run_after=0.0))
        claim = jobs.claim(session, f"runner-{time.monotonic_ns()}", 30.0, 1000)
    assert claim is not None
    assert claim.job_id == job_id
    return Context(claim, get_settings(), Console())


def read(job_id: str) -> Job:
    with transaction() as session:
        return jobs.get(session, job_id)


def searching(context: Context) -> None:
    """Up to the first generation."""
    while read(context.claim.job_id).state is not JobState.SEARCHING:
        advance(context, read(context.claim.job_id))


def search(context: Context) -> list[tuple[Any, ...]]:
    """Through the search; its candidates. The job is cancelled then: retraining is not of interest."""
    job_id = context.claim.job_id
    searching(context)
    while read(job_id).state is JobState.SEARCHING:
        advance(context, read(job_id))
    with transaction() as session:
        jobs.finish(session, context.claim, JobState.CANCELLED)
    return judged(job_id)


def judged(job_id: str) -> list[tuple[Any, ...]]:
    with transaction() as session:
        columns = (Candidate.generation, Candidate.position, Candidate.encoding_key, Candidate.proxy_accuracy,
                   Candidate.proxy_loss)  # fmt: skip
        return [tuple(row) for row in session.execute(select(*columns).where(Candidate.job_id == job_id)
                .order_by(Candidate.generation, Candidate.position))]  # fmt: skip


def chunk_count(*conditions: Any) -> int:
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(Chunk).where(*conditions)) or 0


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What was scored in this process, in order."""
    seen: list[tuple[int, ...]] = []
    plain = Scorer.score

    def score(self: Scorer, encoding: Any) -> Score:
        seen.append(tuple(encoding))
        return plain(self, encoding)

    monkeypatch.setattr(Scorer, "score", score)
    return seen


def test_in_place_and_in_chunks_candidates_are_the_same(
    share: Callable[[str], None], scored: list[tuple[int, ...]]
) -> None:
    alone = search(take(submit()))
    assert len(alone) == len(scored) == 12
    share(SHARED)
    assert search(take(submit())) == alone
    assert len(scored) == 24
    assert chunk_count() == 0


def test_a_generation_that_turns_out_long_is_shared_from_there_on(
    share: Callable[[str], None], scored: list[tuple[int, ...]]
) -> None:
    alone = search(take(submit()))
    share("1e-9")
    context = take(submit())
    searching(context)
    published: list[Any] = []
    plain = chunks.publish

    def publish(session: Any, job_id: str, batch: str, environment: str, parts: Any) -> None:
        published.append([tuple(encoding) for part in parts for encoding in part])
        plain(session, job_id, batch, environment, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.chunks, "publish", publish)
        assert search(context) == alone
    # The first candidate of all is timed where it is; from then on the pace is known.
    assert [len(encodings) for encodings in published] == [5, 6]
    assert len(scored) == 24


def test_a_runner_that_dies_within_a_generation_leaves_what_is_scored(
    share: Callable[[str], None], scored: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = search(take(submit()))
    share(SHARED)
    job_id = submit()
    searching(dying := take(job_id))
    scored.clear()
    finish = chunks.finish

    def die(session: Any, held: Any, scores: Any) -> bool:
        done = finish(session, held, scores)
        if len(scored) == 3:
            session.commit()
            raise Killed
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.chunks, "finish", die)
        with pytest.raises(Killed):
            search(dying)
    assert chunk_count(Chunk.scores.is_not(None)) == 3
    assert search(take(job_id)) == alone
    assert len(scored) == len(set(scored)) == 12


def test_a_chunk_that_a_lost_worker_holds_is_waited_for_and_taken_over(share: Callable[[str], None]) -> None:
    alone = search(take(submit()))
    share(SHARED)
    job_id = submit()
    searching(context := take(job_id))
    publish = chunks.publish

    def lose_one(session: Any, job_id: str, batch: str, environment: str, parts: Any) -> None:
        publish(session, job_id, batch, environment, parts)
        assert chunks.claim(session, job_id, environment, "lost", 0.5) is not None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.chunks, "publish", lose_one)
        assert search(context) == alone


def test_a_runner_that_shall_stop_stops_within_a_generation(share: Callable[[str], None]) -> None:
    alone = search(take(submit()))
    share(SHARED)
    job_id = submit()
    searching(context := take(job_id))

    class Stopping(Console):
        @property
        def stopping(self) -> bool:  # type: ignore[override]
            return chunk_count(Chunk.scores.is_not(None)) >= 2

    context.console = Stopping()
    advance(context, read(job_id))
    assert judged(job_id) == []
    assert chunk_count(Chunk.scores.is_not(None)) == 2
    assert search(take(job_id)) == alone


def test_a_guest_scores_what_the_runner_would_and_writes_nothing_else(share: Callable[[str], None]) -> None:
    alone = search(take(submit()))
    share(SHARED)
    job_id = submit()
    searching(context := take(job_id))
    before = read(job_id)
    guest = Context(Claim(job_id, "guest", 0), get_settings(), Console(), guest=True)
    judge = scoring.scorer(guest, before)
    helped: list[bool] = []
    work = scoring.work

    def let_the_guest_work(_context: Context, _judge: Scorer, pace: scoring.Pace) -> bool:
        helped.append(work(guest, judge, pace))
        return helped[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "work", let_the_guest_work)
        advance(context, before)
    after = read(job_id)
    assert helped == [True] * 6
    assert (after.owner, after.fence, after.environment) == (before.owner, before.fence, before.environment)
    assert judged(job_id) == alone[:6]


def test_parts_are_equal_and_as_long_as_they_shall_take() -> None:
    encodings = [(i,) for i in range(50)]
    for seconds, size in ((0.0, 4), (10.0, 1), (0.4, 2), (0.001, 4)):
        parts = scoring._parts(encodings, seconds)
        assert [one for part in parts for one in part] == encodings
        assert {len(part) for part in parts[:-1]} == {size}
    assert scoring._parts(encodings[:1], 0.0) == [encodings[:1]]


# Real processes from here on.


def processes(module: str) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if f"-m {module}" in " ".join(child.cmdline())]


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_an_evaluator_in_another_environment_refuses_and_is_not_asked_again(share: Callable[[str], None]) -> None:
    searching(context := take(submit()))
    with transaction() as session:
        chunks.publish(session, context.claim.job_id, "b", '{"threads": 99}', [[(0,) * 14]])
    assert evaluate_next("test", lambda: False, jobs_first=False)
    assert not evaluate_next("test", lambda: False, jobs_first=False)
    assert chunk_count(Chunk.fence > 0) == 0


def test_a_supervisor_rings_for_chunks_that_wait_but_not_at_every_beat(
    share: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    searching(context := take(submit()))
    rang: list[str] = []
    monkeypatch.setattr(supervisor.broker, "ring", rang.append)
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as runner:
        watch = supervisor.Watch(runner, get_settings(), lambda session, progress: False)
        assert not watch.beat()
        assert rang == []
        with transaction() as session:
            chunks.publish(session, context.claim.job_id, "b", scoring.environment(context), [[(0,) * 14]])
        watch.beat()
        watch.beat()
    assert rang == [supervisor.broker.EVALUATE]


def test_a_worker_that_takes_jobs_takes_them_first(share: Callable[[str], None]) -> None:
    searching(context := take(submit()))
    with transaction() as session:
        chunks.publish(session, context.claim.job_id, "b", scoring.environment(context), [[(0,) * 14]])
    submit()
    assert not evaluate_next("test", lambda: False, jobs_first=True)
    assert chunk_count(Chunk.fence > 0) == 0


def test_kill_9_of_an_evaluator_and_of_the_runner_within_a_generation_changes_nothing(
    share: Callable[[str], None],
) -> None:
    calm = search(take(submit(60)))
    share(SHARED)
    job_id, stop, taken = submit(60), threading.Event(), threading.Event()

    def loop(look: Callable[[], bool]) -> threading.Thread:
        def work() -> None:
            while not stop.is_set() and read(job_id).state not in TERMINAL:
                if not look():
                    time.sleep(0.05)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    taken.set()
    workers = [loop(lambda: taken.is_set() and supervise_next("jobs", stop.is_set))]
    workers += [loop(lambda: evaluate_next("scores", stop.is_set, jobs_first=False)) for _ in range(2)]
    try:
        until(lambda: chunk_count() > 0)
        taken.clear()
        for runner in processes("workers.runner"):
            runner.kill()
        before = chunk_count(Chunk.scores.is_not(None))
        until(lambda: chunk_count(Chunk.scores.is_not(None)) > before)  # by an evaluator: nobody runs the job
        processes("workers.evaluator")[0].kill()
        taken.set()
        until(lambda: read(job_id).state not in (JobState.QUEUED, JobState.TRAINING, JobState.SEARCHING))
    finally:
        if read(job_id).state not in TERMINAL:
            with transaction() as session:
                jobs.request_cancel(session, job_id)
        stop.set()
        for worker in workers:
            worker.join(60)
    assert judged(job_id) == calm
    assert chunk_count() == 0
