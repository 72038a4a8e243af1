"""Whether a table is trusted, when it goes stale, and whose turn it is to measure: on both databases."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select, update

from latency_profiler.calibration import HELD_OUT, MOST_MARGIN, MOST_MEAN_ERROR, REPEATED, Trust, fit_networks, judge
from latency_profiler.lookup_table import Fit
from service.specs import JobRequest
from service.store import agents, canaries, datasets, devices, jobs, measurements, progress
from service.store.agents import Batch, Outcome
from service.store.models import Host, LookupTable, Measurement, Work, WorkKind, WorkState, now
from service.store.session import transaction
from tests.service.test_measurements import FACTS, OTHER_FACTS, SPACE, register, seconds_of

GOOD = Fit(1e-5, 1.0, 8, 8, 0.02, 0.05)


class Machine:
    """An agent's process on a device whose times are `pace` times those of the tests' formula."""

    def __init__(self, connection: str = "first", facts: dict[str, Any] = FACTS) -> None:
        self.connection, self.facts, self.pace, self.network_pace = connection, facts, 1.0, 1.0
        self.speed: object = None
        self.uploads = 0

    def step(self, limit: int = 10_000) -> list[str]:
        """Lease and hand in; returns the keys."""
        with transaction() as session:
            device = devices.get(session, "bench")
            leased = agents.lease(session, device, self.facts, limit, 60.0, connection=self.connection)
            outcomes = [self._measure(work) for work in leased.works]
            self.uploads += 1
            batch = Batch(f"{self.connection}-{self.uploads}", leased.lease_id, self._sha, outcomes)
            agents.record(session, device, batch)
            return [work.key for work in leased.works]

    def work(self) -> list[str]:
        """All there is to do."""
        keys: list[str] = []
        while new := self.step():
            keys += new
            assert len(keys) < 10_000
        return keys

    @property
    def _sha(self) -> str:
        return measurements.canonical_sha(self.facts)

    def _measure(self, work: Any) -> Outcome:
        held_out = work.kind is WorkKind.NETWORK and work.payload["purpose"] == HELD_OUT
        seconds = seconds_of(work) * (self.network_pace if held_out else 1.0)
        conditions = {} if self.speed is None or not held_out else {"speed": self.speed}
        return Outcome(work.id, work.kind, work.key, self.pace * seconds, 0.0, True, (seconds,), conditions)


def current() -> LookupTable:
    with transaction() as session:
        table = measurements.current_table(session, devices.get(session, "bench"))
        assert table is not None
        return table


def verdict() -> Any:
    with transaction() as session:
        return measurements.verdict(session, devices.get(session, "bench"), SPACE.key)


def checked(keys: list[str]) -> list[str]:
    return [key for key in keys if "@" in key and "|" not in key]


def test_limits_of_trust() -> None:
    assert judge(GOOD) == judge(GOOD, None, 0.3)
    assert (judge(GOOD).trust, judge(GOOD).reason, judge(GOOD).margin) == (Trust.TRUSTED, None, 0.02)
    few, bad, worst = replace(GOOD, held_out=7), replace(GOOD, mean_error=0.031), replace(GOOD, max_error=0.0901)
    for fit, why in ((few, "only 7 held-out"), (bad, "3.1% on average"), (worst, "9.0% at most")):
        found = judge(fit)
        assert (found.trust, found.margin) == (Trust.UNTRUSTED, fit.mean_error)
        assert why in str(found.reason)
    assert (judge(None).trust, judge(None).margin) == (Trust.UNTRUSTED, MOST_MEAN_ERROR)
    assert judge(replace(GOOD, mean_error=3.0)).margin == MOST_MARGIN
    slower, faster = judge(GOOD, "it drifted", 0.06), judge(GOOD, "it drifted", -0.06)
    assert (slower.trust, slower.reason, slower.margin) == (Trust.STALE, "it drifted", pytest.approx(0.08))
    assert faster.margin == 0.02, "a device that became faster holds every budget"


def networks(pairs: list[tuple[float, float]]) -> list[tuple[dict[str, float], float]]:
    """Networks whose layers have nothing but seconds: pairs (sum of layers, measured)."""
    return [({"linear": total}, seconds) for total, seconds in pairs]


def test_statistics_of_held_out_networks_against_their_definitions() -> None:
    line = [(1.0, 1.0), (2.0, 2.0), (9.0, 9.0)]
    held_out = [(100.0, 100.0), (104.0, 100.0), (92.0, 100.0), (300.0, 200.0)]
    fit = fit_networks(networks(line), networks(held_out), [(1.0, 1.1), (2.0, 1.9)])
    assert fit is not None
    assert (fit.mean_error, fit.max_error) == pytest.approx(((0 + 0.04 + 0.08 + 0.5) / 4, 0.5))
    assert fit.bias == pytest.approx((0.04 - 0.08 + 0.5) / 4)
    assert (fit.within_5, fit.within_10) == (0.5, 0.75)
    # Ranks 2, 3, 1, 4 against 2, 2, 2, 4 (equal values share theirs).
    assert fit.spearman == pytest.approx(3 / (5 * 3) ** 0.5)
    assert fit.noise_floor == pytest.approx(0.075)
    flat = fit_networks(networks(line), networks([(1.0, 5.0), (2.0, 5.0)]))
    assert flat is not None
    assert (flat.spearman, flat.noise_floor) == (None, None)


def test_a_table_is_trusted_by_its_held_out_networks_and_knows_its_noise(database: str) -> None:
    register(points=3)
    machine = Machine()
    machine.network_pace = 1.01
    keys = machine.work()
    assert [key.endswith(REPEATED) for key in keys] == [False] * (len(keys) - 8) + [True] * 8
    assert verdict().trust is Trust.TRUSTED
    with transaction() as session:
        fit = measurements.fits(session, current().id)[SPACE.key]
    assert fit.noise_floor == pytest.approx(1 - 1 / 1.01), "the second time, without the first's 1 % more"
    assert fit.bias == pytest.approx(-1 + 1 / 1.005), "against the mean of both"


@pytest.mark.parametrize(
    ("speed", "noise"), [(0.8, 1 - 0.8), (None, 0), (1.0, 0), (0.0, 0), (1e-300, 0), ("fast", 0), ([], 0)]
)
def test_the_noise_is_that_of_times_as_they_ran(database: str, speed: object, noise: float) -> None:
    register(points=3)
    machine = Machine()
    machine.speed = speed
    machine.work()
    with transaction() as session:
        fit = measurements.fits(session, current().id)[SPACE.key]
    assert fit.noise_floor == pytest.approx(noise), "the second time at its usual speed"
    assert fit.mean_error == pytest.approx(0, abs=1e-9)


def test_a_table_with_large_errors_is_not_trusted(database: str) -> None:
    register(points=3)
    machine = Machine()
    machine.network_pace = 1.1
    machine.work()
    found = verdict()
    assert (found.trust, found.margin) == (Trust.UNTRUSTED, pytest.approx(1 - 1 / 1.05))
    assert "4.8% on average" in found.reason


def test_no_agent_no_trust(database: str) -> None:
    register()
    assert verdict().trust is Trust.UNTRUSTED


def test_canaries_are_measured_on_each_connection_first_and_once(database: str) -> None:
    register(points=3)
    assert checked(Machine("a").work()) == [], "a table that has just been measured"
    machine = Machine("b")
    first = machine.step(limit=3)
    assert checked(first) == first, "they go first"
    rest = checked(machine.work())
    assert len(first + rest) == len(set(first + rest)) == canaries.CANARIES
    assert current().drift == pytest.approx(0)
    assert verdict().trust is Trust.TRUSTED
    assert machine.work() == []
    assert checked(Machine("c").step(limit=1)), "another connection"


def test_agents_that_take_turns_have_the_table_checked_once_each(database: str) -> None:
    register(points=3)
    Machine("a").work()
    turns = [Machine("b"), Machine("c")]
    seen = [checked(turns[at % 2].step()) for at in range(12)]
    assert [len(keys) for keys in seen] == [canaries.CANARIES] * 2 + [0] * 10


def test_as_many_connections_are_remembered_as_there_is_room_for(database: str) -> None:
    register(points=3)
    first = Machine("first")
    first.work()
    others = [Machine(f"{at:032x}") for at in range(canaries.CONNECTIONS)]
    assert all(checked(machine.work()) for machine in others)
    assert not checked(others[0].work() + others[-1].work())
    assert checked(first.work()), "forgotten since"


def test_nobody_measures_networks_for_a_job_that_has_ended(database: str) -> None:
    register(points=3)
    Machine().work()
    with transaction() as session:
        device, job_ids = devices.get(session, "bench"), []
        dataset = datasets.add(session, "few", "npz", None, classes=10, image_size=8, train_images=9, test_images=9)
        request = JobRequest(space=SPACE.name, dataset="few", constraints=[{"metric": "flops", "max": 10**9}])
        for _ in range(2):
            job = jobs.submit(session, request, space_key=SPACE.key, dataset_id=dataset.id, created_by=None)
            job_ids.append(job.id)
            purpose = f"check-{job.id}-0"
            measurements.request_networks(session, device, [(SPACE, SPACE.channels(SPACE.largest), purpose)])
    with transaction() as session:
        jobs.request_cancel(session, job_ids[0])
    [key] = [key for key in Machine("second").work() if not checked([key])]
    assert job_ids[1] in key


def test_unsteady_canaries_are_no_unsteady_entries_of_the_table(database: str) -> None:
    register(points=3)
    Machine("a").work()
    Machine("b").work()
    table = current()
    with transaction() as session:
        session.execute(update(Measurement).where(Measurement.kind == WorkKind.CANARY).values(steady=False))
        assert measurements.unsteady(session, table.id) == 0
        session.execute(update(Measurement).values(steady=False))
        assert measurements.unsteady(session, table.id) == sum(measurements.size(session, table.id))


def test_what_is_left_takes_as_long_as_it_took_lately(database: str) -> None:
    """The first upload says nothing: nobody knows how long it took."""
    register(points=3)
    machine = Machine()
    left = []
    for ago in (100.0, 60.0, 20.0):
        machine.step(limit=20)
        with transaction() as session:
            upload = f"{machine.connection}-{machine.uploads}"
            values = {"created_at": now() - ago}
            session.execute(update(Measurement).where(Measurement.upload_id == upload).values(values))
        with transaction() as session:
            [one] = progress.of_device(session, devices.get(session, "bench"))
            left.append(one.seconds_left and one.seconds_left / one.waiting)
    assert left == [None, pytest.approx(100 / 20, rel=0.1), pytest.approx(100 / 40, rel=0.1)]


def test_canaries_are_measured_daily(database: str) -> None:
    register(points=3)
    machine = Machine()
    machine.work()
    with transaction() as session:
        session.execute(update(LookupTable).values(created_at=LookupTable.created_at - canaries.CHECK_SECONDS))
    assert len(checked(machine.work())) == canaries.CANARIES
    assert machine.work() == []


def test_canaries_stand_for_equal_parts_of_the_time() -> None:
    rows: list[canaries.Measured] = [(str(at), {}, 1.0 if at < 70 else 10.0) for at in range(80)]
    assert [key for key, _, _ in canaries._spread(rows)] == ["12", "36", "60", "71", "73", "76", "78"]
    assert [key for key, _, _ in canaries._spread([("small", {}, 1e-9)] * 9 + [("all", {}, 1.0)])] == ["all"]


@pytest.mark.parametrize(("pace", "way"), [(1.08, "8.0% slower"), (0.9, "10.0% faster")])
def test_a_device_that_changed_makes_its_table_stale_until_it_is_itself_again(
    database: str, pace: float, way: str
) -> None:
    register(points=3)
    Machine("a").work()
    machine = Machine("b")
    machine.pace = pace
    assert len(checked(machine.work())) == 2 * canaries.CANARIES, "a second look before the table is given up"
    found = verdict()
    assert found.trust is Trust.STALE
    assert way in found.reason
    assert "--again" in found.reason
    with transaction() as session:
        session.execute(update(LookupTable).values(checked_at=LookupTable.checked_at - canaries.CHECK_SECONDS_STALE))
    machine.pace = 1.01
    assert len(checked(machine.work())) == canaries.CANARIES
    assert (verdict().trust, current().drift) == (Trust.TRUSTED, pytest.approx(0.01))


def test_one_disturbed_check_changes_nothing(database: str) -> None:
    register(points=3)
    Machine("a").work()
    machine = Machine("b")
    machine.pace = 1.5
    machine.step()
    machine.pace = 1.0
    machine.work()
    assert (verdict().trust, current().checks) == (Trust.TRUSTED, 2)
    with transaction() as session:
        rows = session.scalars(select(Measurement).where(Measurement.kind == WorkKind.CANARY)).all()
    assert len(rows) == 2 * canaries.CANARIES, "what was measured stays"


def test_measuring_again_opens_a_new_table_and_keeps_the_old_one(database: str) -> None:
    register(points=3)
    with transaction() as session:
        assert not measurements.measure_anew(session, devices.get(session, "bench")), "no agent has come"
    first = Machine("a")
    planned = len(first.work())
    old = current()
    with transaction() as session:
        device = devices.get(session, "bench")
        assert measurements.measure_anew(session, device)
        assert not measurements.measure_anew(session, device), "nothing is measured yet"
        assert measurements.load_table(session, "bench").entries == {}
    slower = Machine("b")
    slower.pace = 1.2
    keys = slower.work()
    assert (len(keys), checked(keys)) == (planned, [])
    assert (current().version, current().id != old.id, verdict().trust) == (2, True, Trust.TRUSTED)
    with transaction() as session:
        stored = session.scalars(select(Measurement).where(Measurement.table_id == old.id)).all()
        assert len(stored) == planned, "nothing of the old one is lost"
        assert session.get_one(LookupTable, old.id).stale == "it was measured anew"


def test_another_fingerprint_says_what_changed_and_its_return_is_checked(database: str) -> None:
    register(points=3)
    Machine("a").work()
    old = current().id
    Machine("b", OTHER_FACTS).step(limit=1)
    with transaction() as session:
        assert session.get_one(LookupTable, old).stale == "the agent runs on something else now: another threads"
    assert verdict().trust is Trust.UNTRUSTED
    assert len(checked(Machine("c").work())) == canaries.CANARIES
    assert (current().id, verdict().trust) == (old, Trust.TRUSTED)


def expire(seconds: float) -> None:
    """Let all leases run out so many seconds from now."""
    with transaction() as session:
        session.execute(update(Host).values(lease_until=now() + seconds))
        session.execute(update(Work).where(Work.state == WorkState.LEASED).values(lease_until=now() + seconds))


class Seat:
    """The agent of one of two devices on one host."""

    def __init__(self, name: str, host: str | None = "host") -> None:
        self.name, self.host, self.lease_id, self.works = name, host, "", list[Any]()
        register(name, points=3)

    def ask(self) -> bool:
        with transaction() as session:
            device = devices.get(session, self.name)
            leased = agents.lease(session, device, FACTS, 2, 60.0, host=self.host)
        self.lease_id, self.works = leased.lease_id, list(leased.works)
        return bool(leased.works)

    def hand_in(self) -> None:
        outcomes = [Outcome(w.id, w.kind, w.key, seconds_of(w), values=(1.0,)) for w in self.works]
        batch = Batch(self.lease_id, self.lease_id, measurements.canonical_sha(FACTS), outcomes)
        with transaction() as session:
            agents.record(session, devices.get(session, self.name), batch)


def test_devices_of_one_host_take_turns(database: str) -> None:
    a, b, elsewhere = Seat("a"), Seat("b"), Seat("c", "another host")
    assert a.ask()
    assert elsewhere.ask()
    for _ in range(3):
        assert not b.ask(), "a measures"
        a.hand_in()
        assert not a.ask(), "b has waited"
        assert b.ask()
        assert not a.ask(), "b measures"
        b.hand_in()
        assert not b.ask(), "a has waited"
        assert a.ask()


def test_a_turn_that_is_not_taken_passes(database: str) -> None:
    a, b = Seat("a"), Seat("b")
    assert a.ask()
    assert not b.ask()
    a.hand_in()
    with transaction() as session:
        session.execute(update(Host).values(wanted_until=0.0))
    assert a.ask(), "b went away"


def test_a_host_passes_on_when_its_device_dies_and_stays_while_it_measures(database: str) -> None:
    a, b = Seat("a"), Seat("b")
    assert a.ask()
    expire(10.0)
    with transaction() as session:
        agents.renew(session, devices.get(session, "a"), a.lease_id, 60.0)
        [left] = session.scalars(select(Host.lease_until - now()))
        works = session.scalars(select(Work.lease_until - now()).where(Work.lease_id == a.lease_id)).all()
    assert all(30 < seconds < 61 for seconds in (left, *works)), "host and work are kept"
    assert not b.ask()
    expire(-1.0)
    assert b.ask()
    with transaction() as session:
        assert session.scalars(select(Host.device_id)).one() == devices.get(session, "b").id
    held = [work.id for work in a.works]
    a.hand_in()
    assert not a.ask(), "b still measures, whatever a hands in late"
    b.hand_in()
    assert a.ask()
    assert not set(held) & {work.id for work in a.works}, "the late results were taken"


def test_a_device_that_has_nothing_to_do_holds_no_host(database: str) -> None:
    a, b = Seat("a"), Seat("b")
    with transaction() as session:
        devices.delete(session, "a")
    with transaction() as session:
        devices.register(session, "a")
    assert not a.ask()
    assert b.ask()
