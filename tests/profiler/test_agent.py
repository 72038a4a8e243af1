"""The agent against a service in memory that gets lost, forgets and refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from latency_profiler import agent as agents
from latency_profiler.agent import Agent, Options
from latency_profiler.device import fingerprint
from latency_profiler.errors import InvalidInput, ServiceError, ServiceUnreachable
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.measuring import APART, GROUP_SIZE, failure, measure_groups, measure_work
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.runtimes.simulated import EMPTY_SECONDS, Simulated
from latency_profiler.spaces.registry import get_space
from latency_profiler.timing import TAIL, Stopwatch

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
LARGEST_FACTS = 32 << 10
"""Bytes of conditions that the service takes."""


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


def test_a_percentile_that_decides_takes_more_runs_and_fits_into_an_upload() -> None:
    plain, tail = network_item(1), network_item(2)
    tail["payload"]["statistic"] = "p90"
    results = measure_work(Simulated(Settings()), [plain, tail], np.random.default_rng(0))
    runs = {one["work_id"]: len(one["conditions"]["singles"]) for one in results}
    assert runs[2] >= TAIL.least > runs[1] / TAIL.singles
    assert len(json.dumps(results[0]["conditions"])) < LARGEST_FACTS
    assert len(json.dumps(results[1]["conditions"])) < LARGEST_FACTS


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


def test_broken_items_are_results_with_a_reason() -> None:
    wrong_key = {**layer_item(1, 16), "key": "conv:1>2"}
    no_layer = {**layer_item(2, 16), "payload": {}}
    unknown = {**layer_item(3, 16), "kind": "dance"}
    results = measure_work(
        Simulated(Settings()), [wrong_key, no_layer, unknown, layer_item(4, 16)], np.random.default_rng(0)
    )
    errors = {one["work_id"]: one.get("error") for one in results}
    assert "is the layer 'conv-k3s1p1-8x8-bn-relu:8>16'" in errors[1]
    assert errors[2] == "KeyError: 'layer'"
    assert "cannot measure 'dance'" in errors[3]
    assert errors[4] is None


class Fragile(Simulated):
    """Fails while running one layer, in the words of a native library."""

    def load_layer(self, layer: Layer) -> Any:
        return Stopwatch(self._fail) if layer.c_out == 16 else super().load_layer(layer)

    def _fail(self) -> None:
        raise RuntimeError("kernel \0 \udcff" + "x" * 5000)


def test_a_layer_that_fails_while_running_spoils_no_other() -> None:
    items = [layer_item(1, 16), layer_item(2, 24)]
    results = {one["work_id"]: one for one in measure_work(Fragile(Settings()), items, np.random.default_rng(0))}
    assert results[1]["error"].startswith("RuntimeError: kernel   \\udcff")
    assert len(results[1]["error"]) == 1000
    assert results[2]["seconds"] > 0


def test_the_order_is_shuffled_by_the_seed() -> None:
    items = [layer_item(i, 8 + i) for i in range(1, 30)]

    def order(seed: int) -> list[int]:
        return [one["work_id"] for one in measure_work(Simulated(Settings()), items, np.random.default_rng(seed))]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(1, 30)) != order(0)


def test_measuring_ends_with_the_lease_but_not_empty_handed() -> None:
    items = [layer_item(i, 8 + i) for i in range(1, 30)]
    results = measure_work(Simulated(Settings()), items, np.random.default_rng(0), lambda: False)
    assert len(results) == GROUP_SIZE


class Restless:
    """Measures; `unsteady` of the calls for a key are unsteady."""

    def __init__(self, unsteady: int) -> None:
        self.unsteady, self.calls = unsteady, list[str]()

    def __call__(self, items: Sequence[Json], seed: int) -> list[Json]:
        return [self._result(item) for item in items]

    def _result(self, item: Json) -> Json:
        self.calls.append(item["key"])
        nth = self.calls.count(item["key"])
        wild = nth <= self.unsteady and item["work_id"] == 3
        about = {"seconds": float(nth), "iqr": 0.5 / nth if wild else 0.0, "steady": not wild, "values": [float(nth)]}
        return {"work_id": item["work_id"], "key": item["key"], **about, "conditions": {"at": f"time {nth}"}}


@pytest.mark.parametrize("unsteady", [1, 2])
def test_what_is_unsteady_is_measured_again_when_all_else_is_done(unsteady: int) -> None:
    items, measure = [layer_item(i, 8 + i) for i in range(1, 30)], Restless(unsteady)
    results = {one["work_id"]: one for one in measure_groups(measure, items, np.random.default_rng(0))}
    assert measure.calls[-1] == items[2]["key"]
    assert len(measure.calls) == len(items) + 1
    result = results[3]
    assert (result["seconds"], result["steady"]) == (2.0, unsteady == 1), "the surer one stands, flagged if unsteady"
    other = {"seconds": 1.0, "iqr": 0.5, "steady": False, "values": [1.0], "speed": 1.0, "at": "time 1"}
    assert result["conditions"]["others"] == [other]
    assert "others" not in results[4]["conditions"]


class Moody:
    """Measures networks in times that are told; None is a failure."""

    def __init__(self, *times: tuple[float, float] | None, yardstick: float | None = None) -> None:
        self.times, self.yardstick = list(times), yardstick

    def __call__(self, items: Sequence[Json], seed: int) -> list[Json]:
        assert len(items) == 1
        if (told := self.times.pop(0)) is None:
            return [failure(items[0], "lost")]
        conditions = {"at": "now", "p90": told[1], "yardstick": self.yardstick}
        figures = {"seconds": told[0], "iqr": 0.0, "steady": True, "values": [told[0]], "conditions": conditions}
        return [{"work_id": items[0]["work_id"], **figures}]


def test_the_middle_of_three_visits_is_a_networks_time() -> None:
    measure = Moody((1.0, 9.0), (3.0, 4.0), (2.0, 8.0))
    [result] = measure_groups(measure, [network_item(1)], np.random.default_rng(0))
    assert (result["seconds"], measure.times) == (2.0, [])
    assert [one["values"] for one in result["conditions"]["others"]] == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("speeds", "seconds"),
    [
        ([1.0, 0.8, 0.8, 0.95, 1.05], 4.0),
        ([0.8, 1.2, *[0.8] * 4, 0.95, 0.8, 0.8], 7.0),
        ([0.8, 1.2, *[0.8] * 7], 5.0),
    ],
    ids=["three that are close", "one that is close", "none that is close"],
)
def test_a_network_is_visited_more_often_where_the_machine_is_slower_than_usual(
    speeds: list[float], seconds: float
) -> None:
    """And the middle of the visits close to the usual speed counts."""

    def measure(items: Sequence[Json], seed: int) -> list[Json]:
        nth = next(visits)
        conditions = {"at": "now", "p90": 1.0, "speed": speeds[nth]}
        figures = {"iqr": 0.1 / (nth + 1), "steady": True, "values": [1.0], "conditions": conditions}
        return [{"work_id": items[0]["work_id"], "seconds": float(nth + 1), **figures}]

    visits = iter(range(len(speeds)))
    [result] = measure_groups(measure, [network_item(1)], np.random.default_rng(0))
    assert (result["seconds"], next(visits, None)) == (seconds, None), "and no more often"
    assert [one["speed"] for one in result["conditions"]["others"]] == [
        speed for nth, speed in enumerate(speeds, 1) if nth != seconds
    ]


def test_a_layer_measured_far_from_the_usual_speed_is_measured_again() -> None:
    def measure(items: Sequence[Json], seed: int) -> list[Json]:
        speed, seconds = next(visits)
        figures = {"iqr": 0.0, "steady": True, "values": [1.0], "conditions": {"at": "now", "speed": speed}}
        return [{"work_id": items[0]["work_id"], "seconds": seconds, **figures}]

    visits = iter([(0.8, 1.0), (0.95, 2.0)])
    [result] = measure_groups(measure, [layer_item(1, 8)], np.random.default_rng(0))
    assert (result["seconds"], result["conditions"]["speed"]) == (2.0, 0.95)


def test_where_a_percentile_decides_visits_are_ordered_by_it() -> None:
    item = network_item(1)
    item["payload"]["statistic"] = "p90"
    [result] = measure_groups(Moody((1.0, 9.0), (3.0, 4.0), (2.0, 8.0)), [item], np.random.default_rng(0))
    assert result["conditions"]["p90"] == 8.0
    [result] = measure_groups(Moody((1.0, 7.0), (3.0, 4.0), (2.0, 8.0)), [item], np.random.default_rng(0))
    assert result["conditions"]["p90"] == 7.0


@pytest.mark.parametrize(("yardstick", "apart"), [(None, 0), (1e-4, 2)])
def test_visits_lie_apart_where_others_can_disturb(yardstick: float | None, apart: int) -> None:
    waited = list[float]()
    measure = Moody(*[(1.0, 1.0)] * 3, yardstick=yardstick)
    measure_groups(measure, [network_item(1)], np.random.default_rng(0), wait=waited.append)
    assert waited == pytest.approx([APART - 0.1] * apart, abs=0.1)


def test_every_network_has_its_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was measured last and comes first in the next round."""
    clock, at = [0.0], dict[int, list[float]]()
    monkeypatch.setattr("latency_profiler.measuring.time.monotonic", lambda: clock[0])

    def measure(items: Sequence[Json], seed: int) -> list[Json]:
        results = []
        for item in items:
            at.setdefault(item["work_id"], []).append(clock[0])
            conditions = {"at": "now", "p90": 1.0, "yardstick": 1e-4}
            about = {"seconds": 1.0, "iqr": 0.0, "steady": True, "values": [1.0], "conditions": conditions}
            results.append({"work_id": item["work_id"], **about})
        clock[0] += 0.7
        return results

    def wait(seconds: float) -> None:
        clock[0] += seconds

    items = [layer_item(1000 + i, 8 + i) for i in range(20)] + [network_item(i) for i in range(1, 30)]
    measure_groups(measure, items, np.random.default_rng(0), wait=wait)
    gaps = [after - before for times in at.values() for before, after in pairwise(times)]
    assert len(gaps) == 2 * 29
    assert min(gaps) >= APART
    assert clock[0] < 15, "and no longer than that takes"


def test_visits_end_when_one_fails_or_the_agent_is_stopped() -> None:
    [result] = measure_groups(Moody((1.0, 1.0), None), [network_item(1)], np.random.default_rng(0))
    assert result["seconds"] == 1.0
    [result] = measure_groups(Moody(None), [network_item(1)], np.random.default_rng(0))
    assert result["error"] == "lost"
    stopped = Moody((1.0, 1.0))
    [result] = measure_groups(stopped, [network_item(1)], np.random.default_rng(0), again=lambda: False)
    assert result["seconds"] == 1.0


def test_a_second_measurement_that_fails_or_has_no_time_leaves_the_first() -> None:
    def fails(items: Sequence[Json], seed: int) -> list[Json]:
        return [failure(item, "lost") for item in items] if wild.calls else wild(items, seed)

    wild = Restless(9)
    [first] = measure_groups(fails, [layer_item(3, 11)], np.random.default_rng(0))
    assert (first["seconds"], first["steady"]) == (1.0, False)
    [first] = measure_groups(
        Restless(9), [layer_item(3, 11)], np.random.default_rng(0), again=lambda: False
    )  # fmt: skip
    assert first["seconds"] == 1.0


def test_a_canary_is_measured_like_its_layer() -> None:
    item = layer_item(1, 16)
    canary = {**item, "work_id": 2, "kind": "canary", "key": f"{item['key']}@7"}
    layer_result, again = sorted(
        measure_work(Simulated(Settings()), [item, canary], np.random.default_rng(0)), key=lambda one: one["work_id"]
    )
    assert (again["kind"], again["key"]) == ("canary", canary["key"])
    assert again["seconds"] == pytest.approx(layer_result["seconds"], rel=0.05), "less the empty run, too"


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
