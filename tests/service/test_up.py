"""`secateurs up` with real processes and real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import redis

from latency_profiler.client import Client
from latency_profiler.errors import ServiceError
from service import broker, demo
from service.children import Child
from service.settings import get_settings
from service.up import SOCKET_PATH, Up, UpError, find_broker, locked

REDIS = os.environ.get("SECATEURS_TEST_REDIS", "redis://127.0.0.1:6379/9")
CHILDREN = {"broker", "api", "reconciler", "worker"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Service:
    """One `secateurs up` in a home of its own."""

    def __init__(self, home: Path, *options: str, **settings: str) -> None:
        self.home, self.port = home, free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("SECATEURS_")} | settings
        self.output = home.parent / f"{self.port}.out"
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "up", "--home", str(home), "--port", str(self.port), *options],
                env=env, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def ask(self, question: Callable[[Client], dict[str, Any]]) -> dict[str, Any]:
        known = json.loads((self.home / "client.json").read_text())
        with Client(known["server"], known["key"]) as client:
            return question(client)

    def ready(self) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.said
            return "Secateurs is ready" in self.said

        assert eventually(said, 60), self.said

    @property
    def said(self) -> str:
        return self.output.read_text()

    def descendants(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The home folder of the services of a test."""
    return tmp_path / "place"


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def begin(*options: str, **env: str) -> Service:
        services.append(Service(place, *options, **env))
        return services[-1]

    yield begin
    for service in services:
        service.stop()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_starts_refuses_a_second_one_and_ends_on_ctrl_c(start: Callable[..., Service], place: Path) -> None:
    first = start("--no-agent")
    first.ready()
    assert first.ask(Client.ready)["status"] == "ready"
    assert (place / "client.json").stat().st_mode & 0o777 == 0o600

    second = start("--no-agent")
    assert second.process.wait(20) == 1
    assert f"process {first.process.pid}" in second.said
    assert first.process.poll() is None

    children = first.descendants()
    assert len(children) >= len(CHILDREN)
    begun = time.monotonic()
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(20) == 130
    assert time.monotonic() - begun < 10
    assert gone(children)
    assert "Traceback" not in first.said


def test_a_key_of_another_database_is_made_anew(start: Callable[..., Service], place: Path) -> None:
    """Where the database was removed or another one is used, `up` must not call a service ready that nobody can use."""
    first = start("--no-agent")
    first.ready()
    old = json.loads((place / "client.json").read_text())["key"]
    first.stop()
    for file in place.glob("secateurs.db*"):
        file.unlink()
    second = start("--no-agent")
    second.ready()
    assert second.ask(Client.devices)["items"] == []
    assert json.loads((place / "client.json").read_text())["key"] != old
    assert "a new one is made" in second.said
    assert (place / "client.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [
        (["migrate"], {"SECATEURS_DEVICE": "gpu"}, "SECATEURS_DEVICE: String should match"),
        (["migrate"], {"SECATEURS_TRAINING_PROCESSES": "0"}, "SECATEURS_TRAINING_PROCESSES: Input should be"),
        (["create-key", "--name", "a", "--scope", "submit"], {}, "migrate"),
    ],
)
def test_administration_says_in_one_line_what_is_wrong(
    tmp_path: Path, command: list[str], setting: dict[str, str], said: str
) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SECATEURS_")}
    argv = [sys.executable, "-m", "service.admin", *command]
    env |= {"SECATEURS_HOME": str(tmp_path)} | setting
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert said in line


def test_a_bell_that_nobody_hears_holds_nobody_up(tmp_path: Path) -> None:
    code = "import time; from service import broker; begun = time.monotonic(); print([broker.ring() for _ in range(3)])"
    env = {**os.environ, "SECATEURS_HOME": str(tmp_path), "SECATEURS_BROKER_URL": f"redis+socket://{tmp_path}/none"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(time.monotonic() - begun)"], env=env, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    answers, seconds = done.stdout.splitlines()
    assert answers == "[False, False, False]"
    assert float(seconds) < 4, "it was six seconds for every bell but the first"


def test_bells_cannot_be_counted_where_no_broker_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEURS_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    get_settings.cache_clear()
    monkeypatch.setattr(broker, "app", broker.make_app())
    assert broker.unheard() == 0
    monkeypatch.undo()
    get_settings.cache_clear()


def test_bells_that_ring_at_the_same_time_all_ring_and_a_silent_broker_holds_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent, hold = list[str](), threading.Event()

    def send(task: str, **_: object) -> None:
        sent.append(task)
        hold.wait(0.01 if len(sent) < 9 else 30)

    monkeypatch.setattr(broker.app, "send_task", send)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: broker.ring(), range(8))) == [True] * 8
        assert len(sent) == 8
        stuck = pool.submit(broker.ring)
        assert eventually(lambda: len(sent) == 9, 10)
        assert not broker.ring()
        hold.set()
        assert stuck.result(10)


class Exhausted(Exception):
    """No service is started here."""


def test_a_demo_removes_a_former_demo_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> object:
        raise Exhausted

    monkeypatch.setattr(demo, "_service", refuse)
    service, former = tmp_path / "service", tmp_path / "former"
    for home in (service, former):
        with locked(home):
            (home / "secateurs.db").touch()
    (former / demo.MARK).touch()
    with pytest.raises(demo.DemoError, match="something else"):
        demo._clear(service)
    with locked(former), pytest.raises(UpError, match="in use"):
        demo._clear(former)
    demo._clear(former)
    assert (former.exists(), (service / "secateurs.db").exists()) == (False, True)
    with pytest.raises(Exhausted):
        demo.main(service, keep=True)
    assert not (service / demo.MARK).exists(), "a service that a demo went on with is no demo's"
    with pytest.raises(Exhausted):
        demo.main(former)
    assert (former / demo.MARK).exists()
    demo._clear(former)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux kills children with their parent")
def test_leaves_nothing_when_killed_and_starts_again(start: Callable[..., Service], place: Path) -> None:
    first = start("--no-agent")
    first.ready()
    key = json.loads((place / "client.json").read_text())["key"]
    children = first.descendants()
    first.process.kill()
    first.process.wait()
    assert eventually(lambda: gone(children), 5), [child.cmdline() for child in children if child.is_running()]

    again = start("--no-agent")
    again.ready()
    assert json.loads((place / "client.json").read_text())["key"] == key
    assert again.ask(Client.jobs)["items"] == []


def test_a_child_that_dies_is_started_again(start: Callable[..., Service]) -> None:
    service = start("--no-agent")
    service.ready()
    api = next(child for child in service.descendants() if "service.app:create_app" in child.cmdline())
    api.kill()

    def answers() -> bool:
        try:
            return bool(service.ask(Client.ready))
        except ServiceError:
            return False

    assert eventually(lambda: "api ended with code -9" in service.said and answers(), 30), service.said


JOB = {"space": "mobilenet_v1", "dataset": "digits", "effort": "smoke", "image_size": 8, "width": 0.25,
       "constraints": [{"metric": "flops", "max": 100_000}]}  # fmt: skip


def search(service: Service, **options: Any) -> dict[str, Any]:
    """A job that has ended."""
    service.ready()
    job_id = service.ask(lambda client: client.submit({**JOB, **options}))["id"]

    def ended() -> bool:
        return bool(service.ask(lambda client: client.job(job_id))["finished_at"])

    assert eventually(ended, 240), service.ask(lambda client: client.job(job_id))
    return service.ask(lambda client: client.job(job_id))


def test_a_search_runs_embedded(start: Callable[..., Service]) -> None:
    """Also through the agent, which measures the winner although nothing constrains its latency."""
    job = search(start(), measure_on=["this-machine"])
    assert (job["state"], job["error"]) == ("succeeded", None)
    winner = job["result"]["winner"]
    assert winner["flops"] <= 100_000
    assert 0 < winner["measured_ms"]["this-machine"] < 1000


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_search_runs_on_postgresql_and_redis(start: Callable[..., Service], place: Path, database: str) -> None:
    try:
        redis.Redis.from_url(REDIS).ping()
    except redis.RedisError as error:
        if os.environ.get("SECATEURS_TEST_REQUIRE_SERVERS") == "1":
            pytest.fail(f"Redis is required and does not answer at {REDIS}: {error}")
        pytest.skip("no Redis server")
    service = start("--no-agent", SECATEURS_DATABASE_URL=database, SECATEURS_BROKER_URL=REDIS)
    job = search(service)
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert job["result"]["winner"]["flops"] <= 100_000
    assert not (place / "secateurs.db").exists()
    assert not (place / "logs" / "broker.log").exists()


def test_a_registration_that_was_cut_off_is_made_good_and_no_other_devices_token_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = Up(tmp_path, "127.0.0.1", free_port(), 1, True, lambda _line: None)
    taken = Mock(add_device=Mock(side_effect=ServiceError(409, {"detail": "taken"})))
    replaced = Mock(return_value="scd_new")
    monkeypatch.setattr(up, "_admin", replaced)
    for _ in range(2):
        with pytest.raises(UpError, match="cannot be registered"):
            up._token(taken, {})
    replaced.assert_not_called()
    with pytest.raises(UpError, match="no answer"):
        up._token(Mock(add_device=Mock(side_effect=ServiceError(503, {"detail": "no answer"}))), {})
    assert up._token(taken, {}) == up._token(taken, {}) == "scd_new"
    replaced.assert_called_once_with({}, "new-token", "this-machine")


def test_a_taken_port_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = Up(tmp_path / "home", "127.0.0.1", port, 1, False, lambda _line: None)
        with pytest.raises(UpError, match=f"{port}.*--port"):
            up.run()


def test_the_home_is_free_again_after_use(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(UpError, match="another `secateurs up`"), locked(tmp_path):
            pass


def test_a_broker_is_found_without_a_server_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    server = find_broker()
    assert server is not None
    assert "valkey" in server
    assert b"v=" in subprocess.run([server, "--version"], capture_output=True, check=True).stdout


def test_a_long_home_gets_a_short_socket(tmp_path: Path) -> None:
    for name in ("x" * 120, "with space"):
        up = Up(tmp_path / name, "127.0.0.1", 1, 1, False, print)
        assert SOCKET_PATH.fullmatch(str(up._socket_path()))
        assert up.scratch is not None
        up.scratch.rmdir()


def test_backoff_doubles_for_a_child_that_keeps_dying(tmp_path: Path) -> None:
    child = Child("broken", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], {}, tmp_path / "broken.log")
    delays = []
    for _ in range(3):
        child.start()
        assert child.process is not None
        child.process.wait()
        message = child.tend()
        assert message is not None
        assert "code 3" in message
        assert child.retry_at is not None
        delays.append(child.retry_at - time.monotonic())
    assert delays == pytest.approx([0.5, 1.0, 2.0], abs=0.1)
    assert child.last_line() == "why"


def test_a_child_that_ignores_the_signal_is_killed_with_its_group(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('up', flush=True); "
        "time.sleep(60)"
    )
    child = Child("stubborn", [sys.executable, "-c", code], {}, tmp_path / "stubborn.log")
    child.start()
    assert child.process is not None
    assert eventually(lambda: child.last_line() == "up", 10)
    family = psutil.Process(child.process.pid).children()
    assert len(family) == 1
    child.terminate()
    child.end(time.monotonic() + 0.2)
    assert eventually(lambda: gone(family), 5)
