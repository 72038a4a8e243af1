"""What a job leaves that asks for the fidelity of its PruningNet, and which trainings jobs take over."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau
from sqlalchemy import func, select, update

from latency_profiler.cost import flops
from latency_profiler.spaces.registry import get_space
from service.settings import get_settings
from service.specs import JobRequest, resolve
from service.store import blobs, jobs, pruning_nets, results
from service.store.models import Blob, Dataset, Job, JobState, PruningNet, Result, Role, new_id
from service.store.session import transaction
from workers.steps import fidelity
from workers.steps.advance import advance
from workers.steps.context import Context
from workers.steps.recipe import recipe
from workers.training import TrainingSettings

SPACE = get_space("mobilenet_v1", 8, 0.1, 10, free_last=True)
BUDGET = int(0.4 * flops(SPACE.layers(SPACE.channels(SPACE.largest))))
SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


class Killed(BaseException):
    """Stands for kill -9."""


class Console:
    """Dies when it hears of a `structure` for the third time."""

    stopping = False

    def __init__(self, structure: str = "") -> None:
        self.structure, self.left = structure, 3

    def say(self, progress: dict[str, Any] | None = None) -> None:
        self.left -= (progress or {}).get("structure") == self.structure
        if self.left == 0:
            raise Killed


@pytest.fixture(autouse=True)
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEURS_THREADS", "1")
    get_settings.cache_clear()
    facts = {"classes": 10, "train_images": 1437, "test_images": 360, "image_size": 8}
    with transaction() as session:
        session.add(Dataset(name="digits", kind="digits", **facts))


def submit(**fields: Any) -> str:
    request: dict[str, Any] = {
        "space": "mobilenet_v1", "width": 0.1, "image_size": 8, "dataset": "digits", "effort": "smoke",
        "constraints": [{"metric": "flops", "max": BUDGET}], "search": {"generations": 1, "population": 2},
        "fidelity": {"structures": 4}, **fields,
    }  # fmt: skip
    with transaction() as session:
        dataset = session.scalars(select(Dataset)).one()
        spec = resolve(JobRequest.model_validate(request), 8)
        return jobs.submit(session, spec, space_key=SPACE.key, dataset_id=dataset.id, created_by=None).id


def run(job_id: str, console: Console | None = None, until: JobState | None = None) -> Job:
    """Do steps until the job ends or is in a state."""
    with transaction() as session:
        session.get_one(Job, job_id).lease_until = None if session.get_one(Job, job_id).owner is None else 1.0
    with transaction() as session:
        claim = jobs.claim(session, "worker", 30.0, 1000)
    assert claim is not None
    context = Context(claim, get_settings(), console or Console())
    for _ in range(200):
        job = read(job_id)
        if job.state is until or advance(context, job).ended:
            return read(job_id)
    raise AssertionError("the job did not end")


def read(job_id: str) -> Job:
    with transaction() as session:
        return jobs.get(session, job_id)


def trained(job_id: str, role: Role | None = None) -> list[Result]:
    with transaction() as session:
        return [row for row in results.of_job(session, job_id) if role in (None, row.role)]


def test_the_fidelity_is_measured_stored_and_its_trainings_are_shared_with_the_ablation() -> None:
    generated = run(submit())
    assert generated.state is JobState.SUCCEEDED
    assert generated.result is not None
    rows = {row.structure_id: row for row in trained(generated.id, Role.FIDELITY)}
    assert len(rows) == 4
    assert not any(row.reused for row in rows.values())
    found = generated.result["fidelity"]
    variants = {(one["recalibrated"], one["rank_by"]): one for one in found["variants"]}
    assert len(found["variants"]) == len(variants) == 4
    points = found["structures"]
    for (recalibrated, rank_by), one in variants.items():
        proxies = [point["recalibrated" if recalibrated else "as_trained"][rank_by] for point in points]
        tested = [rows[point["structure_id"]].test_accuracy for point in points]
        tau = kendalltau([-proxy for proxy in proxies] if rank_by == "loss" else proxies, tested).statistic
        assert one["tau"] is None if tau != tau else one["tau"] == pytest.approx(tau)
        assert (one["weights"], one["structures"], one["epochs"]) == ("generated", 4, 1)
    assert [rows[point["structure_id"]].proxy_accuracy for point in points] == [
        point["recalibrated"]["accuracy"] for point in points
    ]
    with transaction() as session:
        assert pruning_nets.get(session, generated.result["pruning_net"]).fidelity == found["variants"]

    shared = run(submit(training={"weights": "shared"}))
    assert shared.result is not None
    assert shared.result["pruning_net"] != generated.result["pruning_net"]
    assert not shared.result["pruning_net_reused"]
    again = {row.structure_id: row for row in trained(shared.id, Role.FIDELITY)}
    assert again.keys() == rows.keys()
    for structure_id, row in again.items():
        assert row.reused
        assert (row.test_accuracy, row.test_loss) == (rows[structure_id].test_accuracy, rows[structure_id].test_loss)
        assert (row.weights, row.model) == (rows[structure_id].weights, rows[structure_id].model)
        assert row.proxy_accuracy is not None
    assert trained(shared.id, Role.UNIFORM)[0].reused
    assert {one["weights"] for one in shared.result["fidelity"]["variants"]} == {"shared"}
    assert shared.result["fidelity"]["structures"] != points


@SQLITE
def test_the_search_and_the_fidelity_judge_with_fitted_classifiers_where_that_is_asked() -> None:
    search = {"generations": 1, "population": 2}
    kept, fitted = (run(submit(search=search | {"classifier_images": images})) for images in (0, 200))
    assert kept.result is not None
    assert fitted.result is not None
    assert fitted.result["pruning_net"] == kept.result["pruning_net"]
    (scored, other), (points, others) = (
        ([one[5] for one in job.memory["evolution"]["judged"]] for job in (kept, fitted)),
        (job.result["fidelity"]["structures"] for job in (kept, fitted)),
    )
    assert scored != other
    assert [one["recalibrated"] for one in points] != [one["recalibrated"] for one in others]
    assert [one["as_trained"] for one in points] == [one["as_trained"] for one in others]


@SQLITE
def test_killed_anywhere_the_fidelity_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(context: Context, seconds: float, progress: Callable[[], dict[str, Any]]) -> Callable[[], bool]:
        """A checkpoint after every fourth iteration."""
        done = count()
        return lambda: bool(context.console.say(progress())) or next(done) == 3

    monkeypatch.setattr(Context, "pause", pause)
    calm = run(submit(baselines=False))
    with transaction() as session:
        session.execute(update(PruningNet).values(family="forgotten", key=new_id()))
        session.execute(update(Result).values(recipe=None))
    rough = submit(baselines=False)
    for structure in ("winner", "fidelity", "fidelity", "judged", "judged"):
        with pytest.raises(Killed):
            run(rough, Console(structure))
    assert "fidelity" not in read(rough).memory
    job = run(rough)
    assert calm.result is not None
    assert job.result is not None
    assert job.result["fidelity"]["structures"] == calm.result["fidelity"]["structures"]
    assert [one["tau"] for one in job.result["fidelity"]["variants"]] == [
        one["tau"] for one in calm.result["fidelity"]["variants"]
    ]
    assert [row.weights for row in trained(job.id)] == [row.weights for row in trained(calm.id)]


@SQLITE
def test_only_exactly_the_same_training_of_a_steady_job_with_its_files_is_taken_over() -> None:
    first = submit(fidelity={})
    run(first, until=JobState.RETRAINING)
    with transaction() as session:  # as if it had moved to another machine
        session.execute(update(Job).values(reproducible=False))
    assert run(first).state is JobState.SUCCEEDED
    assert {row.recipe for row in trained(first)} == {None}

    second = run(submit(fidelity={}))
    assert not any(row.reused for row in trained(second.id))
    assert [row.weights for row in trained(second.id)] == [row.weights for row in trained(first)]
    assert all(row.reused for row in trained(run(submit(fidelity={})).id))
    longer = run(submit(fidelity={}, retraining={"epochs": 2}))
    assert not any(row.reused for row in trained(longer.id))

    [lost] = trained(second.id, Role.UNIFORM)
    assert lost.model is not None
    path = blobs.blob_path(lost.model)
    path.unlink()
    fresh = run(submit(fidelity={}))
    assert [row.reused for row in trained(fresh.id)] == [True, False]
    assert path.is_file()


@SQLITE
def test_a_file_stays_as_long_as_one_of_the_results_that_share_it() -> None:
    first, second = run(submit(fidelity={})), run(submit(fidelity={}))
    [mine], [theirs] = trained(first.id, Role.UNIFORM), trained(second.id, Role.UNIFORM)
    assert mine.weights == theirs.weights
    for row in (mine, theirs):
        with transaction() as session:
            assert not blobs.discard(session, mine.weights)
            session.execute(update(Result).where(Result.id == row.id).values(weights=None))
    with transaction() as session:
        assert blobs.discard(session, mine.weights)
        assert session.scalar(select(func.count()).where(Blob.sha256 == mine.weights)) == 0


@SQLITE
def test_a_budget_with_too_few_structures_is_told_and_the_job_succeeds() -> None:
    smallest = flops(SPACE.layers(SPACE.channels(SPACE.smallest)))
    job = run(submit(constraints=[{"metric": "flops", "max": smallest}]))
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["fidelity"] is None
    assert any("of 4 structures" in warning for warning in job.warnings)


@SQLITE
def test_structures_are_distinct_of_the_budget_and_drawn_by_the_seed_alone() -> None:
    def drawn(**fields: Any) -> list[tuple[int, ...]]:
        job_id = submit(fidelity={"structures": 40}, **fields)
        with transaction() as session:
            claim = jobs.claim(session, "worker", 30.0, 3)
        assert claim is not None
        context = Context(claim, get_settings(), Console())
        memory = {"tables": {}, "margins": {}, "corrections": {}}
        encodings = fidelity.draw(context, Job(id=job_id, memory=memory))
        assert fidelity.draw(context, Job(id=job_id, memory={**memory, "fidelity": {}})) == []
        return encodings

    encodings = drawn()
    assert len({SPACE.digest(SPACE.channels(encoding)) for encoding in encodings}) == 40
    costs = [flops(SPACE.layers(SPACE.channels(encoding))) for encoding in encodings]
    assert 0.9 * BUDGET <= min(costs) <= max(costs) <= BUDGET
    assert drawn(training={"weights": "shared"}) == encodings
    assert drawn(seed=1) != encodings


@SQLITE
def test_a_recipe_names_all_that_decides() -> None:
    def context(**changes: Any) -> Any:
        facts = {
            "environment": {"torch": torch.__version__, "threads": 1},
            "space": SPACE,
            "seed": 0,
            "seen": ("d", True),
        }
        facts |= changes
        return SimpleNamespace(
            environment=facts["environment"], space=facts["space"], seen=facts["seen"],
            spec=SimpleNamespace(seed=facts["seed"]),
        )  # fmt: skip

    settings = TrainingSettings(epochs=2, batch_size=32, learning_rate=0.1)
    largest, smallest = SPACE.channels(SPACE.largest), SPACE.channels(SPACE.smallest)
    other_space = get_space("mobilenet_v1", 16, 0.1, 10, free_last=True)
    recipes = [
        recipe(context(), largest, settings), recipe(context(), smallest, settings),
        recipe(context(), largest, replace(settings, epochs=3)), recipe(context(seed=1), largest, settings),
        recipe(context(seen=("e", True)), largest, settings), recipe(context(seen=("d", False)), largest, settings),
        recipe(context(space=other_space), largest, settings),
        recipe(context(environment={"torch": torch.__version__, "threads": 2}), largest, settings),
    ]  # fmt: skip
    assert len(set(recipes)) == len(recipes)
    assert recipe(context(), list(largest), replace(settings)) == recipes[0]


@SQLITE
def test_rankings_without_an_order_have_no_tau() -> None:
    assert fidelity._agreement([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])["tau"] == 1.0
    assert fidelity._agreement([4, 3, 2, 1], [0.1, 0.2, 0.3, 0.4])["tau"] == -1.0
    assert fidelity._agreement([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4]) == {"tau": None, "p_value": None}
