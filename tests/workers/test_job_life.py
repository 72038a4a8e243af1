"""Whole jobs, from submission to result, through the steps that a runner does; the devices are simulated here."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select, update

from latency_profiler.cost import Constraint, Metric, flops, layer_flops, parameters
from latency_profiler.errors import InfeasibleConstraint, MeasurementFailed, NothingFeasible
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from service import images
from service.settings import get_settings
from service.specs import JobRequest, resolve
from service.store import agents, blobs, devices, exchange, jobs, measurements, results
from service.store.agents import Batch, Outcome
from service.store.candidates import space_arguments
from service.store.jobs import Claim
from service.store.measurements import canonical_sha
from service.store.models import (
    Candidate,
    Dataset,
    Job,
    JobEvent,
    JobState,
    PruningNet,
    Result,
    Role,
    Structure,
    Work,
    WorkKind,
    new_id,
    now,
)  # fmt: skip
from service.store.session import transaction
from workers import checkpoints, datasets
from workers.budget import Budget
from workers.datasets import Data
from workers.evolution import Evolution
from workers.steps.advance import advance
from workers.steps.context import Context
from workers.steps.measuring import BudgetBroken, corrected
from workers.training import ScratchTrainer

SPACE = get_space("mobilenet_v1", 8, 0.1, 10, free_last=True)
FULL = flops(SPACE.layers(SPACE.channels(SPACE.largest)))
FACTS = {"cpu": "simulated", "cores": 1}


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Console:
    """Hears what the steps say; with `dies_in`, the process ends when a phase has said something so many times."""

    stopping = False

    def __init__(self, dies_in: str = "", after: int = 1) -> None:
        self.dies_in, self.left = dies_in, after

    def say(self, progress: dict[str, Any] | None = None) -> None:
        if progress and progress.get("phase") == self.dies_in:
            self.left -= 1
            if not self.left:
                raise Killed


class Listener(Console):
    """Remembers all that it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    def say(self, progress: dict[str, Any] | None = None) -> None:
        self.told += [progress] if progress else []


class Bench:
    """A device whose layers take a nanosecond per multiply-add and some microseconds.

    `factor` makes whole networks slower than the sum of their layers; `away` makes it answer nothing.
    """

    def __init__(self, factor: Callable[[str], float] = lambda purpose: 1.0, name: str = "bench") -> None:
        self.factor, self.name, self.away = factor, name, False
        with transaction() as session:
            devices.register(session, name, "")

    @staticmethod
    def seconds(layer: Layer) -> float:
        return 1e-9 * layer_flops(layer) + 1e-6 * layer.c_out**0.5

    def measure(self) -> int:
        """Answer all work that waits; returns how much it was."""
        done = 0
        while not self.away:
            with transaction() as session:
                device = devices.get(session, self.name)
                leased = agents.lease(session, device, FACTS, 500, 60.0)
                if not (works := self._taken(leased.works)):
                    break
                outcomes = [self._outcome(work) for work in works]
                upload = hashlib.sha256(repr([w.id for w in works]).encode()).hexdigest()[:32]
                agents.record(session, device, Batch(upload, leased.lease_id, canonical_sha(FACTS), outcomes))
                done += len(outcomes)
        return done

    def _taken(self, works: Sequence[Work]) -> Sequence[Work]:
        """Of what was leased, what is answered."""
        return works

    def _outcome(self, work: Work) -> Outcome:
        return Outcome(work.id, work.kind, work.key, self._value(work), values=[self._value(work)])

    def _value(self, work: Work) -> float:
        if work.kind is WorkKind.LAYER:
            return self.seconds(Layer.from_json(work.payload["layer"]))
        layers = [Layer.from_json(node["layer"]) for node in work.payload["nodes"]]
        return 2e-6 + self.factor(work.payload["purpose"]) * sum(map(self.seconds, layers))


@pytest.fixture
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setenv("SECATEURS_THREADS", "1")
    get_settings.cache_clear()
    with transaction() as session:
        if session.scalar(select(Dataset).where(Dataset.name == "digits")) is None:
            facts = {"classes": 10, "train_images": 1437, "test_images": 360, "image_size": 8}
            session.add(Dataset(name="digits", kind="digits", **facts))
    yield
    torch.set_num_threads(threads)


def submit(*constraints: dict[str, Any], **fields: Any) -> str:
    request = {
        "space": "mobilenet_v1", "width": 0.1, "image_size": 8, "dataset": "digits", "effort": "smoke",
        "constraints": list(constraints), "search": {"generations": 3, "population": 6}, **fields,
    }  # fmt: skip
    with transaction() as session:
        dataset = session.scalars(select(Dataset).where(Dataset.name == "digits")).one()
        spec = resolve(JobRequest.model_validate(request), 8)
        return jobs.submit(session, spec, space_key=SPACE.key, dataset_id=dataset.id, created_by=None).id


def take(job_id: str) -> Claim:
    with transaction() as session:
        session.get_one(Job, job_id).run_after = 0.0
        session.get_one(Job, job_id).lease_until = None if session.get_one(Job, job_id).owner is None else 1.0
    with transaction() as session:
        claim = jobs.claim(session, "worker", 30.0, 1000)
    assert claim is not None
    assert claim.job_id == job_id
    return claim


def run(job_id: str, bench: Bench | None = None, console: Console | None = None) -> Job:
    """Do steps until the job ends; whenever it waits, the device answers."""
    context = Context(take(job_id), get_settings(), console or Console())
    for _ in range(200):
        with transaction() as session:
            job = jobs.load(session, context.claim)
        outcome = advance(context, job)
        if outcome.ended:
            return read(job_id)
        if outcome.wait is not None:
            assert bench is not None
            bench.measure()
    raise AssertionError("the job did not end")


def read(job_id: str) -> Job:
    with transaction() as session:
        return jobs.get(session, job_id)


def candidates(job_id: str) -> list[tuple[Any, ...]]:
    with transaction() as session:
        rows = session.scalars(select(Candidate).where(Candidate.job_id == job_id).order_by(Candidate.id)).all()
        names = ("generation", "position", "encoding_key", "flops", "proxy_accuracy", "proxy_loss", "birth", "parents")
        return [tuple(getattr(row, name) for name in names) for row in rows]


def states(job_id: str) -> list[str]:
    with transaction() as session:
        return [e.data["state"] for e in jobs.events_after(session, job_id, 0, 10_000) if e.kind == "state"]


def flops_bound(share: float) -> dict[str, Any]:
    return {"metric": "flops", "max": int(share * FULL)}


def latency_bound(share: float) -> dict[str, Any]:
    full = 2e-6 + sum(map(Bench.seconds, SPACE.layers(SPACE.channels(SPACE.largest))))
    return {"metric": "latency", "device": "bench", "max_ms": share * full * 1000}


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


def test_a_former_jobs_winner_is_the_one_of_its_result(world: None) -> None:
    bench = Bench(lambda purpose: 1.15 if purpose.startswith("verify") and purpose.endswith("-0") else 1.0)
    job = run(submit(latency_bound(0.5)), bench)
    assert job.result is not None
    assert job.result["rounds"] > 1
    with transaction() as session:
        winner = results.winner(session, job.id)
        assert winner is not None
        assert winner.structure_id == job.result["winner"]["structure_id"]
        assert len({row.structure_id for row in results.of_job(session, job.id) if row.role is Role.WINNER}) > 1


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


def test_a_latency_job_fills_the_table_first_and_its_winner_is_measured(world: None) -> None:
    bench = Bench()
    bench.measure()
    job = run(submit(latency_bound(0.5)), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    limit = latency_bound(0.5)["max_ms"]
    winner = job.result["winner"]
    assert winner["measured_ms"]["bench"] <= limit
    assert winner["predicted_ms"]["bench"] == pytest.approx(winner["measured_ms"]["bench"], rel=0.1)
    assert 0.8 * limit <= winner["predicted_ms"]["bench"] <= limit
    assert job.result["uniform"]["measured_ms"]["bench"] <= 1.1 * limit
    assert job.result["rounds"] == 1


class Narrow(Bench):
    """Another device: it hates wide layers, and does not care much about multiply-adds."""

    @staticmethod
    def seconds(layer: Layer) -> float:
        return 1e-10 * layer_flops(layer) + 1e-6 * layer.c_out


class Pair(Bench):
    """Both devices of a job."""

    def __init__(self) -> None:
        self.benches = [Bench(), Narrow(name="narrow")]

    def measure(self) -> int:
        return sum(bench.measure() for bench in self.benches)


def test_a_job_holds_its_budgets_on_two_devices(world: None) -> None:
    pair = Pair()
    largest = SPACE.layers(SPACE.channels(SPACE.largest))
    narrow = {"metric": "latency", "device": "narrow", "max_ms": 450 * (2e-6 + sum(map(Narrow.seconds, largest)))}
    job = run(submit(latency_bound(0.6), narrow), pair)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    bounds = {"bench": latency_bound(0.6)["max_ms"], "narrow": narrow["max_ms"]}
    winner, uniform = job.result["winner"], job.result["uniform"]
    assert winner["measured_ms"].keys() == bounds.keys() == uniform["measured_ms"].keys()
    for name, most in bounds.items():
        assert winner["measured_ms"][name] <= most
        assert uniform["predicted_ms"][name] <= most
        assert winner["predicted_ms"][name] == pytest.approx(winner["measured_ms"][name], rel=0.1)
    assert max(winner["predicted_ms"][name] / most for name, most in bounds.items()) > 0.8
    assert set(job.memory["tables"]) == set(job.memory["margins"]) == set(bounds)


def test_a_broken_budget_enters_the_prediction_and_the_search_goes_on(world: None) -> None:
    bench = Bench(lambda purpose: 1.2 if purpose.startswith(("check", "verify")) else 1.0)
    job = run(submit(latency_bound(0.5)), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["winner"]["measured_ms"]["bench"] <= latency_bound(0.5)["max_ms"]
    assert job.result["rounds"] > 1
    assert job.memory["corrections"]["bench"] == pytest.approx(1.2, abs=0.05)
    assert job.result["uniform"]["measured_ms"]["bench"] <= 1.05 * latency_bound(0.5)["max_ms"]


def test_a_budget_that_breaks_only_in_the_last_measurement_sends_the_job_back(world: None) -> None:
    bench = Bench(lambda purpose: 1.15 if purpose.startswith("verify") and purpose.endswith("-0") else 1.0)
    job = run(submit(latency_bound(0.5)), bench)
    assert job.state is JobState.SUCCEEDED
    assert states(job.id)[-6:] == ["retraining", "verifying", "searching", "retraining", "verifying", "succeeded"]
    assert job.result is not None
    assert job.result["winner"]["measured_ms"]["bench"] <= latency_bound(0.5)["max_ms"]


@pytest.mark.parametrize("step", ["check", "verify"])
def test_a_device_that_is_slow_for_a_moment_breaks_no_budget(world: None, step: str) -> None:
    """What breaks it is measured again before it is believed."""
    asked = list[str]()

    def factor(purpose: str) -> float:
        asked.append(purpose)
        return 1.6 if purpose.startswith(f"{step}-") and "again" not in purpose else 1.0

    job = run(submit(latency_bound(0.5)), Bench(factor))
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert any(purpose.startswith(f"{step}-again-") for purpose in asked)
    assert (job.result["rounds"], job.result["figures"]) == (1, [])
    assert job.result["winner"]["measured_ms"]["bench"] <= latency_bound(0.5)["max_ms"]
    assert job.result["winner"]["measured_ms"]["bench"] == pytest.approx(
        job.result["winner"]["predicted_ms"]["bench"], rel=0.1
    )


def test_a_budget_that_no_measurement_holds_fails_with_the_figures(world: None) -> None:
    bench = Bench(lambda purpose: 1.3 ** (1 + int(purpose[-1])) if purpose.startswith(("check", "verify")) else 1.0)
    with pytest.raises(BudgetBroken) as broken:
        run(submit(latency_bound(0.5)), bench)
    assert len(broken.value.figures) > 1
    assert all(one["measured_ms"] > one["max_ms"] for one in broken.value.figures)


def test_corrections_that_leave_no_candidate_end_the_job_with_a_reason(world: None) -> None:
    bench, job_id = Bench(), submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    while (memory := read(job_id).memory).get("evolution", {}).get("generation") != 3:
        if advance(context, read(job_id)).wait is not None:
            bench.measure()
    figures = [{"device": "bench", "round": 0, "max_ms": 1.0, "predicted_ms": 1.0, "measured_ms": 1.5}]
    for more, reason in (({"figures": figures}, BudgetBroken), ({}, NothingFeasible)):
        with transaction() as session:
            jobs.save_step(session, context.claim, memory={**memory, "corrections": {"bench": 1.5}, **more})
        with pytest.raises(reason):
            advance(context, read(job_id))


def test_prices_are_corrected_by_networks_that_a_search_begins_with(world: None) -> None:
    bench = Bench(lambda purpose: 0.7 if purpose.startswith(("sound", "check", "verify")) else 1.0)
    job = run(submit(latency_bound(0.4)), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["rounds"] == 1
    assert job.memory["corrections"]["bench"] == pytest.approx(0.7, rel=0.05)
    assert job.memory["margins"]["bench"] < 0.05
    assert 0.9 * latency_bound(0.4)["max_ms"] <= job.result["winner"]["measured_ms"]["bench"]
    assert job.result["winner"]["measured_ms"]["bench"] <= latency_bound(0.4)["max_ms"]
    assert job.result["winner"]["predicted_ms"]["bench"] == pytest.approx(
        job.result["winner"]["measured_ms"]["bench"], rel=0.05
    )
    with transaction() as session:
        [told] = session.scalars(select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.kind == "sounding"))
    assert told["bench"]["networks"] == len(job.memory["sounded"]) == 12
    assert told["bench"]["correction"] == job.memory["corrections"]["bench"]


class Choosy(Bench):
    """It cannot measure so many of the networks that budgets are sounded with."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.left = failing

    def _outcome(self, work: Work) -> Outcome:
        if work.kind is WorkKind.NETWORK and work.payload["purpose"].startswith("sound") and self.left:
            self.left -= 1
            return Outcome(work.id, work.kind, work.key, error="out of memory")
        return super()._outcome(work)


@pytest.mark.parametrize(("failing", "told"), [(4, 8), (8, None)])
def test_a_search_can_do_without_sounded_networks_that_fail(world: None, failing: int, told: int | None) -> None:
    job = run(submit(latency_bound(0.4)), Choosy(failing))
    assert job.state is JobState.SUCCEEDED
    with transaction() as session:
        events = session.scalars(select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.kind == "sounding"))
        assert [event["bench"]["networks"] for event in events] == ([told] if told else [])
    assert job.memory["corrections"].keys() == ({"bench"} if told else set())


class Erratic(Bench):
    """Every other network that a budget is sounded with takes twice as long."""

    def _value(self, work: Work) -> float:
        sounding = work.kind is WorkKind.NETWORK and work.payload["purpose"].startswith("sound")
        return super()._value(work) * (2 if sounding and work.id % 2 else 1)


def test_soundings_that_are_off_by_no_one_share_correct_nothing(world: None) -> None:
    job = run(submit(latency_bound(0.4)), Erratic())
    assert job.state is JobState.SUCCEEDED
    assert (len(job.memory["sounded"]), job.memory["corrections"]) == (12, {})


class Uneven(Bench):
    """Half of the networks that a budget is sounded with take less time than they are priced at, half of them more."""

    def _value(self, work: Work) -> float:
        sounding = work.kind is WorkKind.NETWORK and work.payload["purpose"].startswith("sound")
        return super()._value(work) * ((0.94 if work.id % 2 else 1.06) if sounding else 1)


def test_a_search_that_soundings_have_corrected_uses_what_their_spread_would_keep_free(world: None) -> None:
    job = run(submit(latency_bound(0.4)), Uneven())
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    margin, most = job.memory["margins"]["bench"], latency_bound(0.4)["max_ms"]
    assert margin > 0.03
    assert most / (1 + margin / 2) < job.result["winner"]["predicted_ms"]["bench"] <= most


class Partial(Bench):
    """Of the networks that a search ends with, it runs the first, in the order asked, slower than others or not at all.

    `checked` has the channels of all of them, in that order.
    """

    def __init__(self, slow: int = 0, failing: int = 0) -> None:
        super().__init__()
        self.slow, self.failing, self.checked = slow, failing, list[list[int]]()
        self.took: list[float] = []

    def _outcome(self, work: Work) -> Outcome:
        if work.kind is not WorkKind.NETWORK or not work.payload["purpose"].startswith("check"):
            return super()._outcome(work)
        self.checked.append([node["layer"]["c_out"] for node in work.payload["nodes"]])
        factor = 1.2 if self.failing < len(self.checked) <= self.failing + self.slow else 1.0
        self.took.append(factor * self._value(work))
        if len(self.checked) <= self.failing:
            return Outcome(work.id, work.kind, work.key, error="out of memory")
        return Outcome(work.id, work.kind, work.key, factor * self._value(work), values=[factor * self._value(work)])

    def held(self, job: Job) -> list[int]:
        """Which of the first round's networks ran and held the budget of `latency_bound(0.5)`."""
        most = latency_bound(0.5)["max_ms"] / 1000 / (1 + job.memory["noise"]["bench"])
        return [at for at, seconds in enumerate(self.took[:8]) if at >= self.failing and seconds <= most]


SHORT = {"generations": 1, "population": 8}


class Forgetful(Bench):
    """Answers no check of the network that it is asked for first."""

    skipped = ""

    def _taken(self, works: Sequence[Work]) -> Sequence[Work]:
        checks = (work.key for work in works if work.payload.get("purpose", "").startswith("check"))
        self.skipped = self.skipped or next(checks, "")
        return [work for work in works if work.key != self.skipped]


def later(monkeypatch: pytest.MonkeyPatch, step: str) -> dict[str, float]:
    """A clock of a step that goes ahead by what is told."""
    late = {"clock": 0.0}
    clock = f"workers.steps.{step}.jobs.clock"
    monkeypatch.setattr(clock, lambda session: session.scalar(select(now())) + late["clock"])
    return late


@pytest.mark.parametrize(("slow", "breaks"), [(1.0, False), (1.5, True)])
def test_a_network_that_nobody_has_measured_has_held_no_budget(
    world: None, monkeypatch: pytest.MonkeyPatch, slow: float, breaks: bool
) -> None:
    """The one that was not measured in time would be the winner: it comes first."""
    bench = Forgetful(lambda purpose: slow if purpose.startswith("check") else 1.0)
    late, job_id = later(monkeypatch, "searching"), submit(latency_bound(0.5), search=SHORT)
    context = Context(take(job_id), get_settings(), Console())
    while (job := read(job_id)).state is not JobState.RETRAINING and not job.memory.get("round"):
        if advance(context, job).wait is not None:
            bench.measure()
            late["clock"] += 121 if job.state is JobState.SEARCHING else 0
    assert bench.skipped
    if breaks:
        assert (job.state, job.memory["round"]) == (JobState.SEARCHING, 1)
    else:
        [winner] = [trial for trial in job.memory["queue"] if trial["role"] == "winner"]
        assert winner["structure_id"] not in bench.skipped


def test_a_broken_budget_that_nothing_refutes_stands(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(lambda purpose: 1.3 if purpose.startswith("verify") else 1.0)
    late, job_id = later(monkeypatch, "verifying"), submit(latency_bound(0.5), search=SHORT)
    context = Context(take(job_id), get_settings(), Console())
    while not (job := read(job_id)).memory.get("round"):
        bench.away = job.state is JobState.VERIFYING and bool(job.memory.get("again"))
        late["clock"] = 100_000.0 if bench.away and job.memory.get("since") else 0.0
        assert not advance(context, job).ended, "unverified, as if it had never been measured"
        bench.measure()
    [figures] = job.memory["figures"]
    assert figures["measured_ms"] > figures["max_ms"]


def test_a_broken_budget_waits_for_no_other_device(world: None) -> None:
    bench, other = Bench(lambda purpose: 1.3 if purpose.startswith("verify") else 1.0), Bench(name="other")
    job_id = submit(latency_bound(0.5), {**latency_bound(0.9), "device": "other"}, search=SHORT)
    context = Context(take(job_id), get_settings(), Console())
    waits = 0
    while not (job := read(job_id)).memory.get("round"):
        other.away = job.state is JobState.VERIFYING
        if advance(context, job).wait is not None:
            waits += other.away
            bench.measure()
            other.measure()
    assert waits == 2, "once for each of the two measurements of the device that is there"


def test_a_baseline_that_a_device_cannot_run_fails_no_job(world: None) -> None:
    class Unable(Bench):
        uniform = ""

        def _outcome(self, work: Work) -> Outcome:
            if work.key.startswith(f"{SPACE.key}|{self.uniform}|verify"):
                return Outcome(work.id, work.kind, work.key, error="out of memory")
            return super()._outcome(work)

    bench, job_id = Unable(), submit(latency_bound(0.5), search=SHORT)
    context = Context(take(job_id), get_settings(), Console())
    while (job := read(job_id)).state is not JobState.SUCCEEDED:
        queue = job.memory.get("queue", [])
        bench.uniform = next((one["structure_id"] for one in queue if one["role"] == "uniform"), "")
        if advance(context, job).wait is not None:
            bench.measure()
    assert job.result is not None
    assert (job.result["winner"]["measured_ms"].keys(), job.result["uniform"]["measured_ms"]) == ({"bench"}, {})
    assert "out of memory" in job.warnings[-1]


def test_a_table_that_an_agent_replaces_while_a_job_waits_is_filled(world: None) -> None:
    entries = {layer.key: Entry(layer, Bench.seconds(layer)) for layer in plan_layers(SPACE)}
    bench, other = Bench(), Bench(name="other")
    with transaction() as session:
        exchange.take(session, devices.get(session, "bench"), LatencyTable("bench", "elsewhere", entries).to_json())
    job_id = submit(latency_bound(0.5), {**latency_bound(0.9), "device": "other"}, search=SHORT)
    context = Context(take(job_id), get_settings(), Console())
    for _ in range(3):
        advance(context, read(job_id))
    with transaction() as session:
        agents.lease(session, devices.get(session, "bench"), FACTS, 0, 60.0)
    waits = 0
    while not (outcome := advance(context, read(job_id))).ended:
        bench.measure()
        other.measure()
        waits += outcome.wait is not None
        assert waits < 20
    assert read(job_id).state is JobState.SUCCEEDED


def test_what_a_job_needs_is_hurried_also_where_another_profile_has_planned_it(world: None) -> None:
    bench, wider = Bench(), get_space("mobilenet_v1", 8, 0.1, 100, free_last=True)
    with transaction() as session:
        device = devices.get(session, bench.name)
        agents.lease(session, device, FACTS, 0, 60.0)
    with transaction() as session:
        device = devices.get(session, bench.name)
        measurements.request_profile(session, device, space_arguments(SPACE), "on-demand", 10)
        measurements.request_profile(session, device, space_arguments(wider), "full", 31)
    job_id = submit(latency_bound(0.5))
    advance(Context(take(job_id), get_settings(), Console()), read(job_id))
    needed = {layer.key for layer in plan_layers(SPACE, 10)}
    with transaction() as session:
        rows = session.execute(select(Work.key, Work.priority).where(Work.key.in_(needed))).all()
    assert len(rows) == len(needed)
    assert {priority for _, priority in rows} == {1}


def test_a_guest_that_cannot_run_the_winner_fails_no_job(world: None) -> None:
    class Unable(Bench):
        def _outcome(self, work: Work) -> Outcome:
            if work.kind is WorkKind.NETWORK and work.payload["purpose"].startswith("verify"):
                return Outcome(work.id, work.kind, work.key, error="out of memory")
            return super()._outcome(work)

    guest = Unable(name="guest")
    guest.measure()
    job = run(submit(flops_bound(0.4), measure_on=["guest"]), guest)
    assert job.state is JobState.SUCCEEDED
    assert [("guest could not measure" in one, "out of memory" in one) for one in job.warnings[-1:]] == [(True, True)]


def test_a_guest_whose_table_prices_some_structures_only_is_left_out(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.steps.verifying.GUEST_SECONDS", 0.0)
    ends = [layer for end in (SPACE.smallest, SPACE.largest) for layer in SPACE.layers(SPACE.channels(end))]
    table = LatencyTable("guest", "elsewhere", {layer.key: Entry(layer, 1e-6 * layer.c_out) for layer in ends})
    with transaction() as session:
        device, _ = devices.register(session, "guest")
        exchange.take(session, device, table.to_json())
    job = run(submit(flops_bound(0.4), measure_on=["guest"]))
    assert job.state is JobState.SUCCEEDED
    assert job.memory["tables"] == {}


@pytest.mark.parametrize(("slow", "failing"), [(0, 0), (3, 0), (0, 3), (2, 2)])
def test_the_winner_is_the_best_that_holds_its_budget_when_it_is_measured(world: None, slow: int, failing: int) -> None:
    bench = Partial(slow, failing)
    job = run(submit(latency_bound(0.5), retraining={"top": 2}), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert (len(bench.checked), job.result["rounds"]) == (8, 1)
    asked = {tuple(channels): at for at, channels in enumerate(bench.checked)}
    trained = [one["channels"] for one in (job.result["winner"], *job.result["runners_up"])]
    found = [asked[tuple(layer.c_out for layer in SPACE.layers(channels))] for channels in trained]
    assert found == bench.held(job)[:2]
    assert found[0] >= slow + failing


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


class Mixed(Bench):
    """Of the networks that the first search ends with, the third takes longer than allowed, the others much less."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = 0

    def _value(self, work: Work) -> float:
        purpose = work.payload.get("purpose", "")
        if not purpose.startswith(("check", "verify")):
            return super()._value(work)
        self.checked += purpose.startswith("check")
        return super()._value(work) * (1.3 if self.checked in (5, 6) and purpose.startswith("check") else 0.7)


def test_one_slow_network_makes_no_price_rise_where_the_others_are_fast(world: None) -> None:
    job = run(submit(latency_bound(0.4)), Mixed())
    assert (job.state, job.memory["round"]) == (JobState.SUCCEEDED, 1)
    assert job.memory["corrections"]["bench"] == pytest.approx(0.7, rel=0.1)


@pytest.mark.parametrize(("share", "correction"), [(0.98, 1.005), (1.2, 1.2 * 1.005)])
def test_a_budget_that_its_noise_breaks_lowers_no_price(world: None, share: float, correction: float) -> None:
    """A prediction of just what is allowed, and measurements of so much of it."""
    bench, job_id = Bench(), submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    while read(job_id).state is not JobState.SEARCHING:
        if advance(context, read(job_id)).wait is not None:
            bench.measure()
    job = read(job_id)
    job.memory = {**job.memory, "corrections": {"bench": 1.0}, "noise": {"bench": 0.05}, "margins": {"bench": 9.0}}
    channels = SPACE.channels(SPACE.largest)
    allowed = {"bench": context.predict(job, channels)["bench"]}
    networks = [(channels, {"bench": share * allowed["bench"]})]
    assert corrected(context, job, networks, allowed)["corrections"]["bench"] == pytest.approx(correction)


def test_a_search_of_which_no_network_can_be_run_fails(world: None) -> None:
    with pytest.raises(MeasurementFailed, match="out of memory"):
        run(submit(latency_bound(0.5)), Partial(failing=8))


def test_a_prediction_that_is_still_too_pessimistic_is_corrected_by_the_winner(world: None) -> None:
    bench = Bench(lambda purpose: 0.7 if purpose.startswith(("check", "verify")) else 1.0)
    job = run(submit(latency_bound(0.4)), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["rounds"] > 1
    assert job.memory["corrections"]["bench"] == pytest.approx(0.7, rel=0.1)
    assert job.result["winner"]["measured_ms"]["bench"] <= latency_bound(0.4)["max_ms"]


def test_a_job_searches_on_the_table_alone_where_nothing_is_sounded_in_time(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, late = Bench(), {"clock": 0.0}
    bench.measure()
    job_id = submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    monkeypatch.setattr(
        "workers.steps.profiling.jobs.clock", lambda session: session.scalar(select(now())) + late["clock"]
    )
    while not read(job_id).memory.get("sounded"):
        if advance(context, read(job_id)).wait is not None:
            bench.measure()
    assert [advance(context, read(job_id)).wait for _ in range(2)] == [60.0, 60.0]
    late["clock"] = 121.0
    margins = read(job_id).memory["margins"]
    assert advance(context, read(job_id)).wait is None
    job = read(job_id)
    assert (job.state, job.memory["corrections"], job.memory["margins"]) == (JobState.TRAINING, {}, margins)


def test_an_impossible_latency_is_refused_once_the_table_is_there(world: None) -> None:
    with pytest.raises(InfeasibleConstraint):
        run(submit(latency_bound(0.0001)), Bench())


def test_a_device_that_stays_away_leaves_the_job_unverified(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    job_id = submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    late = {"clock": 0.0}
    monkeypatch.setattr(
        "workers.steps.verifying.jobs.clock", lambda session: session.scalar(select(now())) + late["clock"]
    )
    for _ in range(100):
        outcome = advance(context, read(job_id))
        if outcome.ended:
            break
        bench.away = read(job_id).state not in (JobState.QUEUED, JobState.PROFILING)
        if outcome.wait is not None:
            bench.measure()
            late["clock"] += 100_000.0 if bench.away else 0.0
    job = read(job_id)
    assert job.state is JobState.UNVERIFIED
    assert job.result is not None
    assert job.result["winner"]["measured_ms"] == {}
    assert "bench" in job.warnings[0]


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


def forget() -> None:
    """Nothing can be taken over from the jobs before."""
    with transaction() as session:
        session.execute(update(PruningNet).values(family="forgotten", key=new_id()))
        session.execute(update(Result).values(recipe=None))


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
