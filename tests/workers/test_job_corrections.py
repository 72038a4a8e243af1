"""What whole jobs do when measurements contradict prices: broken budgets, corrections, searches that go on."""

from collections.abc import Sequence

import pytest

from latency_profiler.errors import MeasurementFailed, NothingFeasible
from service.settings import get_settings
from service.store import jobs, results
from service.store.models import JobState, Role, Work
from service.store.session import transaction
from tests.workers.whole_jobs import (
    SHORT,
    SPACE,
    Bench,
    Console,
    Partial,
    latency_bound,
    later,
    read,
    run,
    states,
    submit,
    take,
)
from workers.steps.advance import advance
from workers.steps.context import Context
from workers.steps.measuring import BudgetBroken, corrected

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
"""What is decided here asks no database in a way of its own; lives of jobs are tried on both."""


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


class Forgetful(Bench):
    """Answers no check of the network that it is asked for first."""

    skipped = ""

    def _taken(self, works: Sequence[Work]) -> Sequence[Work]:
        checks = (work.key for work in works if work.payload.get("purpose", "").startswith("check"))
        self.skipped = self.skipped or next(checks, "")
        return [work for work in works if work.key != self.skipped]


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


@pytest.mark.parametrize(("factor", "share"), [(1.0, 1.0), (0.94, 1.05)])
def test_the_baseline_is_the_widest_uniform_network_that_holds_the_budget_when_it_is_measured(
    world: None, factor: float, share: float
) -> None:
    """Where networks take less than their prices, another one would leave budget unused."""
    bench = Bench(lambda purpose: factor if purpose.startswith(("check", "verify")) else 1.0)
    job_id = submit(latency_bound(0.5), search=SHORT)
    job = run(job_id, bench)
    assert job.result is not None
    guest = Context(jobs.Claim(job_id, "guest", 0), get_settings(), Console(), guest=True)
    budget = guest.search_budget(job.memory)
    assert tuple(job.result["uniform"]["channels"]) == budget.uniform(share)
    assert (budget.uniform(share) == budget.uniform()) is (share == 1.0)
    assert job.result["uniform"]["measured_ms"]["bench"] <= latency_bound(0.5)["max_ms"]


class Slow(Bench):
    """Answers no more than the eight checks that it is asked for first."""

    def _taken(self, works: Sequence[Work]) -> Sequence[Work]:
        checks = [work for work in works if work.payload.get("purpose", "").startswith("check")]
        return [work for work in works if work not in checks[8:]]


def test_the_baseline_is_waited_for_as_long_as_the_winner(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, late, job_id = Slow(), later(monkeypatch, "searching"), submit(latency_bound(0.5), search=SHORT)
    context = Context(take(job_id), get_settings(), Console())
    while not read(job_id).memory.get("since") or read(job_id).state is not JobState.SEARCHING:
        if advance(context, read(job_id)).wait is not None:
            bench.measure()
    assert advance(context, read(job_id)).wait is not None, "the winner is measured, no uniform network is"
    late["clock"] = 121.0
    assert advance(context, read(job_id)).wait is None
    job = read(job_id)
    [uniform] = [trial for trial in job.memory["queue"] if trial["role"] == "uniform"]
    assert (job.state, job.warnings) == (JobState.RETRAINING, [])
    assert tuple(uniform["channels"]) == context.search_budget(job.memory).uniform()


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


@pytest.mark.parametrize(("slow", "failing"), [(0, 0), (3, 0), (0, 3), (2, 2)])
def test_the_winner_is_the_best_that_holds_its_budget_when_it_is_measured(world: None, slow: int, failing: int) -> None:
    bench = Partial(slow, failing)
    job = run(submit(latency_bound(0.5), retraining={"top": 2}, baselines=False), bench)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert (len(bench.checked), job.result["rounds"]) == (8, 1)
    asked = {tuple(channels): at for at, channels in enumerate(bench.checked)}
    trained = [one["channels"] for one in (job.result["winner"], *job.result["runners_up"])]
    found = [asked[tuple(layer.c_out for layer in SPACE.layers(channels))] for channels in trained]
    assert found == bench.held(job)[:2]
    assert found[0] >= slow + failing


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
