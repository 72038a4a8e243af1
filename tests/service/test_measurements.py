"""Tables, leases and uploads in the store, on both databases."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError

from latency_profiler.calibration import HELD_OUT, NETWORKS, REPEATED, calibration_networks, fit_networks
from latency_profiler.cost import CostModel
from latency_profiler.errors import MeasurementFailed, NotFound
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, Fit, LatencyTable
from latency_profiler.planning import by_expected_error, plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.store import agents, datasets, devices, exchange, measurements, progress, work
from service.store.agents import Batch, Outcome
from service.store.models import Job, JobState, Measurement, Profile, Upload, Work, WorkKind, WorkState
from service.store.session import transaction

SPACE_ARGUMENTS: dict[str, Any] = {"name": "vgg16", "image_size": 8, "width": 0.25, "classes": 10, "free_last": True}
SPACE = get_space(**SPACE_ARGUMENTS)
FACTS = {"cpu": "test", "threads": 1}
OTHER_FACTS = {"cpu": "test", "threads": 2}
CALIBRATION = sum(NETWORKS.values())
OVERHEAD, SLOPE = 3e-5, 1.25


def layer_seconds(layer: Layer) -> float:
    """A device whose layers cost what their widths say, linearly, so that interpolation is exact."""
    return 1e-6 * (1 + 0.01 * layer.c_in + 0.02 * layer.c_out)


def network_seconds(payload: dict[str, Any]) -> float:
    layers = [Layer.from_json(node["layer"]) for node in payload["nodes"]]
    return OVERHEAD + SLOPE * sum(map(layer_seconds, layers))


def seconds_of(item: Work) -> float:
    if item.kind is WorkKind.NETWORK:
        return network_seconds(item.payload)
    return layer_seconds(Layer.from_json(item.payload["layer"]))


def outcomes(works: Iterable[Work]) -> list[Outcome]:
    found = []
    for item in works:
        seconds = seconds_of(item)
        found.append(Outcome(item.id, item.kind, item.key, seconds, seconds / 100, True, (seconds,) * 5, {"loops": 10}))
    return found


def register(name: str = "bench", *, points: int | None = None) -> None:
    with transaction() as session:
        device, _ = devices.register(session, name)
        if points is not None:
            measurements.request_profile(session, device, SPACE_ARGUMENTS, "sampled", points)


def lease(
    limit: int = 10_000, facts: dict[str, Any] = FACTS, seconds: float = 60.0, name: str = "bench"
) -> agents.Leased:
    with transaction() as session:
        return agents.lease(session, devices.get(session, name), facts, limit, seconds)


def record(
    results: Sequence[Outcome], upload_id: str, facts: dict[str, Any] = FACTS, name: str = "bench"
) -> dict[str, int]:
    batch = Batch(upload_id, "any", measurements.canonical_sha(facts), results)
    with transaction() as session:
        return agents.record(session, devices.get(session, name), batch)[0]


def load(name: str = "bench") -> LatencyTable:
    with transaction() as session:
        return measurements.load_table(session, name)


def stored() -> dict[str, float]:
    with transaction() as session:
        return dict(session.execute(select(Measurement.key, Measurement.seconds)).all())


def test_a_profile_asked_for_before_the_first_agent_is_measured_and_fitted(database: str) -> None:
    register(points=3)
    assert load().entries == {}
    leased = lease()
    layers = [item for item in leased.works if item.kind is WorkKind.LAYER]
    assert [item.key for item in layers] == [layer.key for layer in by_expected_error(SPACE, plan_layers(SPACE, 3))]
    assert [item.kind for item in leased.works[len(layers) :]] == [WorkKind.NETWORK] * CALIBRATION, "networks come last"
    assert record(outcomes(leased.works), "a") == {
        "stored": len(leased.works), "repeated": 0, "failed": 0, "ignored": 0,
    }  # fmt: skip
    table = load()
    fit = table.fits[SPACE.key]
    assert (fit.overhead, fit.slope) == pytest.approx((OVERHEAD, SLOPE), rel=1e-6)
    assert (fit.fitted_on, fit.held_out) == (64, 8)
    assert fit.max_error < 1e-9
    channels = SPACE.channels(range(7, 7 + len(SPACE.genes)))
    exact = OVERHEAD + SLOPE * sum(map(layer_seconds, SPACE.layers(channels)))
    price = table.price(SPACE, channels)
    assert price.interpolated > 0
    assert price.seconds == pytest.approx(exact, rel=1e-6)


def test_asking_for_a_profile_again_changes_nothing(database: str) -> None:
    register(points=3)
    lease(limit=5)
    with transaction() as session:
        device = devices.get(session, "bench")
        before = session.scalars(select(func.count()).select_from(Work)).one()
        profiles = {measurements.request_profile(session, device, SPACE_ARGUMENTS, "sampled", 3).id for _ in range(3)}
        assert len(profiles) == 1
        assert session.scalars(select(func.count()).select_from(Work)).one() == before
        assert session.scalars(select(func.count()).select_from(Profile)).one() == 1


def test_a_later_profile_is_measured_after_an_earlier_one_and_its_networks(database: str) -> None:
    register(points=3)
    lease(limit=0)
    other = {**SPACE_ARGUMENTS, "classes": 7}
    with transaction() as session:
        measurements.request_profile(session, devices.get(session, "bench"), other, "sampled", 3)
    keys = [item.key for item in lease().works]
    networks = [at for at, key in enumerate(keys) if key.startswith(SPACE.key + "|")]
    later = [
        at for at, key in enumerate(keys) if key.startswith(("linear", "vgg16@8x0.25/7")) and not key.endswith(">10")
    ]
    assert max(networks) < min(later)


def test_networks_are_measured_again_when_all_else_is_measured(database: str) -> None:
    register(points=3)
    works = lease().works
    with transaction() as session:
        other = {**SPACE_ARGUMENTS, "image_size": 16}
        measurements.request_profile(session, devices.get(session, "bench"), other, "sampled", 3)
    record(outcomes(works), "a")
    again = [item.key.endswith(f"|{REPEATED}") for item in lease().works]
    assert again == sorted(again)
    assert again.count(True) == NETWORKS[HELD_OUT]
    assert not again[0]


def job_in_profiling(name: str = "bench") -> None:
    """A job that waits for a device's table of the space."""
    with transaction() as session:
        dataset = datasets.find(session, "digits") or datasets.add(
            session, "digits", "digits", None, classes=10, image_size=8, train_images=9, test_images=9
        )
        spec = {"constraints": [{"metric": "latency", "device": name, "max_ms": 1.0}], "measure_on": []}
        job = Job(spec=spec, space_key=SPACE.key, dataset_id=dataset.id, seed=0, state=JobState.PROFILING)
        session.add(job)


def layer_keys(points: int, space: Space = SPACE) -> set[str]:
    return {layer.key for layer in plan_layers(space, points)}


def test_what_a_job_waits_for_goes_before_what_was_asked_for_earlier(database: str) -> None:
    other = {**SPACE_ARGUMENTS, "image_size": 16}
    register()
    with transaction() as session:
        device = devices.get(session, "bench")
        measurements.request_profile(session, device, other, "sampled", 3)
        measurements.request_profile(session, device, SPACE_ARGUMENTS, "sampled", 10)
    lease(limit=0)
    with transaction() as session:
        measurements.request_for_job(session, devices.get(session, "bench"), SPACE_ARGUMENTS)
    works, layers = lease().works, layer_keys(10)
    mine = [item for item in works if item.key in layers or item.key.startswith(SPACE.key + "|")]
    assert works[: len(mine)] == mine
    assert [item.kind for item in mine[-CALIBRATION:]] == [WorkKind.NETWORK] * CALIBRATION, "its networks, too"


def test_a_job_that_waits_comes_first_in_a_new_table_as_well(database: str) -> None:
    register(points=3)
    lease()
    other = {**SPACE_ARGUMENTS, "image_size": 16}
    with transaction() as session:
        device = devices.get(session, "bench")
        measurements.request_profile(session, device, other, "sampled", 3)
        measurements.request_for_job(session, device, SPACE_ARGUMENTS)
    job_in_profiling()
    works = lease(facts=OTHER_FACTS).works
    first = [item for item in works if item.priority == work.FOR_JOB]
    assert works[: len(first)] == first
    assert {item.key for item in first} == layer_keys(10)


def test_an_on_demand_profile_sleeps_until_a_job_needs_it(database: str) -> None:
    register()
    with transaction() as session:
        device = devices.get(session, "bench")
        profile = measurements.request_profile(session, device, SPACE_ARGUMENTS, "on-demand", 4)
    assert lease().works == []
    with transaction() as session:
        device = devices.get(session, "bench")
        [shown] = progress.of_device(session, device)
        assert (shown.planned, shown.waiting) == (0, 0)
        assert measurements.request_for_job(session, device, SPACE_ARGUMENTS).id == profile.id
        [shown] = progress.of_device(session, device)
        assert shown.planned == shown.waiting == len(layer_keys(4)) + CALIBRATION
    assert {item.key for item in lease().works if item.kind is WorkKind.LAYER} == layer_keys(4)
    assert lease(facts=OTHER_FACTS).works == [], "a new table is not filled for nobody"
    job_in_profiling()
    assert {item.key for item in lease(facts=OTHER_FACTS).works if item.kind is WorkKind.LAYER} == layer_keys(4)


def test_a_sleeping_profile_is_not_woken_by_the_layers_that_it_shares(database: str) -> None:
    register(points=4)
    more_classes = {**SPACE_ARGUMENTS, "classes": 11}
    with transaction() as session:
        measurements.request_profile(session, devices.get(session, "bench"), more_classes, "on-demand", 4)
    sleeping, leased = get_space(**more_classes).key, list[str]()
    while works := lease(limit=500).works:
        leased += [item.key for item in works]
        record(outcomes(works), f"upload {len(leased)}")
    assert leased != []
    assert [key for key in leased if key.startswith(sleeping)] == []


def test_missing_layers(database: str) -> None:
    register(points=10)
    with transaction() as session:
        assert measurements.layers_missing(session, "bench", SPACE) == [layer.key for layer in plan_layers(SPACE, 10)]
    works = lease().works
    one = next(
        item for item in works if item.key.startswith("linear")
    )  # the narrowest: outside of all cells without it
    record(outcomes([item for item in works if item is not one]), "all but one")
    with transaction() as session:
        assert measurements.layers_missing(session, "bench", SPACE) == [one.key]
        assert measurements.load_table(session, "bench").missing(plan_layers(SPACE, 31)) != []
    record(outcomes([one]), "the last one")
    with transaction() as session:
        assert measurements.layers_missing(session, "bench", SPACE) == []
        assert measurements.load_table(session, "bench").missing(plan_layers(SPACE, None)) == []
        with pytest.raises(NotFound):
            measurements.layers_missing(session, "nobody", SPACE)


def test_a_failed_layer_is_data_and_can_be_tried_again(database: str) -> None:
    register(points=3)
    works = lease().works
    failed = Outcome(works[0].id, works[0].kind, works[0].key, error="out of memory")
    assert record([failed], "f")["failed"] == 1
    with transaction() as session:
        assert measurements.failures(session, devices.get(session, "bench")) == {works[0].key: "out of memory"}
        work.retry_failed(session, session.scalars(select(Profile)).one())
    assert [item.key for item in lease().works] == [works[0].key]
    assert record([failed], "g")["failed"] == 1
    assert record(outcomes(works[:1]), "h")["stored"] == 1, "a late measurement stands against a failure"
    assert record([failed], "i") == {"stored": 0, "repeated": 1, "failed": 0, "ignored": 0}
    assert stored().keys() == {works[0].key}


def test_two_agents_never_share_an_item(database: str) -> None:
    register(points=3)
    lease(limit=0)
    barrier, found = Barrier(4), list[list[int]]()

    def agent() -> None:
        barrier.wait()
        found.extend([item.id for item in lease(limit=7).works] for _ in range(5))

    threads = [Thread(target=agent) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [work_id for works in found for work_id in works]
    with transaction() as session:
        planned = session.scalars(select(func.count()).select_from(Work)).one()
    assert len(ids) == len(set(ids)) == min(140, planned)


def test_an_expired_lease_is_given_away_again_and_given_up_in_the_end(database: str) -> None:
    register(points=3)
    first = lease(limit=3, seconds=-1)
    others = lease(limit=100).works
    assert not {item.id for item in others} & {item.id for item in first.works}, "what was lost comes last"
    lease()
    again = lease(limit=12, seconds=60)
    assert [item.id for item in again.works] == [item.id for item in first.works]
    assert again.lease_id != first.lease_id
    assert {item.kind for item in lease().works} == {WorkKind.NETWORK}, "the lease holds"
    with transaction() as session:
        session.execute(update(Work).where(Work.id == first.works[0].id).values(lease_until=0.0))
    for _ in range(work.MOST_LEASES - 2):
        assert [item.id for item in lease(seconds=-1).works] == [first.works[0].id]
    assert lease().works == [], "all of its leases were lost"
    with transaction() as session:
        assert "6 times" in measurements.failures(session, devices.get(session, "bench"))[first.works[0].key]
    assert record(outcomes(first.works), "late") == {"stored": 3, "repeated": 0, "failed": 0, "ignored": 0}


def test_what_kills_its_agent_is_found_among_what_was_leased_with_it(database: str) -> None:
    """An agent dies of one layer, and often for no reason of any layer's: only the one fails."""
    register(points=3)
    keys = [layer.key for layer in plan_layers(SPACE, 3)]
    killer, taken, draw = keys[7], list[int](), random.Random(0)
    while works := lease(limit=32, seconds=-1).works:
        taken.append(len(works))
        if killer not in {item.key for item in works} and draw.random() > 0.25:
            record(outcomes(works), str(len(taken)))
    with transaction() as session:
        failed = measurements.failures(session, devices.get(session, "bench"))
    assert failed.keys() == {killer}
    assert len([key for key in stored() if "|" not in key]) == len(keys) - 1
    assert taken[0] == 32
    assert {8, 2, 1} <= set(taken)


def test_a_new_fingerprint_opens_a_table_and_an_old_one_brings_its_own_back(database: str) -> None:
    register(points=3)
    first = lease()
    record(outcomes(first.works[:10]), "a")
    second = lease(facts=OTHER_FACTS)
    assert second.table_id != first.table_id
    assert [item.key for item in second.works] == [item.key for item in first.works], "all is planned anew"
    assert load().entries == {}
    with pytest.raises(agents.FingerprintMismatch):
        record(outcomes(first.works), "b")
    assert record(outcomes(first.works), "c", OTHER_FACTS)["ignored"] == len(first.works), "another table's work"
    third = lease()
    assert third.table_id == first.table_id
    assert len(load().entries) == 10


def test_rows_of_two_fingerprints_cannot_mix(database: str) -> None:
    register(points=3)
    record(outcomes(lease().works[:4]), "a")
    record(outcomes(lease(facts=OTHER_FACTS).works[:4]), "b", OTHER_FACTS)
    swaps = [
        "UPDATE measurements SET fingerprint_id = (SELECT max(id) FROM fingerprints) "
        "WHERE fingerprint_id = (SELECT min(id) FROM fingerprints)",
        "UPDATE measurements SET table_id = (SELECT max(id) FROM lookup_tables) "
        "WHERE table_id = (SELECT min(id) FROM lookup_tables)",
        "UPDATE measurements SET fingerprint_id = 'made up'",
        'INSERT INTO measurements (table_id, fingerprint_id, kind, key, payload, seconds, iqr, steady, "values", '
        "conditions, upload_id, created_at) SELECT t.id, f.id, 'layer', 'k', '{}', 1, 0, true, '[]', '{}', 'u', 0 "
        "FROM lookup_tables t, fingerprints f WHERE t.fingerprint_id <> f.id",
    ]
    for statement in swaps:
        with pytest.raises(IntegrityError), transaction() as session:
            session.execute(text(statement))


def test_an_upload_is_answered_once(database: str) -> None:
    register(points=3)
    works = lease().works
    answer = record(outcomes(works[:5]), "a")
    assert record(outcomes(works[:5]), "a") == answer
    with pytest.raises(agents.UploadConflict):
        record(outcomes(works[:4]), "a")
    assert record(outcomes(works[3:6]), "b") == {"stored": 1, "repeated": 2, "failed": 0, "ignored": 0}
    strangers = [replace(outcomes(works[6:7])[0], work_id=2**40), replace(outcomes(works[6:7])[0], key="another")]
    assert record(strangers, "c") == {"stored": 0, "repeated": 0, "failed": 0, "ignored": 2}
    assert stored() == pytest.approx({item.key: seconds_of(item) for item in works[:6]})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_split_repeated_reordered_and_doubled_uploads_equal_one(database: str, data: st.DataObject) -> None:
    with transaction() as session:
        for name in ("uploads", "work", "measurements", "lookup_tables", "fingerprints", "profiles", "devices"):
            session.execute(text(f"DELETE FROM {name}"))
    register(points=2)
    works = lease(limit=12).works
    results = outcomes(works)
    failing = data.draw(st.sets(st.sampled_from(range(len(works)))))
    results += [Outcome(works[at].id, works[at].kind, works[at].key, error="no") for at in sorted(failing)]
    batches = data.draw(st.lists(st.lists(st.sampled_from(results), min_size=1, max_size=6), max_size=8))
    model: dict[str, float] = {}
    for number, batch in enumerate(batches):
        for upload in range(data.draw(st.integers(1, 2))):
            record(batch, f"{number}" if upload == 0 or data.draw(st.booleans()) else f"{number} again")
        model |= {outcome.key: outcome.seconds for outcome in batch if outcome.error is None}
    assert stored() == pytest.approx(model)
    with transaction() as session:
        states = dict(session.execute(select(Work.key, Work.state)).all())
        assert session.scalars(select(func.count()).select_from(Upload)).one() >= len(batches)
    failed = {outcome.key for batch in batches for outcome in batch if outcome.error is not None} - model.keys()
    assert {key for key, state in states.items() if state is WorkState.DONE} == model.keys()
    assert {key for key, state in states.items() if state is WorkState.FAILED} == failed


def test_networks_for_a_job_go_first_and_move_to_a_new_table(database: str) -> None:
    register(points=3)
    lease(limit=0)
    channels = SPACE.channels(SPACE.smallest)
    with transaction() as session:
        device = devices.get(session, "bench")
        [key] = measurements.request_networks(session, device, [(SPACE, channels, "verify-1")])
        assert measurements.request_networks(session, device, [(SPACE, channels, "verify-1")]) == [key]
        assert measurements.network_seconds(session, device, key) is None
    assert lease(limit=1).works[0].key == key
    leased = lease(limit=1, facts=OTHER_FACTS)
    assert leased.works[0].key == key, "nobody has to ask again"
    record(outcomes(leased.works), "a", OTHER_FACTS)
    with transaction() as session:
        device = devices.get(session, "bench")
        assert measurements.network_seconds(session, device, key) == pytest.approx(seconds_of(leased.works[0]))
        [other] = measurements.request_networks(session, device, [(SPACE, channels, "verify-2")])
    item = lease(limit=1, facts=OTHER_FACTS).works[0]
    record([Outcome(item.id, item.kind, item.key, error="no memory")], "b", OTHER_FACTS)
    with transaction() as session, pytest.raises(MeasurementFailed, match="no memory"):
        measurements.network_seconds(session, devices.get(session, "bench"), other)


def test_a_table_survives_export_and_import(database: str) -> None:
    layers = plan_layers(SPACE, 3)
    entries = {layer.key: Entry(layer, layer_seconds(layer), 1e-7, 7, at % 2 == 0) for at, layer in enumerate(layers)}
    table = LatencyTable("elsewhere", "f" * 64, entries, {SPACE.key: Fit(1e-5, 1.1, 8, 8, 0.01, 0.02)})
    register(points=3)
    with transaction() as session:
        device = devices.get(session, "bench")
        assert exchange.take(session, device, table.to_json()) == (len(entries), True)
        assert exchange.take(session, device, table.to_json()) == (0, True)
        assert measurements.counts(session, device) == dict.fromkeys(WorkState, 0), "nobody could measure for it"
    found = load()
    assert (found.entries, found.fits) == (table.entries, table.fits)
    assert len(lease().works) == len(layers) + CALIBRATION, "the agent measures all anew"
    with transaction() as session:
        device = devices.get(session, "bench")
        fresh = replace(table, fingerprint="e" * 64)
        assert exchange.take(session, device, fresh.to_json()) == (len(entries), False), "the agent's table stays"
    assert load().entries == {}


def alone(total: float) -> dict[str, float]:
    """Parts of a network whose layers have nothing but seconds."""
    return {"linear": total}


def test_the_fit_weighs_relative_errors_and_refuses_what_is_no_line() -> None:
    generator = np.random.default_rng(0)
    totals = generator.uniform(1e-5, 1e-2, 64)
    measured = (2e-5 + 1.3 * totals) * generator.normal(1, 0.01, 64)
    pairs = list(zip(map(alone, totals.tolist()), measured.tolist(), strict=True))
    fit = fit_networks(pairs[:32], pairs[32:])
    assert fit is not None
    assert fit.overhead == pytest.approx(2e-5, rel=0.2)
    assert fit.slope == pytest.approx(1.3, rel=0.02)
    assert 0.002 < fit.mean_error < 0.02
    assert fit.max_error >= fit.mean_error
    assert fit_networks(pairs[:1], pairs[32:]) is None
    assert fit_networks(pairs[:8], []) is None
    assert fit_networks([(alone(1.0), 2.0), (alone(2.0), 1.0)], pairs) is None


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50", "resnet20", "vgg16"])
def test_calibration_networks_are_the_same_everywhere_and_spread_over_the_flops(name: str) -> None:
    space = get_space(name, 32, classes=10)
    networks = calibration_networks(space)
    assert networks == calibration_networks(space)
    assert [purpose for _, purpose in networks] == ["fit"] * 64 + ["held_out"] * 8
    assert len({channels for channels, _ in networks}) == 72
    model = CostModel(space)
    smallest, largest = model.flops(np.array([space.channels(space.smallest), space.channels(space.largest)]))
    for purpose in ("fit", "held_out"):
        shares = (model.flops(np.array([c for c, p in networks if p == purpose])) - smallest) / (largest - smallest)
        assert shares.min() < 0.1
        assert shares.max() > 0.7
        assert sum((shares > 0.15) & (shares < 0.7)) >= 3
