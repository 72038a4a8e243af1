"""Real processes and real signals: what a killed, stopped, hung or cancelled runner costs."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from safetensors import SafetensorError
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from latency_profiler.errors import InfeasibleConstraint
from service.settings import get_settings
from service.specs import JobRequest, resolve
from service.store import chunks, jobs
from service.store.chunks import ChunkClaim
from service.store.jobs import Claim, LeaseLost
from service.store.models import TERMINAL, Candidate, Dataset, Job, JobState, PruningNet, Result, clock, new_id
from service.store.session import transaction
from workers import runner
from workers.parallel import ALONE
from workers.steps.outcome import ENDED, FOR_DEVICE, Outcome
from workers.supervisor import Watch, evaluate_next, supervise_next

KEY = "mobilenet_v1@8x0.1/10+last"


@pytest.fixture
def submit(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    monkeypatch.setenv("SECATEURS_THREADS", "1")
    monkeypatch.setenv("SECATEURS_BEAT_SECONDS", "0.2")
    monkeypatch.setenv("SECATEURS_LEASE_SECONDS", "5")
    get_settings.cache_clear()
    with transaction() as session:
        dataset_id = session.scalar(select(Dataset.id).where(Dataset.name == "digits"))
        if dataset_id is None:
            facts = {"classes": 10, "train_images": 1437, "test_images": 360, "image_size": 8}
            session.add(row := Dataset(name="digits", kind="digits", **facts))
            session.flush()
            dataset_id = row.id

    def one(epochs: int = 3, **fields: object) -> str:
        request = {
            "space": "mobilenet_v1", "width": 0.1, "image_size": 8, "dataset": "digits", "effort": "smoke",
            "constraints": [{"metric": "flops", "max": 25_000}], "search": {"generations": 3, "population": 6},
            "training": {"epochs": epochs, "validation_images": 100}, "retraining": {"epochs": 3}, **fields,
        }  # fmt: skip
        spec = resolve(JobRequest.model_validate(request), 8)
        with transaction() as session:
            return jobs.submit(session, spec, space_key=KEY, dataset_id=dataset_id, created_by=None).id

    yield one
    assert not runners()


def runners() -> list[psutil.Process]:
    """Runner processes that this test's processes have started."""
    return [
        child for child in psutil.Process().children(recursive=True) if "workers.runner" in " ".join(child.cmdline())
    ]


def read(job_id: str) -> Job:
    with transaction() as session:
        return jobs.get(session, job_id)


def claimed() -> Claim:
    with transaction() as session:
        claim = jobs.claim(session, "worker", 30, 3)
    assert claim is not None
    return claim


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def work(job_id: str, rounds: int = 1000) -> threading.Thread:
    """A worker in a thread, which looks for jobs until this one has ended."""

    def loop() -> None:
        for _ in range(rounds):
            if read(job_id).state in TERMINAL:
                return
            if not supervise_next("test", lambda: False):
                time.sleep(0.1)

    thread = threading.Thread(target=loop)
    thread.start()
    return thread


def fate(job_id: str) -> list[tuple[object, ...]]:
    with transaction() as session:
        order = (Candidate.generation, Candidate.position)
        judged = session.execute(
            select(Candidate.encoding_key, Candidate.proxy_accuracy, Candidate.proxy_loss, Candidate.birth)
            .where(Candidate.job_id == job_id)
            .order_by(*order)
        ).all()
        trained = session.execute(
            select(Result.structure_id, Result.test_accuracy, Result.test_loss, Result.weights)
            .where(Result.job_id == job_id)
            .order_by(Result.role)
        ).all()
        return [tuple(row) for row in [*judged, *trained]]


def test_kill_9_of_the_runner_in_every_phase_changes_nothing(submit: Callable[..., str]) -> None:
    calm = submit(seed=1)
    work(calm).join(120)
    assert read(calm).state is JobState.SUCCEEDED
    expected = fate(calm)
    forget_net()

    rough = submit(seed=1)
    worker = work(rough)
    killed = set()
    for state in (JobState.TRAINING, JobState.SEARCHING, JobState.RETRAINING):
        until(lambda state=state: read(rough).state is state and bool(runners()))
        for process in runners():
            process.kill()
        killed.add(state)
    worker.join(120)
    assert len(killed) == 3
    assert read(rough).state is JobState.SUCCEEDED
    assert read(rough).reproducible
    assert fate(rough) == expected


def forget_net() -> None:
    """Let the next job train everything itself."""
    with transaction() as session:
        session.execute(update(PruningNet).values(family="forgotten", key=new_id()))
        session.execute(update(Result).values(recipe=None))


def test_cancel_stops_a_running_job_within_seconds(submit: Callable[..., str]) -> None:
    job_id = submit(epochs=500)
    worker = work(job_id)
    until(lambda: read(job_id).state is JobState.TRAINING and bool(read(job_id).progress))
    asked = time.monotonic()
    with transaction() as session:
        jobs.request_cancel(session, job_id)
    worker.join(20)
    assert read(job_id).state is JobState.CANCELLED
    assert time.monotonic() - asked < 5
    assert not runners()


def test_a_hung_runner_is_killed_and_costs_an_attempt(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEURS_STALL_SECONDS", "20")
    get_settings.cache_clear()
    job_id = submit(epochs=500)
    thread = threading.Thread(target=supervise_next, args=("test", lambda: False))
    thread.start()
    until(lambda: bool(read(job_id).progress))
    runners()[0].suspend()
    thread.join(90)
    job = read(job_id)
    assert job.owner is None
    assert job.error is not None
    assert "no progress" in job.error["detail"]


def test_each_claim_of_a_worker_has_a_name_of_its_own_and_what_is_printed_does_no_harm(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the beats of the second claim would keep the leases of chunks that the first one's dead runner held."""
    owners = list[str]()

    def started(module: str, job_id: str, owner: str, fence: str) -> subprocess.Popen[bytes]:
        owners.append(owner)
        says = ["sh", "-c", 'echo "a library prints"; echo 7; echo "{\\"phase\\": \\"training\\"}"; sleep 1']
        return subprocess.Popen(says, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)

    monkeypatch.setattr("workers.supervisor._started", started)
    job_id = submit()
    for _ in range(2):
        assert supervise_next("worker", lambda: False)
        assert read(job_id).progress == {"phase": "training"}
        with transaction() as session:
            session.execute(update(Job).values(lease_until=1.0))
    assert len(set(owners)) == 2


def test_a_runner_outlives_a_database_that_is_away_for_a_moment(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    context = SimpleNamespace(claim=claimed(), console=runner.Silence(), team=ALONE, kept={"trainer": "ahead"})
    away = [OperationalError("", None, Exception("gone")), PoolTimeout()]
    held = list[dict[str, str]]()

    def advance(_context: object, job: Job) -> Outcome:
        assert job.id == job_id
        held.append(dict(context.kept))
        if away:
            raise away.pop()
        return ENDED

    monkeypatch.setattr(runner, "advance", advance)
    monkeypatch.setattr(runner, "POLL", 0.01)
    runner._run(context)  # type: ignore[arg-type]
    assert held == [{"trainer": "ahead"}, {}, {}], "what is kept in memory may be ahead of what is stored"
    away.append(PoolTimeout())
    context.team = object()
    with pytest.raises(PoolTimeout):
        runner._run(context)  # type: ignore[arg-type]


def test_a_runner_that_waits_for_long_gives_its_job_back(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    context = SimpleNamespace(claim=claimed(), console=runner.Silence(), team=ALONE, kept={})
    waits = iter([FOR_DEVICE] * 10)
    monkeypatch.setattr(runner, "advance", lambda *_: next(waits))
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(runner, "PATIENCE", 0.02)
    runner._run(context)  # type: ignore[arg-type]
    job = read(job_id)
    assert (job.owner, job.run_after - job.updated_at) == (None, pytest.approx(FOR_DEVICE.wait, abs=1))
    assert len(list(waits)) == 7, "it looked twice more before it did"


def test_leases_that_can_not_be_renewed_are_lost_before_they_end(submit: Callable[..., str]) -> None:
    def away(*_: object) -> bool:
        raise OperationalError("", None, Exception("gone"))

    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as process:
        watch = Watch(process, get_settings(), away)
        assert not watch.beat()
        watch.renewed -= get_settings().lease_seconds
        with pytest.raises(LeaseLost):
            watch.beat()


@pytest.mark.parametrize(
    "supervise", [supervise_next, lambda worker, stopping: evaluate_next(worker, stopping, jobs_first=False)]
)
def test_chunks_of_a_runner_that_died_are_given_back(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, supervise: Callable[..., bool]
) -> None:
    job_id, held = submit(), list[ChunkClaim | None]()

    def started(*about: str) -> subprocess.Popen[bytes]:
        owner = next(one for one in about if one.startswith("worker:"))
        with transaction() as session:
            held.append(chunks.claim(session, job_id, "{}", owner, 1000.0))
        return subprocess.Popen(["false"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)

    monkeypatch.setattr("workers.supervisor._started", started)
    with transaction() as session:
        chunks.publish(session, job_id, "batch", "{}", [[(0, 1)]])
    assert supervise("worker", lambda: False)
    assert [one and one.encodings for one in held] == [[(0, 1)]]
    with transaction() as session:
        assert chunks.waiting(session) == [(job_id, "{}")]


def test_nothing_outlives_a_killed_supervisor(submit: Callable[..., str], tmp_path: Path) -> None:
    job_id = submit(epochs=500)
    code = "from workers.supervisor import supervise_next; supervise_next('test', lambda: False)"
    supervisor = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: bool(read(job_id).progress))
    [runner] = runners()
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    until(lambda: not psutil.pid_exists(runner.pid) or runner.status() == psutil.STATUS_ZOMBIE, 5)
    assert read(job_id).owner is not None
    with transaction() as session:
        session.get_one(Job, job_id).cancel_requested_at = 1.0


def test_a_worker_that_stops_gives_its_job_back_with_its_progress(submit: Callable[..., str]) -> None:
    job_id = submit(epochs=500)
    stop = threading.Event()
    thread = threading.Thread(target=supervise_next, args=("test", stop.is_set))
    thread.start()
    until(lambda: bool(read(job_id).progress))
    stop.set()
    thread.join(20)
    job = read(job_id)
    assert (job.owner, job.attempts, job.state) == (None, 0, JobState.TRAINING)
    assert job.progress["done"] > 0


def test_a_worker_that_stops_before_its_runner_listens_costs_no_attempt(submit: Callable[..., str]) -> None:
    job_id = submit()
    assert supervise_next("test", lambda: True)
    job = read(job_id)
    assert (job.owner, job.attempts, job.state, job.error) == (None, 0, JobState.QUEUED, None)


def run_failing(monkeypatch: pytest.MonkeyPatch, claim: Claim, error: Exception) -> int:
    """The exit code of a runner whose job ends with an error."""

    def fail(_context: object) -> None:
        raise error

    for name, stand_in in {"_run": fail, "die_with": lambda parent: True, "Console": runner.Silence}.items():
        monkeypatch.setattr(runner, name, stand_in)
    monkeypatch.setattr(runner, "Context", lambda *_, **__: None)
    return runner.main(claim.job_id, claim.owner, str(claim.fence), "0")


def test_what_is_wrong_with_a_job_itself_ends_it_with_all_that_is_known(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, error = submit(), InfeasibleConstraint("flops", 1.0, 2.0, 3.0)
    assert run_failing(monkeypatch, claimed(), error) == 0
    facts = {"metric": "flops", "asked": 1.0, "smallest": 2.0, "largest": 3.0}
    job = read(job_id)
    assert (job.state, job.error) == (
        JobState.FAILED, {"title": "InfeasibleConstraint", "detail": str(error), **facts},
    )  # fmt: skip


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "attempts", "wait"),
    [
        (ValueError("odd"), 1, runner.LOST_SECONDS),
        (OSError(errno.ENOSPC, FULL), 0, runner.FULL_SECONDS),
        (SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"), 0, runner.FULL_SECONDS),
    ],
)
def test_what_a_runner_cannot_go_on_from_is_told_and_a_full_disk_is_waited_for(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int, wait: float
) -> None:
    job_id, claim = submit(), claimed()
    assert run_failing(monkeypatch, claim, error) == 1
    job = read(job_id)
    assert (job.owner, job.attempts) == (None, attempts)
    assert (job.error or {})["detail"] == f"{type(error).__name__}: {error}"
    with transaction() as session:
        assert job.run_after - clock(session) == pytest.approx(wait, abs=1.5)


def members() -> dict[str, psutil.Process]:
    """The training processes that torchrun has started, by their number."""
    found = {}
    for process in runners():
        with suppress(psutil.Error):
            found[process.environ().get("RANK", "launcher")] = process
    return found


@pytest.mark.timeout(1200)  # nine processes import torch
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)  # what is tested here is the same on both kinds
def test_two_processes_train_a_job_and_the_death_of_one_changes_nothing(
    submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEURS_TRAINING_PROCESSES", "2")
    get_settings.cache_clear()
    calm = submit(seed=1)
    worker = work(calm)
    until(lambda: read(calm).state is JobState.TRAINING and members().keys() == {"launcher", "0", "1"}, 300)
    worker.join(400)
    assert read(calm).state is JobState.SUCCEEDED
    environment = read(calm).environment
    assert environment is not None
    assert environment["processes"] == 2
    assert not runners()
    expected = fate(calm)
    forget_net()

    rough = submit(seed=1)
    worker = work(rough)
    for number, state in (("1", JobState.TRAINING), ("0", JobState.RETRAINING)):
        until(lambda state=state, number=number: read(rough).state is state and number in members(), 300)
        before = {process.pid for process in members().values()}
        members()[number].kill()
        until(lambda before=before: not any(psutil.pid_exists(pid) for pid in before))
    worker.join(400)
    assert read(rough).state is JobState.SUCCEEDED
    assert read(rough).reproducible
    assert fate(rough) == expected


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)  # what is tested here is the same on both kinds
def test_two_processes_end_with_their_worker(submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEURS_TRAINING_PROCESSES", "2")
    get_settings.cache_clear()
    job_id = submit(epochs=500)
    stop = threading.Event()
    thread = threading.Thread(target=supervise_next, args=("test", stop.is_set))
    thread.start()
    until(lambda: bool(read(job_id).progress), 300)
    stop.set()
    thread.join(120)
    job = read(job_id)
    assert (job.owner, job.attempts, job.state) == (None, 0, JobState.TRAINING)
    assert job.progress["done"] > 0
