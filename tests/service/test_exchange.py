"""Tables as files: what goes out comes in again exactly, with every raw value and condition, on both databases."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from latency_profiler.layers import Layer
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.measuring import measure_work
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from latency_profiler.spreadsheet import to_csv
from service import broker
from service.store import devices, measurements
from service.store.agents import Outcome
from service.store.session import transaction
from tests.service.test_measurements import SPACE, lease, load, record, register

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No doorbell reaches a broker."""
    monkeypatch.setattr(broker, "ring", lambda: True)


def measure() -> None:
    """A whole profile, measured by the agent's own code on a simulated device, and a network of some job's."""
    register(points=2)
    runtime, rng = Simulated(Settings()), np.random.default_rng(0)
    while works := lease().works:
        items = [{"work_id": w.id, "kind": str(w.kind), "key": w.key, "payload": w.payload} for w in works]
        kinds = {w.id: w.kind for w in works}
        results = measure_work(runtime, items, rng)
        record([Outcome(**one | {"kind": kinds[one["work_id"]]}) for one in results], str(works[0].id))
        with transaction() as session:
            networks = [(SPACE, SPACE.channels(SPACE.smallest), "verify-7")]
            measurements.request_networks(session, devices.get(session, "bench"), networks)


def moved(client: TestClient, document: Json, name: str) -> Json:
    """What another device gives out when it was given this."""
    with transaction() as session:
        devices.register(session, name)
    answer = client.put(f"/v1/devices/{name}/lookup-table", json=document)
    assert answer.json() == {"stored": len(document["entries"]), "current": True}, answer.text
    found: Json = client.get(f"/v1/devices/{name}/lookup-table").json()
    return found


def test_a_measured_table_moves_without_losing_a_bit(client: TestClient) -> None:
    measure()
    document = client.get("/v1/devices/bench/lookup-table").json()
    for entry in document["entries"]:
        values, conditions = entry["values"], entry["conditions"]
        assert entry["seconds"] == pytest.approx(np.median(values) - conditions["empty_run"])
        assert entry["p90"] == pytest.approx(np.percentile(values, 90) - conditions["empty_run"])
        spread = [np.subtract(*np.percentile(raw, (75, 25))) for raw in (values, conditions["rest_values"])]
        assert entry["iqr"] == pytest.approx(np.hypot(*spread), abs=2e-9), (
            "raw values of what is subtracted are rounded"
        )
        assert entry["count"] == len(values) > 1
        assert {"loops", "warmup", "load", "at", "agent", "runtime", "outliers"} <= conditions.keys()
    purposes = {network["purpose"] for network in document["networks"]}
    assert purposes == {"fit", "held_out", "repeated"}, "what a job has asked for is not the table's"
    assert document["facts"] == {"cpu": "test", "threads": 1}
    assert document["fits"].keys() == document["p90_fits"].keys() == {SPACE.key}
    first = moved(client, document, "second")
    second = moved(client, json.loads(json.dumps(first)), "third")
    assert first | {"device": "bench"} == second | {"device": "bench"} == document


def test_a_moved_table_prices_and_answers_as_the_first_one(client: TestClient) -> None:
    measure()
    moved(client, client.get("/v1/devices/bench/lookup-table").json(), "second")
    first, second = load("bench"), load("second")
    assert (first.entries, first.fits) == (second.entries, second.fits)
    body = {
        "encoding": list(SPACE.largest), "image_size": 8, "width": 0.25, "classes": 10, "last_layer": "free",
        "devices": ["bench", "second"], "statistic": "p90",
    }  # fmt: skip
    prices = client.post("/v1/spaces/vgg16/price", json=body).json()["latency_ms"]
    assert prices["bench"] == prices["second"]
    view = client.get("/v1/devices/second").json()
    assert view["fingerprint"]["facts"]["facts"] == {"cpu": "test", "threads": 1}
    assert view["table"]["networks"] == 80


def test_a_document_with_a_layer_twice_keeps_the_last_and_one_without_values_is_taken(client: TestClient) -> None:
    register()
    layer = SPACE.layers(SPACE.channels(SPACE.largest))[0]
    table = LatencyTable("x", "f").to_json()
    entry = {"layer": layer.to_json(), "seconds": 1.0}
    document = table | {"entries": [entry, entry | {"seconds": 2.0}]}
    assert client.put("/v1/devices/bench/lookup-table", json=document).json()["stored"] == 1
    assert client.put("/v1/devices/bench/lookup-table", json=document).json()["stored"] == 0
    [kept] = client.get("/v1/devices/bench/lookup-table").json()["entries"]
    assert kept == {
        "layer": layer.to_json(), "seconds": 2.0, "p90": None, "iqr": 0.0, "count": 1, "steady": True, "values": [],
        "conditions": {"source": "imported"},
    }  # fmt: skip
    assert LatencyTable.from_json(document).entries[layer.key].seconds == 2.0


def test_another_measurement_of_the_same_layers_is_a_table_of_its_own(client: TestClient) -> None:
    """Its lines would be wrong for the former one's seconds."""
    measure()
    first = client.get("/v1/devices/bench/lookup-table").json()
    later = json.loads(json.dumps(first))
    for one in (*later["entries"], *later["networks"]):
        one["seconds"] /= 2
    assert moved(client, first, "copy") == first | {"device": "copy"}
    answers = [client.put("/v1/devices/copy/lookup-table", json=one).json() for one in (first, later, later)]
    assert [answer["stored"] for answer in answers] == [0, len(later["entries"]), 0]
    assert client.get("/v1/devices/copy/lookup-table").json() == later | {"device": "copy"}


def test_the_table_that_was_imported_last_is_used_until_an_agent_comes(client: TestClient) -> None:
    register()
    layer = SPACE.layers(SPACE.channels(SPACE.largest))[0]
    for source, seconds in (("first", 1.0), ("second", 2.0)):
        entries = [{"layer": layer.to_json(), "seconds": seconds}]
        document = LatencyTable("x", source).to_json() | {"entries": entries}
        answer = client.put("/v1/devices/bench/lookup-table", json=document).json()
        assert answer == {"stored": 1, "current": True}
        [kept] = client.get("/v1/devices/bench/lookup-table").json()["entries"]
        assert kept["seconds"] == seconds
    lease()
    assert client.put("/v1/devices/bench/lookup-table", json=document).json() == {"stored": 0, "current": False}


@pytest.mark.parametrize(
    "broken",
    [
        {"networks": [{"key": "k|verify", "space_key": "s", "channels": [1], "purpose": "fit", "seconds": 1.0}]},
        {"networks": [{"key": "k|fit", "space_key": "s", "channels": [1], "purpose": "verify", "seconds": 1.0}]},
        {"entries": [{"seconds": 1.0}]},
        {"p90_fits": {"s": {"overhead": 0.0}}},
        {"facts": {"a": "\0"}},
        {"entries": [{"layer": SPACE.layers(SPACE.channels(SPACE.largest))[0].to_json(), "seconds": 1e-320}]},
        {"more": 1},
    ],
)
def test_what_is_no_table_is_refused(client: TestClient, broken: Json) -> None:
    register()
    document = LatencyTable("x", "f").to_json() | broken
    assert client.put("/v1/devices/bench/lookup-table", json=document).status_code == 422


def test_csv_has_a_line_per_layer_with_its_conditions(client: TestClient) -> None:
    measure()
    entries = client.get("/v1/devices/bench/lookup-table").json()["entries"]
    text = client.get("/v1/devices/bench/lookup-table?format=csv").text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(entries)
    for row, entry in zip(rows, entries, strict=True):
        layer = Layer.from_json(entry["layer"])
        assert (row["op"], int(row["c_in"]), int(row["c_out"])) == (layer.op, layer.c_in, layer.c_out)
        assert (float(row["seconds"]), float(row["p90"])) == (entry["seconds"], entry["p90"])
        assert [float(value) for value in row["values"].split()] == entry["values"]
        assert [int(at) for at in row["outliers"].split()] == entry["conditions"]["outliers"]
        for name in ("loops", "at", "agent", "runtime", "load"):
            assert row[name] == str(entry["conditions"][name])
    assert text == to_csv(entries)


def test_no_cell_is_a_formula() -> None:
    strange = {"layer": SPACE.layers(SPACE.channels(SPACE.largest))[0].to_json(), "seconds": 1.0, "values": [1.0]}
    text = to_csv([strange | {"conditions": {"outliers": one}} for one in (5, ["=1+1", 3], "=2")])
    assert [row["outliers"] for row in csv.DictReader(io.StringIO(text))] == ["", "3", ""]
    entry = {"layer": replace(SPACE.layers(SPACE.channels(SPACE.largest))[0]).to_json(), "seconds": 1.0}
    text = to_csv([entry | {"conditions": {"governor": "=cmd()", "load": -1}}])
    [row] = csv.DictReader(io.StringIO(text))
    assert (row["governor"], row["load"]) == ("'=cmd()", "-1")
