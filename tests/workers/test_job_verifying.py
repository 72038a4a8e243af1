"""Whole jobs whose devices stay away, or cannot run or price what is measured."""

import pytest

from latency_profiler.lookup_table import Entry, LatencyTable
from service.settings import get_settings
from service.store import devices, exchange
from service.store.agents import Outcome
from service.store.models import JobState, Work, WorkKind
from service.store.session import transaction
from tests.workers.whole_jobs import (
    SHORT,
    SPACE,
    Bench,
    Console,
    flops_bound,
    latency_bound,
    later,
    read,
    run,
    submit,
    take,
)
from workers.steps.advance import advance
from workers.steps.context import Context

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
"""What is decided here asks no database in a way of its own; lives of jobs are tried on both."""


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


def test_a_device_that_stays_away_leaves_the_job_unverified(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    job_id = submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    late = later(monkeypatch, "searching", "verifying")
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
    assert job.warnings[0].startswith("bench measured none of the search's best structures in 120 s")
    assert "bench" in job.warnings[1]
