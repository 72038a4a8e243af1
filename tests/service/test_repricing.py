"""What was found once has a latency on every device that comes later, without anything being judged again."""

import threading
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from latency_profiler.cost import layer_flops
from latency_profiler.lookup_table import Entry, Fit, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import other_last
from service import reconciler
from service.specs import JobRequest
from service.store import agents, candidates, datasets, devices, exchange, jobs, measurements, repricing
from service.store.candidates import Judged
from service.store.models import Device, Pricing, StructureLatency
from service.store.session import snapshot, transaction

SPACE = get_space("resnet20", 8, 1.0, 10, free_last=True)
FIT = Fit(2e-5, 0.9, 8, 8, 0.01, 0.02)
FOUND = 23


def table(factor: float = 1.0, points: int = 4) -> LatencyTable:
    entries = [Entry(layer, factor * 1e-9 * (1000 + layer_flops(layer))) for layer in plan_layers(SPACE, points)]
    return LatencyTable("bench", f"source {factor}", {one.layer.key: one for one in entries}, {SPACE.key: FIT})


def find(first: int = 0, count: int = FOUND) -> None:
    """A job judges structures; the later ones are larger and better."""
    with transaction() as session:
        dataset = datasets.find(session, "digits") or datasets.add(
            session, "digits", "digits", None, classes=10, image_size=8, train_images=9, test_images=9
        )
        request = JobRequest(space="resnet20", dataset="digits", constraints=[{"metric": "flops", "max": 10**9}])
        job = jobs.submit(session, request, space_key=SPACE.key, dataset_id=dataset.id, created_by=None)
        encodings = [(i,) * len(SPACE.genes) for i in range(first, first + count)]
        judged = [Judged(e, "random", (), 100 + e[0], 10, {}, 0.01 * e[0], 1.0) for e in encodings]
        candidates.record_generation(session, job, SPACE, 0, judged, {})


def arrive(name: str, given: LatencyTable) -> str:
    with transaction() as session:
        device, _ = devices.register(session, name)
        exchange.take(session, device, given.to_json())
        return device.id


def latencies(device_id: str) -> dict[str, float]:
    query = select(StructureLatency.structure_id, StructureLatency.seconds)
    with snapshot() as session:
        return dict(session.execute(query.where(StructureLatency.device_id == device_id)).all())


def expected(given: LatencyTable, count: int = FOUND) -> dict[str, float]:
    channels = [SPACE.channels((i,) * len(SPACE.genes)) for i in range(count)]
    return {SPACE.digest(widths): given.price(SPACE, widths).seconds for widths in channels}


def reprice() -> None:
    assert reconciler.reprice(60.0, threading.Event())
    with snapshot() as session:
        assert repricing.due(session) == []


def test_a_device_that_comes_later_answers_from_what_was_found(client: TestClient) -> None:
    find()
    arrive("late", table())
    [before] = client.get("/v1/devices/late").json()["pricing"]
    assert before == {"space_key": SPACE.key, "structures": FOUND, "priced": 0}
    reprice()
    [after] = client.get("/v1/devices/late").json()["pricing"]
    assert after == {"space_key": SPACE.key, "structures": FOUND, "priced": FOUND}

    prices = sorted(expected(table()).values())
    query = {"space": "resnet20", "dataset": "digits", "device": "late"}
    bound = {"max_latency_ms": 1000 * (prices[9] + prices[10]) / 2, "limit": 1}
    [best] = client.get("/v1/structures/best", params=query | bound).json()["items"]
    assert (best["proxy_accuracy"], best["predicted_ms"]) == (0.09, {"late": 1000 * prices[9]})
    front = client.get("/v1/structures/pareto", params=query).json()["items"]
    assert [one["predicted_ms"]["late"] for one in front] == [1000 * seconds for seconds in prices]


def test_prices_equal_the_slow_path_also_off_the_grid(database: str) -> None:
    find()
    odd = SPACE.uniform(0.777)
    with transaction() as session:
        candidates.add_structures(session, SPACE, [odd])
    device_id = arrive("late", table())
    reprice()
    assert latencies(device_id) == expected(table()) | {SPACE.digest(odd): table().price(SPACE, odd).seconds}


def test_only_what_changed_is_priced_again(database: str) -> None:
    find(count=20)
    first, second = arrive("first", table()), arrive("second", table(2.0))
    reprice()
    find(first=20, count=3)
    with snapshot() as session:
        assert [one.device_id for one in repricing.due(session)] == [first, second]
    reprice()
    with transaction() as session:
        line = replace(FIT, slope=0.5)
        exchange.take(session, session.get_one(Device, second), replace(table(2.0), fits={SPACE.key: line}).to_json())
    with snapshot() as session:
        assert [one.device_id for one in repricing.due(session)] == [second]
    reprice()
    with transaction() as session:
        other = replace(table(), fits={other_last(SPACE.key): FIT})
        exchange.take(session, session.get_one(Device, first), other.to_json())
    with snapshot() as session:
        assert [one.device_id for one in repricing.due(session)] == [first], "what holds for the same networks"
    reprice()
    assert latencies(first) == expected(table())
    assert latencies(second) == expected(replace(table(2.0), fits={SPACE.key: line}))


def test_a_jobs_own_prediction_stands_until_the_table_is_asked(database: str) -> None:
    device_id = arrive("bench", table())
    find(count=1)
    structure_id = SPACE.digest(SPACE.channels(SPACE.smallest))
    with transaction() as session:
        session.add(StructureLatency(structure_id=structure_id, device_id=device_id, seconds=7.0))
    assert latencies(device_id) == {structure_id: 7.0}
    reprice()
    assert latencies(device_id) == expected(table(), 1)
    with snapshot() as session:
        walked = session.scalars(select(Pricing.prices)).one()
        assert session.scalars(select(StructureLatency.prices)).all() == [walked]
        assert walked is not None


def test_a_table_that_lacks_layers_prices_nothing_and_keeps_what_was(database: str, client: TestClient) -> None:
    find()
    gaps = table()
    gaps.entries.popitem()
    device_id = arrive("gaps", LatencyTable("gaps", "source", gaps.entries))
    reprice()
    assert latencies(device_id) == {}
    assert client.get("/v1/devices/gaps").json()["pricing"][0]["priced"] == 0
    with transaction() as session:
        exchange.take(session, session.get_one(Device, device_id), replace(table(), fingerprint="source").to_json())
    reprice()
    assert latencies(device_id) == expected(table())


def test_another_fingerprint_is_another_answer(client: TestClient) -> None:
    find()
    device_id, other = arrive("bench", table()), arrive("other", table(2.0))
    reprice()
    assert latencies(device_id) == expected(table())
    with transaction() as session:
        agents.lease(session, devices.get(session, "bench"), {"cpu": "another"}, 10, 60.0)
    assert latencies(device_id) == {}
    assert latencies(other) == expected(table(2.0))
    query = {"space": "resnet20", "dataset": "digits", "device": "bench"}
    assert client.get("/v1/structures/best", params=query | {"max_latency_ms": 1000}).json()["items"] == []
    assert client.get("/v1/structures/pareto", params=query).json()["items"] == []


def test_layers_that_are_still_measured_are_waited_for(database: str) -> None:
    find()
    with transaction() as session:
        device, _ = devices.register(session, "busy")
        agents.lease(session, device, {"cpu": "simulated"}, 0, 60.0)
        measurements.request_profile(session, device, candidates.space_arguments(SPACE), "sampled", 4)
    with snapshot() as session:
        assert repricing.due(session) == []
    with transaction() as session:
        session.execute(update(Device).values(beat_at=Device.beat_at - 2 * devices.ALIVE_SECONDS))
    with snapshot() as session:
        assert [one.device_id for one in repricing.due(session)] == [device.id], "nobody measures them any more"


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_walk_that_dies_anywhere_ends_the_same(database: str, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(repricing, "CHUNK", 5)
    find()
    device_id = arrive("late", table())
    walk = begin()
    for _ in range(steps):
        with transaction() as session:
            assert walk.step(session)
    with pytest.raises(KeyboardInterrupt), transaction() as session:
        walk.step(session)
        raise KeyboardInterrupt
    assert len(latencies(device_id)) == 5 * steps
    with snapshot() as session:
        assert [one.priced for one in repricing.progress(session, devices.get(session, "late"))] == [5 * steps]
    reprice()
    assert latencies(device_id) == expected(table())


def test_a_walk_ends_with_its_device_or_its_table(database: str) -> None:
    find()
    arrive("late", table())
    walk = begin()
    with transaction() as session:
        device = devices.get(session, "late")
        agents.lease(session, device, {"cpu": "simulated"}, 0, 60.0)
    with transaction() as session:
        assert not walk.step(session)
    with transaction() as session:
        devices.delete(session, "late")
    with transaction() as session:
        assert not walk.step(session)
        assert session.scalars(select(StructureLatency)).all() == []


def test_a_reconciler_that_is_told_to_stop_leaves_the_rest(database: str) -> None:
    find()
    device_id = arrive("late", table())
    stop = threading.Event()
    stop.set()
    assert not reconciler.reprice(60.0, stop)
    assert not reconciler.reprice(-1.0, threading.Event())
    assert latencies(device_id) == {}


def begin() -> Any:
    with snapshot() as session:
        [due] = repricing.due(session)
        return repricing.Walk(session, due)


def test_a_walk_that_ran_out_of_time_goes_on_and_one_that_failed_begins_anew(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repricing, "CHUNK", 5)
    find()
    device_id = arrive("late", table())
    walks: dict[repricing.Due, repricing.Walk] = {}
    assert not reconciler.reprice(-1.0, threading.Event(), walks)
    [walk] = walks.values()
    with transaction() as session:
        assert walk.step(session)

    def fail(session: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        reconciler.reprice(60.0, threading.Event(), walks)
    assert walks == {}, "what a failed step has done is not known"
    assert reconciler.reprice(60.0, threading.Event(), walks)
    assert latencies(device_id) == expected(table())
    assert walks == {}
