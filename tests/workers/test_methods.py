"""Jobs of the pruning methods, alone and side by side, through the steps that a runner does."""

from typing import Any

import pytest
import torch
from sqlalchemy import select

from latency_profiler.cost import flops, layer_flops
from latency_profiler.errors import InvalidInput
from service.methods import CollaborativeSpec, InterspaceSpec, MagnitudeSpec
from service.store import blobs, results
from service.store.models import Candidate, Job, JobState, Result, Role
from service.store.session import transaction
from tests.workers.whole_jobs import (
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
    submit,
)
from workers import checkpoints
from workers.networks import PlainNetwork
from workers.pruners.collaborative_settings import CollaborativeSettings
from workers.pruners.filter_bases import Bases
from workers.pruners.interspace_settings import InterspaceSettings
from workers.pruners.masks import sparse_flops
from workers.pruners.schedule import MagnitudeSettings

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
"""What is stored is stored as by every job; those of `test_job_*` run on both databases."""
WEIGHTS = sum(layer_flops(layer) // layer.out_size**2 for layer in SPACE.layers(SPACE.channels(SPACE.largest)))
QUICK: dict[str, Any] = {
    "dense": {"epochs": 1}, "collaborative": {"images": 64, "fine_tuning": {"epochs": 1}},
    "magnitude": {"rounds": 2, "retraining_epochs": 1}, "interspace": {"synflow_rounds": 5},
}  # fmt: skip


def kept_bound(share: float) -> dict[str, Any]:
    return {"metric": "parameters", "max": int(share * WEIGHTS)}


def rows(job: Job, role: Role = Role.WINNER) -> list[Result]:
    with transaction() as session:
        return [row for row in results.of_job(session, job.id) if row.role is role]


def network_of(row: Result, channels: list[int]) -> PlainNetwork:
    network = PlainNetwork(SPACE, channels)
    assert row.weights is not None
    network.load_state_dict(checkpoints.load(blobs.blob_path(row.weights), row.weights))
    return network


def test_collaborative_pruning_finds_an_ordinary_structure_within_the_budget(world: None) -> None:
    job = run(submit(flops_bound(0.4), method="collaborative", **QUICK))
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    winner, uniform, dense = (job.result[name] for name in ("winner", "uniform", "dense"))
    assert winner["method"] == "collaborative"
    assert winner["flops"] == flops(SPACE.layers(winner["channels"])) <= flops_bound(0.4)["max"]
    assert uniform["flops"] <= flops_bound(0.4)["max"]
    assert dense["flops"] == flops(SPACE.layers(SPACE.channels(SPACE.largest)))
    with transaction() as session:
        judged = session.scalars(select(Candidate).where(Candidate.job_id == job.id).order_by(Candidate.id)).all()
    assert [one.birth for one in judged] == ["pruning"] * 3
    assert [one.flops == dense["flops"] for one in judged] == [True, False, False]
    assert {one.space_key for one in judged} == {f"{SPACE.key}/collaborative"}
    assert all(one.pruned and one.pruned["method"] == "collaborative" for one in judged)


@pytest.mark.parametrize("method", ["magnitude", "interspace"])
@pytest.mark.parametrize("bound", [kept_bound(0.3), flops_bound(0.25)])
def test_masks_keep_no_more_than_the_budget_and_are_stored(world: None, method: str, bound: dict[str, Any]) -> None:
    job = run(submit(bound, method=method, **QUICK))
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    [row] = rows(job)
    winner = job.result["winner"]
    assert row.masks is not None
    masks = checkpoints.load(blobs.blob_path(row.masks), row.masks)
    network = network_of(row, winner["channels"])
    kept, sparse = sum(int(mask.sum()) for mask in masks.values()), sparse_flops(network.nodes, masks)
    assert winner["pruned"]["kept"] == kept
    assert winner["pruned"]["sparse_flops"] == sparse
    assert 0.9 * bound["max"] <= (kept if bound["metric"] == "parameters" else sparse) <= bound["max"]
    if method == "magnitude":
        assert all(torch.equal(network.weight(int(name)) != 0, mask) for name, mask in masks.items())
        assert 4 * kept < winner["pruned"]["sparse_bytes"]
    assert job.result["dense"]["test_accuracy"] > 0
    assert job.result["uniform"] is None


def test_several_methods_stand_side_by_side(world: None) -> None:
    others = ["collaborative", "magnitude", "interspace"]
    job = run(submit(flops_bound(0.4), compare_with=others, **QUICK))
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    shown = job.result["methods"]
    assert list(shown) == ["metapruning", *others]
    assert {method: one["method"] for method, one in shown.items()} == {method: method for method in shown}
    assert shown["metapruning"] == job.result["winner"]
    assert all(shown[method]["flops"] <= flops_bound(0.4)["max"] for method in ("metapruning", "collaborative"))
    assert all(shown[method]["pruned"]["sparse_flops"] <= flops_bound(0.4)["max"] for method in others[1:])
    assert len(rows(job, Role.DENSE)) == len(rows(job, Role.UNIFORM)) == 1
    assert len(rows(job)) == 4


def test_a_budget_that_a_method_cannot_prune_to_is_refused_before_anything_is_trained(world: None) -> None:
    asked = QUICK | {"collaborative": QUICK["collaborative"] | {"floor": 0.9}}
    job_id = submit(flops_bound(0.4), compare_with=["collaborative"], **asked)
    with pytest.raises(InvalidInput, match="allow fewer channels per layer than 90%"):
        run(job_id)
    assert read(job_id).state is JobState.PROFILING
    assert candidates(job_id) == []


def test_a_former_winner_is_pruned_on(world: None) -> None:
    first = run(submit(flops_bound(0.4), **QUICK))
    second = run(submit(flops_bound(0.2), method="collaborative", start=first.id, **QUICK))
    assert first.result is not None
    assert second.result is not None
    assert second.result["dense"] is None
    before, after = first.result["winner"]["channels"], second.result["winner"]["channels"]
    assert all(left <= there for left, there in zip(after, before, strict=True))
    with transaction() as session:
        dense = session.scalars(select(Candidate).where(Candidate.job_id == second.id).order_by(Candidate.id)).first()
    assert dense is not None
    assert dense.flops == first.result["winner"]["flops"]


def test_a_latency_that_breaks_when_measured_prunes_more(world: None) -> None:
    bench = Bench(lambda purpose: 1.25 if purpose.startswith("verify") else 1.0)
    job = run(submit(latency_bound(0.6), method="collaborative", **QUICK), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["rounds"] == 2
    assert job.result["winner"]["measured_ms"]["bench"] <= latency_bound(0.6)["max_ms"]
    assert job.result["figures"][0]["measured_ms"] > latency_bound(0.6)["max_ms"]


@pytest.mark.parametrize("method", ["collaborative", "magnitude", "interspace"])
def test_killed_anywhere_a_method_ends_the_same_bit_for_bit(
    world: None, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("workers.steps.trainers.SLICE", 0.05)
    whole = run(submit(flops_bound(0.4), method=method, **QUICK))
    forget()
    job_id = submit(flops_bound(0.4), method=method, **QUICK)
    for after in (1, 2, 3, 4):
        with pytest.raises(Killed):
            run(job_id, console=Console("searching", after))
    killed = run(job_id)
    assert candidates(killed.id) == candidates(whole.id)
    fates = [[(row.role, row.weights, row.masks, row.test_accuracy) for row in rows(job)] for job in (killed, whole)]
    assert fates[0] == fates[1]


def test_defaults_are_those_of_the_algorithms(database: str) -> None:
    fine_tuning: Any = None
    pairs: list[tuple[Any, Any]] = [
        (CollaborativeSpec(), CollaborativeSettings(fine_tuning)), (MagnitudeSpec(), MagnitudeSettings(None, None)),  # type: ignore[arg-type]
        (InterspaceSpec(), InterspaceSettings()), (InterspaceSpec(), Bases()),
    ]  # fmt: skip
    for spec, settings in pairs:
        named = {name for name in type(settings).__slots__ if name in type(spec).model_fields}
        named -= {"fine_tuning", "qualities"}
        assert set(type(settings).__slots__) - set(type(spec).model_fields) <= {"training", "goal", "method", "bases"}
        assert len(named) >= 4
        assert {name: getattr(spec, name) for name in named} == {name: getattr(settings, name) for name in named}
