"""Whole jobs, from submission to result, through the steps that a runner does; the devices are simulated here."""

import hashlib
import json
from typing import Any

import pytest

from latency_profiler.cost import Constraint, Metric, flops, parameters
from latency_profiler.errors import NothingFeasible
from service import images
from service.settings import get_settings
from service.store import blobs, results
from service.store.models import Job, JobState, PruningNet, Structure
from service.store.session import transaction
from tests.workers.whole_jobs import (
    FULL,
    SPACE,
    Bench,
    Console,
    Killed,
    candidates,
    flops_bound,
    forget,
    latency_bound,
    read,
    run,
    states,
    submit,
    take,
)
from workers import datasets
from workers.budget import Budget
from workers.datasets import Data
from workers.evolution import Evolution
from workers.steps.advance import advance
from workers.steps.context import Context


def test_a_job_under_a_flops_budget_succeeds_and_leaves_everything(world: None) -> None:
    job = run(submit(flops_bound(0.4)))
    assert job.state is JobState.SUCCEEDED
    assert states(job.id) == ["queued", "profiling", "training", "searching", "retraining", "verifying", "succeeded"]
    assert job.result is not None
    winner, uniform = job.result["winner"], job.result["uniform"]
    assert 0.9 * 0.4 * FULL <= winner["flops"] <= 0.4 * FULL
    assert uniform["flops"] <= 0.4 * FULL
    assert winner["flops"] == flops(SPACE.layers(winner["channels"]))
    assert tuple(winner["channels"]) == SPACE.channels(winner["encoding"])
    assert 0 < winner["test_accuracy"] <= 1

    judged = candidates(job.id)
    assert len(judged) == job.result["candidates"] == 18
    assert {(row[0], row[1]) for row in judged} == {(g, i) for g in range(3) for i in range(6)}
    born = {row[2]: row for row in judged}
    for generation, _, _, cost, _, _, birth, parents in judged:
        assert cost <= 0.4 * FULL
        assert len(parents) == {"random": 0, "mutation": 1, "crossover": 2}[birth]
        assert all(born[parent][0] < generation for parent in parents)
    with transaction() as session:
        for row in results.of_job(session, job.id):
            for sha256 in (row.weights, row.model):
                assert sha256 is not None
                assert hashlib.sha256(blobs.blob_path(sha256).read_bytes()).hexdigest() == sha256
        assert session.get_one(Structure, winner["structure_id"]).channels == winner["channels"]


def test_whatever_takes_long_with_many_images_says_that_it_goes_on(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the supervisor takes it for hung, and a large dataset can never be trained on."""
    told, load, prepare = list[object](), images.load, datasets.prepare

    def loaded(*about: Any) -> images.Images:
        told.append(about[-1])
        return load(*about)

    def prepared(*about: Any, **more: Any) -> Data:
        told.append(more["told"])
        return prepare(*about, **more)

    monkeypatch.setattr(images, "load", loaded)
    monkeypatch.setattr("workers.steps.context.prepare", prepared)
    console = Console()
    context = Context(take(submit(flops_bound(0.4))), get_settings(), console)
    assert len(context.data.test) > 0
    assert told == [console.say] * 2


def test_bounds_that_contradict_each_other_end_a_job_before_anything_is_trained(world: None) -> None:
    largest = parameters(SPACE.layers(SPACE.channels(SPACE.largest)))
    wide = {"metric": "flops", "min": int(0.8 * FULL), "max": FULL}
    job_id = submit(wide, {"metric": "parameters", "max": int(0.1 * largest)})
    with pytest.raises(NothingFeasible):
        run(job_id)
    assert read(job_id).state is JobState.PROFILING


def test_a_range_that_holds_no_structure_ends_a_job_before_anything_is_trained(world: None) -> None:
    between = flops(SPACE.layers(SPACE.channels(SPACE.smallest))) + 1
    job_id = submit({"metric": "flops", "min": between, "max": between})
    with pytest.raises(NothingFeasible):
        run(job_id)
    assert read(job_id).state is JobState.PROFILING


def test_a_search_that_has_nothing_left_finds_that_out_once(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    breed, bred = Evolution._breed, list[int]()

    def barren(search: Evolution) -> Any:
        bred.append(search.generation)
        return [] if search.generation else breed(search)

    monkeypatch.setattr(Evolution, "_breed", barren)
    bench, looks = Bench(), 0
    job_id = submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    while looks < 3:
        searching = read(job_id).state is JobState.SEARCHING
        if advance(context, read(job_id)).wait is not None:
            if searching:  # the check's measurements are waited for
                looks += 1
            else:
                bench.measure()
    assert bred == [0, 1]


def test_a_front_is_searched_trained_and_measured_as_a_family(world: None) -> None:
    bench = Bench()
    bench.measure()
    bound = {**latency_bound(0.6), "min_ms": latency_bound(0.3)["max_ms"]}
    job = run(submit(bound, objective="front", retraining={"top": 2}), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    front = job.result["front"]
    assert [one["structure_id"] for one in front[::-1]] == [
        one["structure_id"] for one in (job.result["winner"], *job.result["runners_up"])
    ]
    for one in front:
        assert 0.99 * bound["min_ms"] <= one["measured_ms"]["bench"] <= bound["max_ms"]
        assert one["uniform"]["measured_ms"]["bench"] <= 1.05 * one["measured_ms"]["bench"]
        assert 0 < one["test_accuracy"] <= 1
    if len(front) > 1:
        assert front[0]["measured_ms"]["bench"] < front[1]["measured_ms"]["bench"]
        assert front[0]["uniform"]["flops"] <= front[1]["uniform"]["flops"]
    told = job.result["generations"]
    assert [one["generation"] for one in told] == [0, 1, 2]
    assert told[0]["hypervolume"] <= told[1]["hypervolume"] <= told[2]["hypervolume"]
    assert all(0 < one["diversity"] < 1 and one["front"] >= 1 for one in told)
    with transaction() as session:
        net = session.get_one(PruningNet, job.result["pruning_net"])
        low, high = job.spec["training"]["band"]
        assert net.band_low <= low * job.memory["least_flops"] < job.memory["flops"] * high <= net.band_high


def test_random_search_shares_the_pruning_net_of_an_evolution(world: None) -> None:
    first = run(submit(flops_bound(0.4)))
    random = run(submit(flops_bound(0.4), search={"generations": 3, "population": 6, "strategy": "random"}))
    assert random.result is not None
    assert random.result["pruning_net_reused"]
    assert {row[6] for row in candidates(random.id)} == {"random"}
    assert len(candidates(random.id)) == len(candidates(first.id)) == 18
    assert {row[2] for row in candidates(random.id) if row[0] == 0} == {
        row[2] for row in candidates(first.id) if row[0] == 0
    }


def test_a_budget_that_leaves_few_structures_is_searched_completely(world: None) -> None:
    smallest = flops(SPACE.layers(SPACE.channels(SPACE.smallest)))
    job = run(submit({"metric": "flops", "max": int(1.01 * smallest)}))
    assert job.result is not None
    assert job.result["generations"][0]["exhaustive"]
    judged = candidates(job.id)
    assert {row[6] for row in judged} == {"enumeration"}
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, int(1.01 * smallest))], {}, {}, 0.9)
    everything = budget.everything(18)
    assert everything is not None
    assert {row[2] for row in judged} == {",".join(map(str, genes)) for genes in everything.tolist()}
    assert job.result["winner"]["encoding"] is not None


def fate(job: Job) -> str:
    """All that must not depend on interruptions, as one text."""
    with transaction() as session:
        found = [(row.structure_id, row.role, row.test_accuracy, row.test_loss, row.weights, row.model)
                 for row in results.of_job(session, job.id)]  # fmt: skip
    return json.dumps([candidates(job.id), found, job.result and job.result["finalists"]], default=str)


@pytest.mark.parametrize(("objective", "finalists"), [("best", 1), ("best", 3), ("front", 1)])
def test_killed_anywhere_a_job_ends_the_same_bit_for_bit(
    world: None, monkeypatch: pytest.MonkeyPatch, objective: str, finalists: int
) -> None:
    monkeypatch.setattr("workers.steps.trainers.SLICE", 0.05)  # several checkpoints although the job is short
    short: dict[str, Any] = {"search": {"generations": 2, "population": 4}, "objective": objective}
    short["retraining"] = {"finalists": finalists}
    undisturbed = fate(run(submit(flops_bound(0.4), **short)))
    forget()

    job_id = submit(flops_bound(0.4), **short)
    for phase, after in [("training", 1), ("training", 4), ("searching", 1), ("searching", 3), ("searching", 6)]:
        with pytest.raises(Killed):
            run(job_id, console=Console(phase, after))
    for after in (1, 5, 14):
        with pytest.raises(Killed):
            run(job_id, console=Console("retraining", after))
    assert fate(run(job_id)) == undisturbed
