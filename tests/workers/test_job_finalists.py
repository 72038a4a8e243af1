"""Finalists of whole jobs: short trainings that choose the winner among the best candidates."""

from typing import Any

import pytest

from service.store import jobs, results
from service.store.models import JobState, Structure
from service.store.session import transaction
from tests.workers.whole_jobs import (
    SPACE,
    Bench,
    Listener,
    Partial,
    candidates,
    flops_bound,
    latency_bound,
    run,
    submit,
)
from workers.datasets import Data
from workers.training import ScratchTrainer

pytestmark = pytest.mark.parametrize("database", ["postgresql"], indirect=True)
"""What is decided here asks no database in a way of its own; lives of jobs are tried on both."""


@pytest.mark.parametrize(("slow", "top"), [(4, 2), (6, 1)])
def test_where_few_finalists_hold_the_budget_they_win(world: None, slow: int, top: int) -> None:
    bench = Partial(slow)
    job = run(submit(latency_bound(0.5), retraining={"finalists": 8, "trial_epochs": 1, "top": top}), bench)
    assert job.result is not None
    asked = {tuple(channels): at for at, channels in enumerate(bench.checked)}
    trained = [one["channels"] for one in (job.result["winner"], *job.result["runners_up"])]
    found = [asked[tuple(layer.c_out for layer in SPACE.layers(channels))] for channels in trained]
    assert len(found) == top <= len(bench.held(job))
    assert set(found) <= set(bench.held(job))


def test_the_winner_is_the_finalist_that_a_short_training_finds_best(world: None) -> None:
    console = Listener()
    job = run(submit(flops_bound(0.4), retraining={"finalists": 4, "trial_epochs": 2}), console=console)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    finalists = {one["structure_id"]: one for one in job.result["finalists"]}
    losses = {one: scores["loss"] for one, scores in finalists.items()}
    assert len(set(losses.values())) == 4
    winner = job.result["winner"]
    assert winner["structure_id"] == min(losses, key=losses.__getitem__)
    assert winner["proxy_accuracy"] == finalists[winner["structure_id"]]["proxy_accuracy"]
    best = sorted(candidates(job.id), key=lambda row: row[5])
    assert next(iter(finalists.values()))["proxy_accuracy"] == best[0][4]
    assert {one["proxy_accuracy"] for one in finalists.values()} <= {row[4] for row in best}
    with transaction() as session:
        told = [e.data for e in jobs.events_after(session, job.id, 0, 10_000) if e.kind == "finalist"]
        trained = [(row.structure_id, row.role) for row in results.of_job(session, job.id)]
    assert told == job.result["finalists"]
    told_done = [one["done"] for one in console.told if one["phase"] == "retraining"]
    assert told_done == sorted(told_done)
    assert (int(told_done[0]), told_done[-1]) == (0, 6)
    assert {one["total"] for one in console.told if one["phase"] == "retraining"} == {6}
    assert trained == [(winner["structure_id"], "winner"), (job.result["uniform"]["structure_id"], "uniform")]


def test_the_result_names_the_finalists_of_the_last_round(world: None) -> None:
    bench = Bench(lambda purpose: 1.1 if purpose.startswith("verify") and purpose.endswith("-0") else 0.97)
    job = run(submit(latency_bound(0.5), retraining={"finalists": 3, "trial_epochs": 1}), bench)
    assert job.result is not None
    assert job.result["rounds"] > 1
    losses = {one["structure_id"]: one["loss"] for one in job.result["finalists"]}
    assert len(losses) <= 3
    assert job.result["winner"]["structure_id"] == min(losses, key=losses.__getitem__)


def test_finalists_see_nothing_of_the_images_that_judge_them(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Trainer(ScratchTrainer):
        def __init__(self, space: Any, channels: Any, data: Data, settings: Any, *rest: Any) -> None:
            super().__init__(space, channels, data, settings, *rest)
            seen.append((len(data.training), settings.epochs))

    monkeypatch.setattr("workers.steps.trainers.ScratchTrainer", Trainer)
    run(submit(flops_bound(0.4), retraining={"finalists": 2, "trial_epochs": 3, "epochs": 2}))
    assert seen == [(1438 - 200, 3), (1438 - 200, 3), (1438, 2), (1438, 2)]


def test_finalists_are_networks_that_have_held_the_budget(world: None) -> None:
    bench = Partial(slow=2, failing=3)
    job = run(submit(latency_bound(0.5), retraining={"finalists": 8, "trial_epochs": 1}), bench)
    assert job.result is not None
    with transaction() as session:
        tried = [session.get_one(Structure, one["structure_id"]).channels for one in job.result["finalists"]]
    asked = [[layer.c_out for layer in SPACE.layers(tuple(channels))] for channels in tried]
    assert len(asked) > 1
    assert asked == [bench.checked[at] for at in bench.held(job)]
