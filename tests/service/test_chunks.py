"""A chunk is scored by one worker at a time, counts once, and goes with its generation or its job."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select

from service.specs import JobRequest, resolve
from service.store import chunks, jobs
from service.store.chunks import ChunkClaim
from service.store.jobs import Claim
from service.store.models import Chunk, Dataset, JobState
from service.store.session import transaction

HERE, ELSEWHERE = '{"threads": 1}', '{"threads": 2}'
LEASE = 30.0
PARTS = [[(0, 1), (2, 3)], [(4, 5)], [(6, 7)]]
SPEC = resolve(
    JobRequest.model_validate(
        {"space": "mobilenet_v1", "dataset": "tiny", "constraints": [{"metric": "flops", "max": 1_000_000}]}
    ),
    8,
)


def within(function: Callable[..., Any], *arguments: Any) -> Any:
    with transaction() as session:
        return function(session, *arguments)


@pytest.fixture
def job(database: str) -> Claim:
    """A claimed job."""
    with transaction() as session:
        dataset = Dataset(name="tiny", kind="digits", classes=10, train_images=1, test_images=1, image_size=8)
        session.add(dataset)
        session.flush()
        jobs.submit(session, SPEC, space_key="s", dataset_id=dataset.id, created_by=None)
    claim: Claim = within(jobs.claim, "runner", LEASE, 3)
    return claim


def publish(job: Claim, batch: str = "b", parts: list[list[tuple[int, int]]] = PARTS) -> None:
    within(chunks.publish, job.job_id, batch, HERE, parts)


def take(job: Claim, owner: str = "a", lease: float = LEASE) -> ChunkClaim:
    held = within(chunks.claim, job.job_id, HERE, owner, lease)
    assert isinstance(held, ChunkClaim)
    return held


def count() -> int:
    return int(within(lambda session: session.scalar(select(func.count()).select_from(Chunk))))


def test_publishing_again_keeps_the_parts_and_what_is_done_of_them(job: Claim) -> None:
    publish(job)
    assert within(chunks.finish, take(job), [(0.5, 1.0), (0.25, 2.0)])
    publish(job, parts=[[(0, 1)], [(2, 3)], [(4, 5)], [(6, 7)]])
    assert count() == 3
    assert within(chunks.undone, job.job_id, "b") == 2
    assert within(chunks.scores, job.job_id, "b") == {(0, 1): (0.5, 1.0), (2, 3): (0.25, 2.0)}


def test_another_generation_takes_the_place_of_the_one_before(job: Claim) -> None:
    publish(job)
    publish(job, batch="c", parts=[[(8, 9)]])
    assert count() == 1
    assert take(job).encodings == [(8, 9)]


def test_each_chunk_is_held_by_one_worker_in_the_order_of_the_generation(job: Claim) -> None:
    publish(job)
    assert [take(job, owner).encodings for owner in "abc"] == PARTS
    assert within(chunks.claim, job.job_id, HERE, "d", LEASE) is None


def test_many_workers_at_once_never_hold_the_same_chunk(job: Claim) -> None:
    publish(job, parts=[[(i, i)] for i in range(24)])

    def work(owner: str) -> list[tuple[int, ...]]:
        found = []
        while (held := within(chunks.claim, job.job_id, HERE, owner, LEASE)) is not None:
            assert within(chunks.finish, held, [(0.5, float(held.id))])
            found += held.encodings
        return found

    with ThreadPoolExecutor(4) as pool:
        taken = [one for found in pool.map(work, "abcd") for one in found]
    # A claim may skip rows that others are just claiming; what was skipped is there for the next look.
    taken += work("e")
    assert sorted(taken) == [(i, i) for i in range(24)]
    assert within(chunks.undone, job.job_id, "b") == 0


def test_a_worker_in_another_environment_gets_nothing(job: Claim) -> None:
    publish(job)
    assert within(chunks.claim, job.job_id, ELSEWHERE, "a", LEASE) is None
    assert within(chunks.waiting) == [(job.job_id, HERE)]


def test_a_lost_chunk_passes_on_after_its_lease_and_the_lost_worker_s_scores_are_refused(job: Claim) -> None:
    publish(job, parts=PARTS[1:2])
    lost = take(job, "a", lease=0.01)
    time.sleep(0.05)
    held = take(job, "b")
    assert (held.id, held.fence) == (lost.id, lost.fence + 1)
    assert not within(chunks.finish, lost, [(0.0, 0.0)])
    assert within(chunks.finish, held, [(0.5, 1.0)])
    assert not within(chunks.finish, held, [(0.0, 0.0)])
    assert within(chunks.scores, job.job_id, "b") == {(4, 5): (0.5, 1.0)}


def test_the_same_owner_under_an_old_fence_is_refused(job: Claim) -> None:
    publish(job, parts=PARTS[1:2])
    lost = take(job, "a", lease=0.01)
    time.sleep(0.05)
    take(job, "a")
    assert not within(chunks.finish, lost, [(0.0, 0.0)])


def test_renewed_leases_hold_and_released_ones_do_not(job: Claim) -> None:
    publish(job, parts=PARTS[1:2])
    take(job, "a", lease=0.1)
    within(chunks.renew, "a", LEASE)
    time.sleep(0.2)
    assert within(chunks.waiting) == []
    within(chunks.release, "b")
    assert within(chunks.waiting) == []
    within(chunks.release, "a")
    assert take(job, "b").encodings == PARTS[1]


def test_scores_come_back_bit_for_bit(job: Claim) -> None:
    scores = [(math.nextafter(0.1, 1), 1e9), (1 / 3, math.nextafter(2.3, 0))]
    publish(job)
    assert within(chunks.finish, take(job), scores)
    assert list(within(chunks.scores, job.job_id, "b").values()) == scores


def test_each_encoding_needs_a_score(job: Claim) -> None:
    publish(job)
    held = take(job)
    with pytest.raises(ValueError, match="2 encodings, got 1"):
        within(chunks.finish, held, [(0.5, 1.0)])


def test_chunks_go_when_their_generation_is_told(job: Claim) -> None:
    publish(job)
    held = take(job)
    within(chunks.drop, job.job_id)
    assert count() == 0
    assert not within(chunks.finish, held, [(0.5, 1.0), (0.5, 1.0)])


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_chunks_never_outlive_their_job(job: Claim, state: JobState) -> None:
    publish(job)
    within(jobs.finish, job, state)
    assert count() == 0


def test_chunks_outlive_their_job_s_worker(job: Claim) -> None:
    publish(job)
    within(chunks.finish, take(job), [(0.5, 1.0), (0.25, 2.0)])
    within(jobs.lose, job, "killed", 0.0)
    assert within(jobs.claim, "another", LEASE, 3).fence == job.fence + 1
    assert len(within(chunks.scores, job.job_id, "b")) == 2
