"""Spaces and prices over HTTP say what the profiler's own code says."""

import random

import pytest
from fastapi.testclient import TestClient

from latency_profiler.cost import authors_flops, flops, parameters
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.quote import quote
from latency_profiler.spaces.registry import SPACES, get_space
from service.store import devices, exchange
from service.store.session import transaction


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_space_and_its_extremes(client: TestClient, name: str) -> None:
    answer = client.get(f"/v1/spaces/{name}", params={"image_size": 32, "classes": 10, "last_layer": "free"}).json()
    space = get_space(name, 32, 1.0, 10, True)
    assert answer["key"] == space.key
    assert [gene["choices"] for gene in answer["genes"]] == [list(widths) for widths in space.choices]
    assert {len(gene["choices"]) for gene in answer["genes"]} == {31}
    for extreme, encoding in (("smallest", space.smallest), ("largest", space.largest)):
        layers = space.layers(space.channels(encoding))
        assert answer[extreme]["flops"] == flops(layers)
        assert answer[extreme]["parameters"] == parameters(layers)
    assert name in {item["name"] for item in client.get("/v1/spaces").json()["items"]}


def test_the_published_mobilenet(client: TestClient) -> None:
    answer = client.get("/v1/spaces/mobilenet_v1").json()
    assert answer["largest"]["flops"] == 568_740_352
    assert [slot["base"] for slot in answer["fixed"]] == [1024]


def test_a_price_is_the_command_lines_price(client: TestClient) -> None:
    draw = random.Random(3)
    space = get_space("mobilenet_v2", 32, 0.5, 10)
    encoding = [draw.randrange(31) for _ in space.genes]
    layers = plan_layers(space, 3)
    tables = {}
    for name in ("fast", "slow"):
        entries = {layer.key: Entry(layer, draw.uniform(1e-5, 1e-3)) for layer in layers}
        tables[name] = LatencyTable(name, "f" * 64, entries)
        with transaction() as session:
            devices.register(session, name)
            exchange.take(session, devices.get(session, name), tables[name].to_json())
    body = {"encoding": encoding, "image_size": 32, "width": 0.5, "classes": 10, "devices": ["fast", "slow"]}
    answer = client.post("/v1/spaces/mobilenet_v2/price", json=body).json()
    channels = space.channels(encoding)
    assert answer["authors_flops"] == authors_flops(space, channels)
    assert answer["encoding"] == encoding
    for name, table in tables.items():
        alone = quote(space, channels, table)
        assert answer["latency_ms"][name] == pytest.approx(alone["latency_ms"])
        assert answer["interpolated"][name] == sum(layer["interpolated"][name] for layer in answer["layers"]) > 0
        assert sum(layer["share"][name] for layer in answer["layers"]) == pytest.approx(1)
        errors = [layer["error"][name] for layer in answer["layers"] if layer["interpolated"][name]]
        assert max(error for error in errors if error is not None) > 0.1, "of random numbers"
        assert answer["interpolation_error"][name] == alone["interpolation_error"]
        assert (answer["interpolation_error"][name] is None) is (None in errors)
    for field in ("space", "channels", "flops", "parameters"):
        assert answer[field] == quote(space, channels)[field]
    assert sum(layer["flops"] for layer in answer["layers"]) == answer["flops"]
    same = client.post("/v1/spaces/mobilenet_v2/price", json=body | {"encoding": None, "channels": list(channels)})
    assert same.json() == answer | {"encoding": list(space.encoding(channels))}


def test_what_cannot_be_priced(client: TestClient) -> None:
    where = "/v1/spaces/vgg16/price"
    with transaction() as session:
        devices.register(session, "bench")
    largest = client.get("/v1/spaces/vgg16").json()["largest"]["encoding"]
    for body, status, kind in (
        ({}, 422, "invalid-request"),
        ({"encoding": largest, "channels": [1]}, 422, "invalid-request"),
        ({"encoding": [1]}, 422, "invalid-input"),
        ({"encoding": [31] * len(largest)}, 422, "invalid-request"),
        ({"encoding": largest, "devices": ["nothing"]}, 404, "not-found"),
        ({"encoding": largest, "devices": ["bench"]}, 409, "missing-latencies"),
    ):
        answer = client.post(where, json=body)
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:secateurs:{kind}"), body
    answer = client.get("/v1/spaces/nothing")
    assert answer.status_code == 404
    assert "vgg16" in answer.json()["detail"]
