"""One worker at a time may write for a job: the statements that carry that promise, on both databases."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from latency_profiler.durable import STALE_SECONDS
from latency_profiler.errors import NotFound
from service import broker, reconciler
from service.specs import JobRequest, resolve
from service.store import blobs, jobs, pruning_nets
from service.store.jobs import Claim, JobStateConflict, LeaseLost
from service.store.models import Blob, Dataset, Job, JobState
from service.store.session import transaction

LEASE, ATTEMPTS = 30.0, 3
SPEC = resolve(
    JobRequest.model_validate(
        {"space": "mobilenet_v1", "dataset": "tiny", "constraints": [{"metric": "flops", "max": 1_000_000}]}
    ),
    8,
)


@pytest.fixture
def submit(database: str) -> Callable[[], str]:
    with transaction() as session:
        dataset = Dataset(name="tiny", kind="digits", classes=10, train_images=1, test_images=1, image_size=8)
        session.add(dataset)
        session.flush()
        dataset_id = dataset.id

    def one() -> str:
        with transaction() as session:
            return jobs.submit(session, SPEC, space_key="s", dataset_id=dataset_id, created_by=None).id

    return one


def claim(owner: str = "a", lease: float = LEASE) -> Claim | None:
    with transaction() as session:
        return jobs.claim(session, owner, lease, ATTEMPTS)


def take(owner: str = "a", lease: float = LEASE) -> Claim:
    taken = claim(owner, lease)
    assert taken is not None
    return taken


def save(held: Claim, **changes: Any) -> None:
    with transaction() as session:
        jobs.save_step(session, held, **changes)


def read(job_id: str) -> Job:
    with transaction() as session:
        return jobs.get(session, job_id)


def test_a_claim_takes_the_oldest_job_and_nobody_else_gets_it(submit: Callable[[], str]) -> None:
    first, second = submit(), submit()
    assert [take("a").job_id, take("b").job_id] == [first, second]
    assert claim("c") is None


def test_an_expired_lease_passes_to_the_next_worker_and_the_old_one_can_not_write(submit: Callable[[], str]) -> None:
    job_id = submit()
    old = take("a", lease=0.01)
    time.sleep(0.05)
    new = take("b")
    assert (new.job_id, new.fence) == (job_id, old.fence + 1)
    for write in (
        lambda: save(old, memory={"from": "a"}),
        lambda: jobs_call(jobs.beat, old, LEASE),
        lambda: jobs_call(jobs.finish, old, JobState.SUCCEEDED),
        lambda: jobs_call(jobs.release, old),
    ):
        with pytest.raises(LeaseLost):
            write()
    save(new, memory={"from": "b"})
    assert read(job_id).memory == {"from": "b"}
    assert read(job_id).state is JobState.QUEUED


def jobs_call(function: Callable[..., Any], *arguments: Any) -> Any:
    with transaction() as session:
        return function(session, *arguments)


def test_the_same_owner_under_an_old_fence_is_refused(submit: Callable[[], str]) -> None:
    submit()
    old = take("a", lease=0.01)
    time.sleep(0.05)
    take("a")
    with pytest.raises(LeaseLost):
        save(old, memory={})


def test_a_refused_step_leaves_nothing_of_its_transaction(submit: Callable[[], str]) -> None:
    job_id = submit()
    old = take("a", lease=0.01)
    time.sleep(0.05)
    take("b")
    with pytest.raises(LeaseLost), transaction() as session:
        jobs.add_event(session, job_id, "generation", {"generation": 0})
        jobs.save_step(session, old, memory={})
    with transaction() as session:
        assert [event.kind for event in jobs.events_after(session, job_id, 0)] == ["state"]


def test_beats_keep_a_job(submit: Callable[[], str]) -> None:
    job_id = submit()
    held = take("a", lease=3.0)
    until = read(job_id).lease_until
    assert jobs_call(jobs.beat, held, 2 * LEASE, {"done": 1}) is False
    assert (read(job_id).lease_until or 0.0) > (until or 0.0) + LEASE
    assert claim("b") is None


def test_a_job_that_costs_its_workers_ends_as_failed_with_the_reason(submit: Callable[[], str]) -> None:
    job_id = submit()
    for _ in range(ATTEMPTS):
        jobs_call(jobs.lose, take(), "the runner ended with SIGKILL", 0.0)
    assert claim() is None
    job = read(job_id)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert "SIGKILL" in job.error["detail"]


def test_a_finished_step_and_a_release_forgive_earlier_losses(submit: Callable[[], str]) -> None:
    job_id = submit()
    for _ in range(ATTEMPTS - 1):
        jobs_call(jobs.lose, take(), "lost", 0.0)
    save(held := take(), progress={"done": 1})
    assert (read(job_id).attempts, read(job_id).error) == (0, None)
    jobs_call(jobs.release, held, 0.0)
    assert take().job_id == job_id


def test_what_is_noted_before_the_work_is_done_leaves_the_attempt_counted(submit: Callable[[], str]) -> None:
    """Or a job that ends its runner would be tried for ever."""
    job_id = submit()
    for at in range(ATTEMPTS):
        jobs_call(lambda session, held, at=at: jobs.note(session, held, memory={"at": at}), held := take())
        jobs_call(jobs.lose, held, "lost", 0.0)
    assert claim() is None
    assert (read(job_id).state, read(job_id).memory) == (JobState.FAILED, {"at": ATTEMPTS - 1})


def test_an_excused_attempt_does_not_count_however_it_ends(submit: Callable[[], str]) -> None:
    job_id = submit()
    for _ in range(2 * ATTEMPTS):
        jobs_call(jobs.excuse, held := take())
        jobs_call(jobs.lose, held, "told to stop", 0.0)
    save(held := take())
    jobs_call(jobs.excuse, held)
    assert read(job_id).attempts == 0


def test_a_released_job_waits_until_it_is_woken(submit: Callable[[], str]) -> None:
    job_id = submit()
    held = take()
    save(held, state=JobState.VERIFYING)
    jobs_call(jobs.release, held, 1000.0)
    assert claim() is None
    assert jobs_call(jobs.wake, (JobState.PROFILING,)) == 0
    assert jobs_call(jobs.wake, (JobState.VERIFYING,)) == 1
    assert take().job_id == job_id


def test_cancelling_ends_an_idle_job_at_once_and_twice_is_once(submit: Callable[[], str]) -> None:
    job_id = submit()
    assert jobs_call(jobs.request_cancel, job_id).state is JobState.CANCELLED
    assert jobs_call(jobs.request_cancel, job_id).state is JobState.CANCELLED
    assert claim() is None


@pytest.mark.parametrize("sweep", [reconciler.reconcile, None])
def test_a_cancelled_job_of_a_worker_that_vanished_ends(submit: Callable[[], str], sweep: Any) -> None:
    gone, held = submit(), submit()
    take("a", lease=0.2)
    take("b")
    for job_id in (gone, held):
        assert jobs_call(jobs.request_cancel, job_id).state is JobState.QUEUED
    first = read(gone).cancel_requested_at
    time.sleep(0.3)
    sweep() if sweep else jobs_call(jobs.request_cancel, gone)
    assert (read(gone).state, read(gone).cancel_requested_at) == (JobState.CANCELLED, first)
    assert read(held).state is JobState.QUEUED, "its worker will hear of it"


GIVE_BACK = pytest.mark.parametrize(
    "give_back", [jobs.release, lambda session, held: jobs.lose(session, held, "lost", 60.0)], ids=["released", "lost"]
)


@GIVE_BACK
def test_a_job_that_is_given_back_is_written_to_no_more(submit: Callable[[], str], give_back: Any) -> None:
    submit()
    held = take()
    jobs_call(give_back, held)
    with pytest.raises(LeaseLost):
        save(held, memory={"from": "the dead"})


@GIVE_BACK
def test_a_cancelled_job_that_is_given_back_has_ended(submit: Callable[[], str], give_back: Any) -> None:
    job_id = submit()
    held = take()
    jobs_call(jobs.request_cancel, job_id)
    jobs_call(give_back, held)
    assert (read(job_id).state, read(job_id).error) == (JobState.CANCELLED, None)


def test_as_many_bells_lie_in_the_queue_as_jobs_wait(submit: Callable[[], str]) -> None:
    with broker.app.connection_for_write() as connection:
        connection.default_channel.queue_declare(broker.JOBS)
        connection.default_channel.queue_purge(broker.JOBS)
    assert reconciler.reconcile() == broker.unheard() == 0
    submit()
    submit()
    for _ in range(3):
        assert reconciler.reconcile() == broker.unheard() == 2


def test_files_that_nobody_has_registered_go_after_a_day(
    submit: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders, and what another user owns, stay and hinder nothing."""
    submit()
    kept, lost, foreign, young = map(keep_file, (b"kept", b"lost", b"foreign", b"young"))
    jobs_call(blobs.register, kept.name)
    beside = [lost.parent / name for name in ("a", "b", "c")]
    for path in beside:
        path.mkdir(exist_ok=True)
    for path in (kept, lost, foreign, *beside):
        os.utime(path, (0, time.time() - 2 * STALE_SECONDS))
    unlink, asked = Path.unlink, list[Path]()

    def refusing(path: Path, missing_ok: bool = False) -> None:
        asked.append(path)
        if path != lost:
            raise PermissionError(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    assert jobs_call(blobs.sweep) == 1
    assert {lost, foreign} <= set(asked)
    assert not {kept, young, *beside} & set(asked)
    assert not lost.exists()


def test_two_may_register_the_same_file_at_once(submit: Callable[[], str]) -> None:
    submit()
    sha256 = keep_file(b"of both").name
    other = Thread(target=jobs_call, args=(blobs.register, sha256))
    with transaction() as session:
        blobs.register(session, sha256)
        session.flush()
        other.start()
        other.join(0.3)
    other.join(10)
    with transaction() as session:
        assert session.get_one(Blob, sha256).bytes == len(b"of both")


def keep_file(content: bytes) -> Path:
    path = blobs.blob_path(hashlib.sha256(content).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def keep_checkpoint(held: Claim, content: bytes) -> Path:
    path = keep_file(content)
    with transaction() as session:
        blobs.register(session, path.name)
        jobs.save_step(session, held, memory={"checkpoint": {"sha256": path.name, "counters": {}}})
    return path


def told(job_id: str) -> list[tuple[str, Any]]:
    with transaction() as session:
        return [(event.kind, event.data) for event in jobs.events_after(session, job_id, 0)]


def test_of_progress_only_the_newest_is_kept(submit: Callable[[], str]) -> None:
    job_id, other = submit(), submit()
    held, others = take(), take("b")
    jobs_call(jobs.beat, others, LEASE, {"done": 7})
    for done in range(3):
        jobs_call(jobs.beat, held, LEASE, {"done": done})
        jobs_call(jobs.beat, held, LEASE)
    assert told(job_id) == [("state", {"state": "queued"}), ("progress", {"done": 2})]
    assert told(other)[1:] == [("progress", {"done": 7})]
    assert read(job_id).progress == {"done": 2}


def test_events_of_a_job_are_left_one_after_the_other(submit: Callable[[], str]) -> None:
    """A follower that has seen one number would never ask for a lower one that is committed later."""
    job_id = submit()
    held = take()
    beats = Thread(target=jobs_call, args=(jobs.beat, held, LEASE, {"done": 1}))
    with transaction() as session:
        jobs.add_event(session, job_id, "warning", {})
        session.flush()
        beats.start()
        beats.join(0.5)
        assert beats.is_alive(), "it waits"
    beats.join(30)
    assert [kind for kind, _ in told(job_id)] == ["state", "warning", "progress"]


@pytest.mark.parametrize("end", ["cancelled", "failed", "its file is lost"])
def test_a_job_that_ends_takes_its_checkpoint_with_it(submit: Callable[[], str], end: str) -> None:
    job_id = submit()
    held = take()
    path = keep_checkpoint(held, end.encode())
    if end == "its file is lost":
        path.unlink()
    if end == "failed":
        jobs_call(jobs.finish, held, JobState.FAILED)
    else:
        jobs_call(jobs.release, held)
        jobs_call(jobs.request_cancel, job_id)
    assert not path.exists()
    with transaction() as session:
        assert session.get(Blob, path.name) is None


def test_a_checkpoint_that_is_also_a_pruning_net_stays(submit: Callable[[], str]) -> None:
    job_id = submit()
    held = take()
    path = keep_checkpoint(held, b"shared")
    with transaction() as session:
        about = {"family": "f", "space_key": "s", "dataset_id": session.get_one(Job, job_id).dataset_id}
        pruning_nets.join(session, "net", job_id, settings={}, band_low=0.0, band_high=1.0, **about)
        pruning_nets.save(session, "net", checkpoint=path.name, progress={}, ready=False)
    jobs_call(jobs.finish, held, JobState.FAILED)
    assert (read(job_id).state, path.exists()) == (JobState.FAILED, True)


def test_a_cancellation_wins_over_a_finish_that_comes_later(submit: Callable[[], str]) -> None:
    job_id = submit()
    held = take()
    assert jobs_call(jobs.request_cancel, job_id).state is JobState.QUEUED
    assert jobs_call(jobs.beat, held, LEASE) is True
    jobs_call(jobs.finish, held, JobState.SUCCEEDED)
    assert read(job_id).state is JobState.CANCELLED


def test_a_cancelled_job_whose_worker_died_ends_at_the_next_look(submit: Callable[[], str]) -> None:
    job_id = submit()
    take(lease=0.01)
    jobs_call(jobs.request_cancel, job_id)
    time.sleep(0.05)
    assert claim() is None
    assert read(job_id).state is JobState.CANCELLED


def test_a_cancelled_job_whose_worker_is_lost_ends_at_once(submit: Callable[[], str]) -> None:
    job_id = submit()
    take(lease=0.01)
    time.sleep(0.05)
    assert jobs_call(jobs.request_cancel, job_id).state is JobState.CANCELLED


def test_an_ended_job_never_changes(submit: Callable[[], str]) -> None:
    job_id = submit()
    held = take()
    jobs_call(jobs.finish, held, JobState.SUCCEEDED)
    with pytest.raises(LeaseLost):
        save(held, state=JobState.SEARCHING)
    with pytest.raises(JobStateConflict):
        jobs_call(jobs.request_cancel, job_id)
    assert read(job_id).state is JobState.SUCCEEDED
    assert claim() is None


def test_states_leave_events_from_which_the_seconds_are_read(submit: Callable[[], str]) -> None:
    job_id = submit()
    held = take()
    save(held, state=JobState.TRAINING)
    time.sleep(0.1)
    save(held, state=JobState.SEARCHING)
    save(held, state=JobState.SEARCHING)
    jobs_call(jobs.finish, held, JobState.SUCCEEDED)
    with transaction() as session:
        states = [event.data["state"] for event in jobs.events_after(session, job_id, 0)]
        seconds = jobs.phase_seconds(session, job_id)
    assert states == ["queued", "training", "searching", "succeeded"]
    assert seconds["training"] >= 0.09, "the clock of SQLite counts milliseconds"
    assert set(seconds) == {"queued", "training", "searching"}


def test_unknown_jobs_are_not_found(submit: Callable[[], str]) -> None:
    with pytest.raises(NotFound):
        read("nothing")
