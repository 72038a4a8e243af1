"""The real agent and client against the real service, joined in this process instead of by a network."""

from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from latency_profiler.agent import Agent, Options
from latency_profiler.client import Client
from latency_profiler.device import fingerprint
from latency_profiler.errors import ServiceError
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from latency_profiler.spaces.registry import get_space
from service import broker

SPACE = get_space("vgg16", 8, 0.25, 10, free_last=True)
PROFILE = {"space": "vgg16", "image_size": 8, "width": 0.25, "classes": 10, "points": 3, "refine": False}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No doorbell reaches a broker."""
    monkeypatch.setattr(broker, "ring", lambda: True)


@pytest.fixture
def wire(client: TestClient) -> httpx2.MockTransport:
    def answer(request: httpx2.Request) -> httpx2.Response:
        names = ("authorization", "content-type", "accept")
        headers = {"authorization": ""} | {name: request.headers[name] for name in names if name in request.headers}
        given = client.request(request.method, str(request.url), content=request.content, headers=headers)
        return httpx2.Response(given.status_code, content=given.content, headers=dict(given.headers))

    return httpx2.MockTransport(answer)


@pytest.fixture
def user(client: TestClient, wire: httpx2.MockTransport) -> Client:
    return Client("http://testserver", client.headers["authorization"].removeprefix("Bearer "), transport=wire)


def agent(token: str, wire: httpx2.MockTransport, folder: Path, settings: Settings | None = None) -> Agent:
    options = Options(
        "http://testserver", "bench", token, "simulated", settings or Settings(), folder / "spool", once=True
    )  # fmt: skip
    return Agent(options, transport=wire)


def test_a_profile_becomes_a_table_that_prices_the_space(
    user: Client, wire: httpx2.MockTransport, tmp_path: Path
) -> None:
    token = user.add_device("bench")["token"]
    user.profile("bench", PROFILE)
    agent(token, wire, tmp_path).run()

    (profile,) = user.profiles("bench")["items"]
    assert (profile["done"], profile["failed"], profile["waiting"]) == (profile["planned"], 0, 0)
    assert user.device("bench")["fingerprint"]["sha256"] == fingerprint(Simulated(Settings())).sha256
    table = LatencyTable.from_json(user.lookup_table("bench"))
    assert set(table.entries) == {layer.key for layer in plan_layers(SPACE, 3)}
    fit = table.fits[SPACE.key]
    assert (fit.fitted_on, fit.held_out) == (64, 8)
    rungs = [SPACE.channels(genes) for genes in SPACE.ladder]
    measured = [Simulated(Settings()).load_network(SPACE.nodes(channels)).mean for channels in rungs]
    off = [table.price(SPACE, one).seconds / seconds - 1 for one, seconds in zip(rungs, measured, strict=True)]
    assert max(map(abs, off)) < 0.05
    assert abs(sum(off) / len(off)) < 0.02, "layers are 4 % faster inside a network of the simulated device"


def test_other_settings_open_another_table(user: Client, wire: httpx2.MockTransport, tmp_path: Path) -> None:
    token = user.add_device("bench")["token"]
    user.profile("bench", PROFILE)
    agent(token, wire, tmp_path).run()
    first = user.lookup_table("bench")
    agent(token, wire, tmp_path, Settings(threads=2)).run()
    second = user.lookup_table("bench")
    assert first["fingerprint"] != second["fingerprint"]
    seconds = [{row["layer"]["c_out"]: row["seconds"] for row in table["entries"]} for table in (first, second)]
    assert seconds[0] != seconds[1]


def test_a_wrong_token_and_an_unknown_device_end_the_agent(
    user: Client, wire: httpx2.MockTransport, tmp_path: Path
) -> None:
    with pytest.raises(ServiceError) as caught:
        agent("scd_wrong", wire, tmp_path).run()
    assert caught.value.status == 401
    token = user.add_device("other")["token"]
    with pytest.raises(ServiceError) as caught:
        agent(token, wire, tmp_path).run()
    assert caught.value.status in (403, 404)
