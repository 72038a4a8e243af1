"""PruningNets and trained networks of whole jobs: which are taken over, which are waited for, which are made again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from latency_profiler.errors import InvalidDataset
from latency_profiler.spaces.registry import get_space
from service import images
from service.settings import get_settings
from service.store import blobs, jobs, results
from service.store.models import JobState, PruningNet
from service.store.session import transaction
from tests.workers.whole_jobs import SPACE, Console, Killed, flops_bound, forget, read, run, submit, take
from workers import checkpoints
from workers.steps import training
from workers.steps.advance import advance
from workers.steps.context import Context
from workers.steps.recipe import recipe
from workers.training import TrainingSettings

pytestmark = pytest.mark.parametrize("database", ["postgresql"], indirect=True)
"""What is decided here asks no database in a way of its own; lives of jobs are tried on both."""


def test_the_next_job_reuses_the_pruning_net_and_only_searches(world: None) -> None:
    first = run(submit(flops_bound(0.4)))
    second = run(submit(flops_bound(0.3)))
    other_seed = run(submit(flops_bound(0.3), seed=1))
    reused = [job.result["pruning_net_reused"] for job in (first, second, other_seed) if job.result]
    assert reused == [False, True, False]
    assert first.result is not None
    assert second.result is not None
    assert first.result["pruning_net"] == second.result["pruning_net"]


def test_a_pruning_net_of_another_code_of_other_images_or_another_band_is_not_taken_over(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(submit(flops_bound(0.4)))
    wider = run(submit(flops_bound(0.4), training={"band": [0.3, 1.7]}))
    monkeypatch.setattr("workers.steps.training.CODE", "another version")
    newer = run(submit(flops_bound(0.4)))
    load = images.load
    monkeypatch.setattr(images, "load", lambda *about: replace(load(*about), digest="others"))
    changed = run(submit(flops_bound(0.4)))
    assert [job.result["pruning_net_reused"] for job in (first, wider, newer, changed) if job.result] == [False] * 4
    assert [job.result["uniform"]["reused"] for job in (first, wider, newer, changed) if job.result] == [
        False, True, True, False,
    ]  # fmt: skip


def test_what_could_give_other_bits_is_not_taken_over(world: None) -> None:
    """Trained networks of another seed, and PruningNets of another space whose layers have the same names."""
    context = Context(take(submit(flops_bound(0.4))), get_settings(), Console())
    settings = TrainingSettings.of(context.spec.retraining.model_dump())
    family, trained = training._family(context), recipe(context, SPACE.channels(SPACE.largest), settings)
    assert trained == recipe(context, SPACE.channels(SPACE.largest), settings)
    context.__dict__["space"] = get_space("mobilenet_v1", 8, 0.2, 10, free_last=True)
    assert training._family(context) != family
    context.__dict__["space"] = SPACE
    context.spec = context.spec.model_copy(update={"seed": 1})
    assert recipe(context, SPACE.channels(SPACE.largest), settings) != trained


def test_a_pruning_net_of_another_environment_makes_a_job_not_reproducible(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(submit(flops_bound(0.4)))
    again = run(submit(flops_bound(0.4)))
    monkeypatch.setenv("SECATEURS_THREADS", "2")
    get_settings.cache_clear()
    elsewhere = run(submit(flops_bound(0.4)))
    for job, alike in ((again, True), (elsewhere, False)):
        assert job.result is not None
        assert (job.result["pruning_net_reused"], job.reproducible) == (True, alike)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
def test_files_that_are_lost_or_damaged_are_made_again(world: None, damage: Callable[[Path], Any]) -> None:
    first = run(submit(flops_bound(0.4)))
    assert first.result is not None
    with transaction() as session:
        checkpoint = session.get_one(PruningNet, first.result["pruning_net"]).checkpoint
        weights = [row.weights for row in results.of_job(session, first.id)]
    for sha256 in (checkpoint, *weights):
        assert sha256 is not None
        damage(blobs.blob_path(sha256))
    second = run(submit(flops_bound(0.4), name="again"))
    assert second.result is not None
    assert not second.result["pruning_net_reused"]
    for role in ("winner", "uniform"):
        one, other = first.result[role], second.result[role]
        assert (one["channels"], one["test_accuracy"], other["reused"]) == (
            other["channels"], other["test_accuracy"], False,
        )  # fmt: skip
    for sha256 in (checkpoint, *weights):
        assert sha256 is not None
        assert checkpoints.intact(blobs.blob_path(sha256), sha256)


def test_a_job_that_loses_the_net_it_searches_with_trains_that_one_again_and_no_other(world: None) -> None:
    """It took over another job's, whose band is not what its own budget asks for; a third job has such a net."""
    first = run(submit(flops_bound(0.4)))
    assert first.result is not None
    undisturbed = run(submit(flops_bound(0.3), name="undisturbed"))
    assert undisturbed.result is not None
    job_id = submit(flops_bound(0.3), name="disturbed")
    context = Context(take(job_id), get_settings(), Console())
    while not (read(job_id).memory.get("evolution") or {}).get("judged"):
        advance(context, read(job_id))
    with transaction() as session:
        checkpoint = session.get_one(PruningNet, first.result["pruning_net"]).checkpoint
    assert checkpoint is not None
    blobs.blob_path(checkpoint).unlink()
    third = run(submit(flops_bound(0.3), name="third"))
    assert third.result is not None
    assert third.result["pruning_net"] != first.result["pruning_net"]
    disturbed = run(job_id)
    assert disturbed.result is not None
    assert disturbed.result["pruning_net"] == first.result["pruning_net"]
    assert "lost" not in disturbed.memory
    for role in ("winner", "uniform"):
        assert disturbed.result[role]["channels"] == undisturbed.result[role]["channels"]
    assert blobs.blob_path(checkpoint).is_file(), "with the same bits"


def test_a_job_waits_while_another_one_makes_its_damaged_pruning_net_again(world: None) -> None:
    done = run(submit(flops_bound(0.4)))
    assert done.result is not None
    with transaction() as session:
        checkpoint = session.get_one(PruningNet, done.result["pruning_net"]).checkpoint
    assert checkpoint is not None
    path = blobs.blob_path(checkpoint)
    path.write_bytes(b"damaged")
    first, second = submit(flops_bound(0.4), name="first"), submit(flops_bound(0.4), name="second")
    contexts = {job_id: Context(take(job_id), get_settings(), Console()) for job_id in (first, second)}
    for job_id, context in contexts.items():
        while read(job_id).state is not JobState.SEARCHING:
            advance(context, read(job_id))
    advance(contexts[first], read(first))
    assert (read(first).state, path.exists()) == (JobState.TRAINING, False)
    contexts[first].pause = lambda seconds, progress: lambda: True  # type: ignore[method-assign]
    advance(contexts[first], read(first))
    with transaction() as session:
        half = session.get_one(PruningNet, done.result["pruning_net"]).checkpoint
    assert half is not None
    outcomes = [advance(contexts[second], read(second)) for _ in range(2)]
    assert (read(second).state, outcomes[-1].wait is None) == (JobState.TRAINING, False)
    assert checkpoints.intact(blobs.blob_path(half), half)
    ended = run(first)
    assert ended.result is not None
    assert ended.result["winner"]["channels"] == done.result["winner"]["channels"]


def test_a_training_that_goes_on_with_other_code_is_not_reproducible(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(flops_bound(0.4))
    context = Context(take(job_id), get_settings(), Console())
    while read(job_id).state is not JobState.RETRAINING:
        advance(context, read(job_id))
    monkeypatch.setattr("workers.steps.context.CODE", "another version")
    newer = run(job_id)
    again = run(submit(flops_bound(0.4)))
    assert newer.result is not None
    assert again.result is not None
    assert (newer.reproducible, again.result["winner"]["reused"]) == (False, False)


def test_a_job_waits_while_another_one_trains_its_pruning_net(world: None) -> None:
    first, second = submit(flops_bound(0.4)), submit(flops_bound(0.3))
    context = Context(take(first), get_settings(), Console())
    while read(first).state is not JobState.TRAINING:
        advance(context, read(first))
    context.pause = lambda seconds, progress: lambda: True  # type: ignore[method-assign]
    advance(context, read(first))
    follower = Context(take(second), get_settings(), Console())
    outcomes = [advance(follower, read(second)) for _ in range(3)]
    assert outcomes[-1].wait is not None
    assert read(second).state is JobState.TRAINING
    with transaction() as session:
        jobs.finish(session, context.claim, JobState.FAILED)
    assert advance(follower, read(second)).wait is None


def test_a_job_whose_images_change_ends_with_that_reason(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, load = submit(flops_bound(0.4)), images.load
    context = Context(take(job_id), get_settings(), Console())
    while read(job_id).state is not JobState.TRAINING:
        advance(context, read(job_id))
    with monkeypatch.context() as away, pytest.raises(PoolTimeout):
        away.setattr(jobs, "note", Mock(side_effect=PoolTimeout))
        advance(context, read(job_id))
    while read(job_id).state is not JobState.SEARCHING:
        advance(context, read(job_id))
    assert (read(job_id).environment or {})["images"] == context.loaded.digest
    assert read(job_id).reproducible
    for change in ({"digest": "others"}, {"classes": ("0", "1")}):
        monkeypatch.setattr(images, "load", lambda *about, change=change: replace(load(*about), **change))
        with pytest.raises(InvalidDataset, match="have changed"):
            run(job_id)
    monkeypatch.setattr(images, "load", load)
    assert run(job_id).state is JobState.SUCCEEDED


def test_a_job_that_kills_its_runner_before_a_step_ends_is_charged_for_it(world: None) -> None:
    job_id = submit(flops_bound(0.4))
    for attempts in (0, 1, 2):  # the steps before the first training were finished
        with pytest.raises(Killed):
            run(job_id, console=Console("training", 1))
        assert (read(job_id).state, read(job_id).attempts) == (JobState.TRAINING, attempts)


@pytest.mark.parametrize("kept", [
    lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()},
    lambda tensors: dict(list(tensors.items())[1:]),
], ids=["of other shapes", "one less"])  # fmt: skip
def test_a_checkpoint_of_a_version_that_kept_other_things_begins_anew(world: None, kept: Any) -> None:
    undisturbed = run(submit(flops_bound(0.4)))
    forget()
    job_id = submit(flops_bound(0.4))
    context = Context(take(job_id), get_settings(), Console())
    while read(job_id).state is not JobState.RETRAINING:
        advance(context, read(job_id))
    context.pause = lambda seconds, progress: lambda: True  # type: ignore[method-assign]
    advance(context, read(job_id))
    memory = dict(read(job_id).memory)
    tensors = checkpoints.load(blobs.blob_path(old := memory["checkpoint"]["sha256"]), old)
    sha256 = checkpoints.save(get_settings().blobs, kept(tensors))
    with transaction() as session:
        blobs.register(session, sha256)
        jobs.note(session, context.claim, memory={**memory, "checkpoint": {**memory["checkpoint"], "sha256": sha256}})
    done = run(job_id)
    assert (done.result or {})["winner"]["test_accuracy"] == (undisturbed.result or {})["winner"]["test_accuracy"]
