"""Percentiles of a network's runs: from what agents hand in to prices, feasibility and answers, on both databases."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from latency_profiler.cost import Constraint, Metric, Statistic, latency_name, split_latency
from latency_profiler.errors import InfeasibleConstraint, NotCalibrated
from service import broker
from service.store import agents, candidates, devices, measurements, repricing
from service.store.agents import Outcome
from service.store.models import Measurement, StructureLatency, TableFit, Work, WorkKind
from service.store.session import transaction
from service.submission import check_feasible
from tests.service.test_measurements import OVERHEAD, SLOPE, SPACE, lease, record, register, seconds_of
from tests.service.test_repricing import reprice

P50, P90 = Statistic.P50, Statistic.P90
TAIL = 1.3
"""Nine of ten runs of the tests' device take no longer than so many medians."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No doorbell reaches a broker."""
    monkeypatch.setattr(broker, "ring", lambda: True)


def outcomes(works: Iterable[Work]) -> list[Outcome]:
    """Networks whose single runs differ; layers, whose values do a little."""
    found = []
    for item in works:
        seconds, told = seconds_of(item), {}
        values = [0.9 * seconds, seconds, 1.1 * seconds]
        if item.kind is WorkKind.NETWORK:
            told = {"p90": TAIL * seconds}
        found.append(Outcome(item.id, item.kind, item.key, seconds, 0.0, True, values, told))
    return found


def measure() -> None:
    """A device with a whole profile."""
    register(points=3)
    while works := lease().works:
        record(outcomes(works), str(works[0].id))


def test_names_of_latencies() -> None:
    assert (latency_name("a", P50), latency_name("a", P90)) == ("a", "a:p90")
    assert [split_latency(name) for name in ("a", "a:p90")] == [("a", P50), ("a", P90)]
    assert Constraint(Metric.LATENCY, 1.0, 0.0, "a", P90).latency == "a:p90"
    assert Constraint(Metric.FLOPS, 1.0).latency is None


def test_the_percentile_is_what_the_agent_says_or_that_of_the_values(database: str) -> None:
    """A layer's is less its empty run, as its seconds are."""
    register(points=3)
    item, *rest = lease(limit=4).works
    values = [float(value) for value in np.linspace(1e-3, 2e-3, 11)]
    given = Outcome(item.id, item.kind, item.key, 1.4e-3, 0.0, True, values, {})
    told = [{"p90": 1.7e-3}, {"p90": "a lot"}, {"p90": 10**400}]
    batch = [replace(given, work_id=one.id, key=one.key, conditions=says) for one, says in zip(rest, told, strict=True)]
    record([given, *batch], "a")
    with transaction() as session:
        found = dict(session.execute(select(Measurement.key, Measurement.p90)).all())
    by_values = 1.9e-3 - 1e-4
    assert [found[one.key] for one in (item, *rest)] == pytest.approx([by_values, 1.6e-3, by_values, by_values])


def test_disturbed_values_lower_no_percentile(database: str) -> None:
    """A median of all values would lie far above that of the quiet ones; what is not the item's own is said."""
    register(points=3)
    layer, other = lease(limit=2).works
    values = [1e-3] * 5 + [3e-3] * 6
    given = Outcome(layer.id, layer.kind, layer.key, 0.9e-3, 0.0, True, values, {"p90": 1.3e-3, "rest": 1e-4})
    whole = replace(given, work_id=other.id, key=other.key, seconds=1e-3, conditions={"p90": 1.3e-3, "rest": None})
    record([given, whole], "a")
    with transaction() as session:
        found = dict(session.execute(select(Measurement.key, Measurement.p90)).all())
    assert [found[one.key] for one in (layer, other)] == pytest.approx([1.2e-3, 1.3e-3])


def test_a_percentile_never_lies_below_the_median(database: str) -> None:
    register(points=3)
    [item] = lease(limit=1).works
    record([Outcome(item.id, item.kind, item.key, 1.0, 0.0, True, [1.0], {"p90": 0.5})], "a")
    with transaction() as session:
        assert session.scalars(select(Measurement.p90)).one() == 1.0


def test_a_networks_percentile_has_a_fit_of_its_own_on_the_same_layers(database: str) -> None:
    measure()
    channels = SPACE.channels(range(7, 7 + len(SPACE.genes)))
    with transaction() as session:
        median = measurements.pricing_table(session, "bench", SPACE, P50)
        tail = measurements.pricing_table(session, "bench", SPACE, P90)
        assert measurements.verdict(session, devices.get(session, "bench"), SPACE.key, P90).reason is None
    assert median.entries == tail.entries
    fit = tail.fits[SPACE.key]
    assert (fit.overhead, fit.slope) == pytest.approx((TAIL * OVERHEAD, TAIL * SLOPE), rel=1e-6)
    assert (fit.held_out, fit.noise_floor) == (8, pytest.approx(0))
    assert tail.price(SPACE, channels).seconds == pytest.approx(TAIL * median.price(SPACE, channels).seconds)


def test_without_such_networks_no_percentile_is_told(database: str) -> None:
    measure()
    with transaction() as session:
        session.delete(session.scalars(select(TableFit).where(TableFit.statistic == P90)).one())
    with transaction() as session:
        assert measurements.pricing_table(session, "bench", SPACE, P50).fits.keys() == {SPACE.key}
        with pytest.raises(NotCalibrated, match="--again"):
            measurements.pricing_table(session, "bench", SPACE, P90)


def test_what_decides_about_a_percentile_is_asked_for_with_more_runs(database: str) -> None:
    register()
    lease(limit=0)
    channels = SPACE.channels(SPACE.smallest)
    with transaction() as session:
        device = devices.get(session, "bench")
        [key] = measurements.request_networks(session, device, [(SPACE, channels, "verify-1")], statistic=P90)
        assert measurements.request_networks(session, device, [(SPACE, channels, "verify-1")]) == [key]
    [item] = lease().works
    assert item.payload["statistic"] == "p90"
    record(outcomes([item]), "a")
    with transaction() as session:
        device = devices.get(session, "bench")
        found = [measurements.network_seconds(session, device, key, statistic) for statistic in Statistic]
    assert found == pytest.approx([seconds_of(item), TAIL * seconds_of(item)])


def test_prices_and_feasible_ranges_are_those_of_the_statistic(client: TestClient) -> None:
    measure()
    body = {
        "encoding": list(SPACE.largest), "image_size": 8, "width": 0.25, "classes": 10, "last_layer": "free",
        "devices": ["bench"],
    }  # fmt: skip
    answers = [client.post("/v1/spaces/vgg16/price", json=body | {"statistic": name}).json() for name in Statistic]
    median, tail = (answer["latency_ms"]["bench"] for answer in answers)
    assert tail == pytest.approx(TAIL * median)
    with transaction() as session:
        table = measurements.pricing_table(session, "bench", SPACE, P90)
    smallest = table.price(SPACE, SPACE.channels(SPACE.smallest)).seconds
    check_feasible(SPACE, Constraint(Metric.LATENCY, smallest, 0.0, "bench", P90), table)
    with pytest.raises(InfeasibleConstraint) as caught:
        check_feasible(SPACE, Constraint(Metric.LATENCY, 0.99 * smallest, 0.0, "bench", P90), table)
    assert (caught.value.device, caught.value.largest) == ("bench:p90", pytest.approx(tail))


def test_a_jobs_request_is_checked_against_its_statistic(client: TestClient) -> None:
    measure()
    request: dict[str, Any] = {"space": "vgg16", "image_size": 8, "width": 0.25, "dataset": "digits"}
    with transaction() as session:
        table = measurements.pricing_table(session, "bench", SPACE, P50)
    smallest = 1000 * table.price(SPACE, SPACE.channels(SPACE.smallest)).seconds
    bound = {"metric": "latency", "device": "bench", "max_ms": 1.1 * smallest}
    accepted = client.post("/v1/jobs", json=request | {"constraints": [bound]})
    assert accepted.status_code == 202
    assert accepted.json()["spec"]["constraints"][0]["statistic"] == "p50"
    refused = client.post("/v1/jobs", json=request | {"constraints": [bound | {"statistic": "p90"}]})
    assert (refused.status_code, refused.json()["device"]) == (422, "bench:p90")
    assert refused.json()["smallest"] == pytest.approx(TAIL * smallest)
    both = [bound, bound | {"statistic": "p90", "max_ms": 2 * smallest}]
    assert client.post("/v1/jobs", json=request | {"constraints": both}).status_code == 202
    assert client.post("/v1/jobs", json=request | {"constraints": [bound, bound]}).status_code == 422
    assert client.post("/v1/jobs", json=request | {"constraints": [bound | {"statistic": "p95"}]}).status_code == 422


def test_what_was_found_is_priced_for_every_statistic(client: TestClient) -> None:
    measure()
    channels = [SPACE.channels((i,) * len(SPACE.genes)) for i in range(9)]
    with transaction() as session:
        candidates.add_structures(session, SPACE, channels)
    reprice()
    with transaction() as session:
        tables = {name: measurements.pricing_table(session, "bench", SPACE, name) for name in Statistic}
        rows = {row.structure_id: row for row in session.scalars(select(StructureLatency))}
        assert repricing.progress(session, devices.get(session, "bench"))[0].priced == len(channels)
    for one in channels:
        row = rows[SPACE.digest(one)]
        assert (row.seconds, row.p90) == tuple(tables[name].price(SPACE, one).seconds for name in Statistic)
    shown = client.get(f"/v1/structures/{SPACE.digest(channels[-1])}").json()["predicted_ms"]
    assert shown == {"bench": 1000 * row.seconds, "bench:p90": 1000 * (row.p90 or 0.0)}
    fits = client.get("/v1/devices/bench").json()["table"]["fits"]
    assert [(fit["statistic"], fit["space_key"]) for fit in fits] == [("p50", SPACE.key), ("p90", SPACE.key)]


def test_the_agents_batch_is_still_answered_once(database: str) -> None:
    """What is derived from a batch is no part of its identity."""
    register(points=3)
    works = lease(limit=5).works
    assert record(outcomes(works), "a") == record(outcomes(works), "a")
    with pytest.raises(agents.UploadConflict):
        record([replace(one, conditions={"p90": 1.0}) for one in outcomes(works)], "a")
