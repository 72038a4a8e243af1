"""The agent against a service in memory that gets lost, forgets and refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest

from latency_profiler import agent as agents
from latency_profiler.agent import Agent, Options
from latency_profiler.device import fingerprint
from latency_profiler.errors import InvalidInput, ServiceError, ServiceUnreachable
from latency_profiler.isolation import Turn
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.measuring import failure
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.runtimes.simulated import EMPTY_SECONDS, Simulated
from latency_profiler.spaces.registry import get_space

Json = dict[str, Any]
Interfere = Callable[[str, Json], httpx2.Response | None]


def layer_item(work_id: int, c_out: int) -> Json:
    layer = Layer(Op.CONV, 8, c_out, 8, 3, 1, 1, Activation.RELU, norm=True)
    return {"work_id": work_id, "kind": "layer", "key": layer.key, "payload": {"layer": layer.to_json()}}


def network_item(work_id: int) -> Json:
    space = get_space("resnet20", 8, 0.5, 10)
    nodes = [
        {"name": node.name, "layer": node.layer.to_json(), "input": node.input, "shortcut": node.shortcut}
        for node in space.nodes(space.channels(space.smallest))
    ]
    payload = {"nodes": nodes, "space_key": space.key, "channels": [], "purpose": "fit"}
    return {"work_id": work_id, "kind": "network", "key": "network", "payload": payload}


class Service:
    """Leases its items until they are measured; `interfere` may answer, or raise, instead."""

    def __init__(self, items: list[Json], interfere: Interfere = lambda path, body: None) -> None:
        self.waiting = {item["work_id"]: item for item in items}
        self.uploads: dict[str, list[Json]] = {}
        self.interfere, self.leases = interfere, list[Json]()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body, path = json.loads(request.content), request.url.path.rsplit("/", 1)[1]
        answer = self.interfere(path, body)
        return answer or (self._lease(body) if path == "leases" else self._store(body))

    def _lease(self, body: Json) -> httpx2.Response:
        self.leases.append(body)
        items = list(self.waiting.values())[: body["limit"]]
        lease = {"lease_id": "l", "lease_seconds": 60, "table_id": "t", "poll_seconds": 0.01, "items": items}
        return httpx2.Response(200, json=lease)

    def _store(self, body: Json) -> httpx2.Response:
        if body["upload_id"] not in self.uploads:
            self.uploads[body["upload_id"]] = body["results"]
            for result in body["results"]:
                self.waiting.pop(result["work_id"], None)
        return httpx2.Response(200, json={"stored": len(body["results"]), "repeated": 0, "failed": 0})

    @property
    def results(self) -> dict[int, Json]:
        return {one["work_id"]: one for results in self.uploads.values() for one in results}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Agent]:
    """An agent on the simulated device that does not wait."""
    monkeypatch.setattr(agents, "pause", lambda failures: 0.0)
    monkeypatch.setattr("latency_profiler.wire.pause", lambda attempt: 0.0)

    def make(service: Service, *, once: bool = True, **more: Any) -> Agent:
        more = {"lock": tmp_path / "lock", "runtime": "simulated"} | more
        options = Options("http://service", "bench", "t", spool=tmp_path / "spool", once=once, **more)
        return Agent(options, transport=httpx2.MockTransport(service))

    return make


Start = Callable[..., Agent]


def spooled(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "spool").glob("*.json"))


def test_everything_that_is_leased_is_measured_and_handed_in(start: Start, tmp_path: Path) -> None:
    items = [layer_item(i, 8 + i) for i in range(1, 40)] + [network_item(100)]
    service = Service(items)
    start(service).run()
    assert set(service.results) == {item["work_id"] for item in items}
    assert service.waiting == {}
    assert spooled(tmp_path) == []
    assert service.leases[0]["fingerprint"] == fingerprint(Simulated(Settings())).to_json()
    for item in items[:3]:
        result, mean = service.results[item["work_id"]], Simulated(Settings()).load_layer(layer(item)).mean
        assert result["seconds"] == pytest.approx(mean - EMPTY_SECONDS, rel=0.05), "less the empty run"
        assert np.median(result["values"]) == pytest.approx(mean, rel=0.05), "raw values hold it"
        assert result["conditions"]["empty_run"] == pytest.approx(EMPTY_SECONDS, rel=0.05)
    network = service.results[100]
    assert network["seconds"] == pytest.approx(np.median(network["values"])), "a network keeps its call"
    told = network["conditions"]
    assert told["p90"] == pytest.approx(np.percentile(told["singles"], 90))
    assert {"load", "at", "agent", "loops", "warmup", "outliers"} <= told.keys()
    assert told["runtime"] == f"simulated {Simulated.version}"


def test_what_a_machine_usually_takes_lies_beside_what_waits(start: Start, tmp_path: Path) -> None:
    start(Service([layer_item(1, 8)]), runtime="onnxruntime").run()
    sha256 = fingerprint(open_runtime("onnxruntime", Settings())).sha256
    assert [file.name for file in (tmp_path / "spool").iterdir()] == [f"{sha256}.usual"]


def layer(item: Json) -> Layer:
    return Layer.from_json(item["payload"]["layer"])


def test_a_lost_answer_is_handed_in_again_under_the_same_id(start: Start, tmp_path: Path) -> None:
    """The service stored the batch, but its answers never came: nothing is measured twice."""
    seen: list[str] = []

    def interfere(path: str, body: Json) -> None:
        if path == "measurements":
            seen.append(body["upload_id"])
            if len(seen) <= 6:
                service._store(body)
                raise httpx2.ReadError("connection reset")

    service = Service([layer_item(1, 16)], interfere)
    agent = start(service, once=False)
    stopping(service, agent).run()
    assert len(seen) == 7
    assert len(set(seen)) == len(service.uploads) == 1


def stopping(service: Service, agent: Agent) -> Agent:
    """Stop the agent when it asks for work and there is none."""
    inner = service._lease

    def lease(body: Json) -> httpx2.Response:
        if not service.waiting:
            agent.stop.set()
        return inner(body)

    service._lease = lease  # type: ignore[method-assign]
    return agent


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_a_service_that_is_busy_is_asked_again(start: Start, status: int) -> None:
    busy = iter([httpx2.Response(status, json={"detail": "later"})] * 2)
    service = Service([layer_item(1, 16)], lambda path, body: next(busy, None))
    stopping(service, start(service, once=False)).run()
    assert set(service.results) == {1}


def test_an_agent_measures_in_its_turn_and_gives_it_back(start: Start, tmp_path: Path) -> None:
    other, free = Turn(tmp_path / "lock"), list[bool]()
    agent = start(Service([layer_item(1, 16)]))
    measure = agent._bench.measure

    def watched(items: Sequence[Json], seed: int) -> list[Json]:
        free.append(other.take())
        return measure(items, seed)

    agent._bench.measure = watched  # type: ignore[method-assign]
    try:
        agent._run()
    finally:
        agent._bench.close()
    assert set(free) == {False}
    assert other.take()
    other.close()


@pytest.mark.timeout(60)
def test_an_agent_that_waits_for_its_turn_keeps_its_lease(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "RENEWALS", 1e9)
    other = Turn(tmp_path / "lock")
    assert other.take()
    service = Service([layer_item(1, 16)], lambda path, body: other.give_back() if "renew" in body else None)
    start(service).run()
    assert service.results.keys() == {1}


def test_a_lease_holds_what_can_be_measured_in_a_part_of_its_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixty seconds 24, in which two items of ten seconds begin and a third does not fit."""
    clock = [0.0]

    def slow(_measure: object, items: Sequence[Json], *_: object) -> list[Json]:
        clock[0] += 10.0 * len(items)
        return [failure(item, "slow") for item in items]

    monkeypatch.setattr(agents, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(agents, "measure_groups", slow)
    service = Service([layer_item(at, 8 + at) for at in range(1, 37)])
    start(service).run()
    assert [body["limit"] for body in service.leases] == [agents.MOST_ITEMS, 2, 2, 2]


def test_what_could_not_be_handed_in_waits_for_the_next_agent(start: Start, tmp_path: Path) -> None:
    away = True

    def interfere(path: str, body: Json) -> None:
        if path == "measurements" and away:
            raise httpx2.ConnectError("connection refused")

    service = Service([layer_item(1, 16), layer_item(2, 24)], interfere)
    with pytest.raises(ServiceUnreachable):
        start(service).run()
    (file,) = spooled(tmp_path)
    kept = json.loads(file.read_text())
    away = False
    start(service).run()
    assert service.uploads == {kept["upload_id"]: kept["results"]}, "exactly what the first agent measured"
    assert spooled(tmp_path) == []


def test_a_service_that_comes_back_finds_its_agent(start: Start) -> None:
    outage = iter([httpx2.ConnectError("refused")] * 10)

    def interfere(path: str, body: Json) -> None:
        if error := next(outage, None):
            raise error

    service = Service([layer_item(1, 16)], interfere)
    stopping(service, start(service, once=False)).run()
    assert set(service.results) == {1}


def test_a_batch_of_another_fingerprint_is_dropped_and_measured_anew(start: Start, tmp_path: Path) -> None:
    conflicts = iter([httpx2.Response(409, json={"detail": "another fingerprint"})])
    refused: list[str] = []

    def interfere(path: str, body: Json) -> httpx2.Response | None:
        answer = next(conflicts, None) if path == "measurements" else None
        refused.extend([body["upload_id"]] if answer else [])
        return answer

    service = Service([layer_item(1, 16)], interfere)
    start(service).run()
    assert set(service.results) == {1}
    assert len(refused) == 1
    assert refused[0] not in service.uploads
    assert spooled(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_agent_ends_and_keeps_what_it_measured(start: Start, tmp_path: Path, status: int) -> None:
    def interfere(path: str, body: Json) -> httpx2.Response | None:
        return httpx2.Response(status, json={"detail": "not yours"}) if path == "measurements" else None

    with pytest.raises(ServiceError, match="not yours"):
        start(Service([layer_item(1, 16)], interfere), once=False).run()
    assert len(spooled(tmp_path)) == 1


def test_a_file_that_is_no_upload_is_put_aside(start: Start, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "half.json").write_text('{"results": [')
    start(Service([])).run()
    assert [file.name for file in (tmp_path / "spool").iterdir()] == ["half.broken"]


def test_token_is_given_read_or_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEURS_TOKEN", raising=False)
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert agents.read_token("given", file) == "given"
    assert agents.read_token(None, file) == "from-file"
    with pytest.raises(InvalidInput, match="set SECATEURS_TOKEN"):
        agents.read_token(None, None)
    with pytest.raises(InvalidInput, match="cannot be read"):
        agents.read_token(None, tmp_path / "none")
    monkeypatch.setenv("SECATEURS_TOKEN", "from-environment")
    assert agents.read_token(None, None) == "from-environment"


def test_importing_the_agent_loads_no_server_and_no_torch() -> None:
    code = "import sys, latency_profiler.agent; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "httpx2" in loaded
    assert not {"fastapi", "sqlalchemy", "celery", "redis", "torch", "onnx", "onnxruntime"} & set(loaded)


class Idle(BaseHTTPRequestHandler):
    """A service without work."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        lease = {"lease_id": "l", "lease_seconds": 60, "table_id": "t", "poll_seconds": 30, "items": []}
        body = json.dumps(lease).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.asked.set()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_signal_ends_the_idle_process_with_status_0(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Idle) as server:
        server.asked = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = launch(f"http://127.0.0.1:{server.server_port}", tmp_path)
        assert server.asked.wait(20)  # type: ignore[attr-defined]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=5)
        assert process.returncode == 0
        server.shutdown()


def test_an_agent_that_cannot_work_says_so_in_one_line(tmp_path: Path) -> None:
    process = launch("http://127.0.0.1:1", tmp_path, "--dtype", "int4")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: dtype is 'int4'")
    _, line = launch("http://127.0.0.1:1", tmp_path, "--dtype", "int4", "--json").communicate(timeout=20)
    assert json.loads(line)["level"] == "ERROR"


def launch(server: str, tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["--server", server, "--device", "bench", "--runtime", "simulated", "--spool", str(tmp_path), *more]
    command = [sys.executable, "-m", "latency_profiler.agent", *arguments]
    environment = {**os.environ, "SECATEURS_TOKEN": "t"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
