"""What whole jobs search by within milliseconds: tables that are filled first, and prices that soundings correct."""

import pytest
from sqlalchemy import select, update

from latency_profiler.cost import layer_flops
from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from service.settings import get_settings
from service.store import agents, devices, exchange, measurements
from service.store.agents import Outcome
from service.store.candidates import space_arguments
from service.store.models import Device, JobEvent, JobState, Work, WorkKind
from service.store.session import transaction
from tests.workers.whole_jobs import FACTS, SHORT, SPACE, Bench, Console, latency_bound, later, read, run, submit, take
from workers.steps import measuring
from workers.steps.advance import advance
from workers.steps.context import Context

pytestmark = pytest.mark.parametrize("database", ["postgresql"], indirect=True)
"""What is decided here asks no database in a way of its own; lives of jobs are tried on both."""


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


def sounded(bench: Bench) -> tuple[str, Context]:
    """A job that has asked its device for the networks that correct its prices."""
    bench.measure()
    job_id = submit(latency_bound(0.5))
    context = Context(take(job_id), get_settings(), Console())
    while not read(job_id).memory.get("sounded"):
        if advance(context, read(job_id)).wait is not None:
            bench.measure()
    return job_id, context


def test_a_job_searches_on_the_table_alone_where_nothing_is_sounded_in_time(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, late = Bench(), later(monkeypatch, "profiling")
    job_id, context = sounded(bench)
    assert [advance(context, read(job_id)).wait for _ in range(2)] == [60.0, 60.0]
    late["clock"] = 121.0
    margins = read(job_id).memory["margins"]
    assert advance(context, read(job_id)).wait is None
    job = read(job_id)
    assert (job.state, job.memory["corrections"], job.memory["margins"]) == (JobState.TRAINING, {}, margins)
    assert job.warnings[-1].startswith("bench did not measure all of 12 networks in 120 s: ")


def test_networks_of_a_slow_device_are_waited_for_longer_while_it_is_there(world: None) -> None:
    """A network of a tenth of a second takes a minute in three visits."""
    bench = Bench()
    job_id, context = sounded(bench)
    job, networks = read(job_id), [SPACE.channels(SPACE.smallest), SPACE.channels(SPACE.largest)]
    assert measuring.patience(context, job, networks) == measuring.LEAST_PATIENCE
    seconds = sum(context.predict(job, channels)["bench"] for channels in networks)
    job.memory = job.memory | {"corrections": {"bench": 1e5}}  # by which no structure holds the budget any more
    assert measuring.patience(context, job, networks) == pytest.approx(1e5 * measuring.RUNS * seconds)
    with transaction() as session:
        session.execute(update(Device).values(beat_at=Device.beat_at - 1000))
    assert measuring.patience(context, job, networks) == measuring.LEAST_PATIENCE


def test_an_impossible_latency_is_refused_once_the_table_is_there(world: None) -> None:
    with pytest.raises(InfeasibleConstraint) as refused:
        run(submit(latency_bound(0.0001)), Bench())
    assert (refused.value.metric, refused.value.device) == ("latency_ms", "bench")
    assert refused.value.asked <= latency_bound(0.0001)["max_ms"] < refused.value.smallest < refused.value.largest
