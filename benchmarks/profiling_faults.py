"""An agent that is killed again and again, and a service that is: is anything lost, or counted twice?

    python -m benchmarks.profiling_faults

It starts a service in a folder of its own, and an agent of the simulated device whose calls pass through a relay here.
The agent is killed -9 at 50 moments: half of them at a random time after its start, the others when one of its calls
is at a certain point, since those moments last too short to be hit by chance. In 10 of the rounds the service is
killed -9, too, and started again. Then both are left alone until the profile is complete, and its table must hold what
the table of an undisturbed agent holds: the same keys, each once, none failed, and as many as the answers to uploads
say.

The line that it prints says what the kills have hit. It ends with status 1 where a phase was not hit, or a table
differs.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import create_engine, text

from latency_profiler.client import Client

Json = dict[str, Any]
STARTING, MEASURING = "starting", "measuring"
ASKED, GIVEN = "lease asked for, unheard", "lease given, not received"
ARRIVED, STORED = "results sent, unheard", "results stored, not acknowledged"
PLACED = (ASKED, GIVEN, ARRIVED, STORED)
PHASES = (STARTING, MEASURING, *PLACED)
SHOWN = 5
"""Keys that are named where a table differs."""
PROFILE = {"space": "mobilenet_v1", "image_size": 32, "width": 0.5, "classes": 10, "points": 12, "refine": False}
LEASE_SECONDS = "4"
LATEST = 6.0
"""Seconds after an agent's start within which a kill at a random time falls."""
PATIENCE = 120.0


class Service:
    """A service on SQLite with one device, which may be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("SECATEURS_")}
        self._env |= {"SECATEURS_HOME": str(home), "SECATEURS_AGENT_LEASE_SECONDS": LEASE_SECONDS}
        home.mkdir()
        self._admin("migrate")
        self.key = self._admin("create-key", "--name", "faults", "--scope", "admin")
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", "--port", str(self.port),
                   "--log-level", "error"]  # fmt: skip
        with (self.home / "service.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log)
        with self.client() as client:
            _until(lambda: _answers(client))

    def kill(self) -> None:
        """As the system does it when memory runs out."""
        self.process.kill()
        self.process.wait()

    def client(self) -> Client:
        """With all rights."""
        return Client(self.url, self.key)

    def _admin(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "service.admin", *arguments]
        return subprocess.run(command, env=self._env, check=True, capture_output=True, text=True).stdout.strip()


class Relay(ThreadingHTTPServer):
    """Passes an agent's calls on, and says where the agent is; `victim` is killed when a call comes to `aim`."""

    daemon_threads = True

    def __init__(self, service: Service) -> None:
        super().__init__(("127.0.0.1", 0), _Call)
        self.service, self.phase, self.aim = service, STARTING, None
        self.victim: subprocess.Popen[bytes] | None = None
        self.http = httpx2.Client(base_url=service.url, timeout=30)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def at(self, phase: str) -> bool:
        """A call has come to a phase; False where the agent was killed there."""
        self.phase = phase
        if self.aim != phase or self.victim is None:
            return True
        self.aim = None
        self.victim.kill()
        self.victim.wait()
        return False


class _Call(BaseHTTPRequestHandler):
    server: Relay

    def do_POST(self) -> None:
        relay, body = self.server, self.rfile.read(int(self.headers["content-length"]))
        results = self.path.endswith("measurements")
        beat = not results and not json.loads(body)["limit"]
        if not beat and not relay.at(ARRIVED if results else ASKED):
            return self.close()
        try:
            headers = {name: self.headers[name] for name in ("authorization", "content-type")}
            answer = relay.http.post(self.path, content=body, headers=headers)
        except httpx2.TransportError:  # the service is being started again
            return self.close()
        if not beat and not relay.at(STORED if results else GIVEN):
            return self.close()
        if not beat:
            relay.phase = MEASURING
        self.send_response(answer.status_code)
        self.send_header("content-type", answer.headers["content-type"])
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(answer.content)

    def close(self) -> None:
        """Hang up without an answer."""
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


Aims = Sequence[str | None]
"""Where agents are killed, one after the other: in a phase, or (None) at a random time."""


def aims(kills: int, draw: random.Random) -> Aims:
    """Half of them at random times, the others spread over the phases that are too short for that."""
    found = [PLACED[at // 2 % len(PLACED)] if at % 2 else None for at in range(kills)]
    draw.shuffle(found)
    return found


def faults(aims: Aims, restarts: int, draw: random.Random, profile: Json = PROFILE) -> Json:
    """Disturb a profile; what was hit, and how the table differs from an undisturbed one's.

    Args:
        aims: of the kills.
        restarts: of the service, each in a round that also has a kill.
        draw: all that is random here.
        profile: what is asked for.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="secateurs-faults-") as folder:
        with _service(Path(folder) / "calm") as calm:
            expected = _finish(calm, _token(calm, profile), Path(folder) / "calm-spool", calm.url)
        with _service(Path(folder) / "rough") as rough:
            token, spool = _token(rough, profile), Path(folder) / "rough-spool"
            relay, hit = Relay(rough), Counter[str]()
            address = f"http://127.0.0.1:{relay.server_port}"
            restarted = set(draw.sample(range(len(aims)), restarts))
            for at, aim in enumerate(aims):
                moments = [draw.uniform(0, LATEST) for _ in range(2)]
                hit[_round(relay, token, spool, address, aim, moments, at in restarted)] += 1
            found = _finish(rough, token, spool, address)
    return {
        "name": "profiling_faults", "kills": len(aims), "restarts": restarts, "entries": len(expected["keys"]),
        "hit": {phase: hit[phase] for phase in PHASES}, "missing": sorted(expected["keys"] - found["keys"])[:SHOWN],
        "unexpected": sorted(found["keys"] - expected["keys"])[:SHOWN], "twice": found["twice"][:SHOWN],
        "failed": found["failed"], "minutes": (time.monotonic() - began) / 60,
        "acknowledged": found["acknowledged"], "rows": found["rows"], "left_in_spool": found["spooled"],
    }  # fmt: skip


def sound(result: Json) -> bool:
    """Whether every phase was hit, and nothing was lost or counted twice."""
    whole = not any(result[name] for name in ("missing", "unexpected", "twice", "failed", "left_in_spool"))
    return whole and all(result["hit"].values()) and result["acknowledged"] == result["rows"]


def _round(
    relay: Relay, token: str, spool: Path, address: str, aim: str | None, moments: Sequence[float], restart: bool
) -> str:
    """Start an agent, kill it, and return where it was."""
    relay.phase, relay.aim = STARTING, aim
    relay.victim = agent = _agent(token, spool, address)
    if restart:
        time.sleep(moments[0])
        relay.service.kill()
        relay.service.start()
    if aim is None:
        time.sleep(moments[1])
        phase = relay.phase
        agent.kill()
    else:
        _until(lambda: agent.poll() is not None)
        phase = aim
    agent.wait()
    relay.victim = None
    return phase


def _agent(token: str, spool: Path, address: str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "latency_profiler.agent", "--server", address, "--device", "bench", "--runtime",
               "simulated", "--spool", str(spool), *more]  # fmt: skip
    environment = {**os.environ, "SECATEURS_TOKEN": token}
    with (spool.with_suffix(".log")).open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _token(service: Service, profile: Json) -> str:
    with service.client() as client:
        token = str(client.add_device("bench")["token"])
        client.profile("bench", profile)
    return token


def _finish(service: Service, token: str, spool: Path, address: str) -> Json:
    """Let an agent measure all that is left, and read what the table holds then."""
    agent = _agent(token, spool, address)
    with service.client() as client:
        _until(lambda: _complete(client), 30 * PATIENCE)
    agent.send_signal(signal.SIGTERM)
    agent.wait(PATIENCE)
    return _read(service, spool)


def _complete(client: Client) -> bool:
    """Whether the profile is measured, and what it has planned behind it."""
    [profile], device = client.profiles("bench")["items"], client.device("bench")
    return bool(profile["done"]) and not profile["waiting"] + device["waiting"] + device["leased"]


def _read(service: Service, spool: Path) -> Json:
    engine = create_engine(f"sqlite:///{service.home / 'secateurs.db'}")
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT kind || ' ' || key FROM measurements WHERE kind <> 'canary'")).scalars()
        counts = Counter(rows)
        answers = connection.execute(text("SELECT response FROM uploads")).scalars()
        stored = sum(json.loads(answer)["stored"] for answer in answers)
        every = connection.execute(text("SELECT count(*) FROM measurements")).scalar_one()
        failed = connection.execute(text("SELECT count(*) FROM work WHERE state = 'failed'")).scalar_one()
    engine.dispose()
    return {
        "keys": set(counts), "twice": sorted(key for key, count in counts.items() if count > 1), "failed": failed,
        "acknowledged": stored, "rows": every, "spooled": len(list(spool.glob("*.json"))),
    }  # fmt: skip


@contextmanager
def _service(home: Path) -> Iterator[Service]:
    service = Service(home)
    try:
        yield service
    finally:
        service.kill()
        shutil.rmtree(home)


def _answers(client: Client) -> bool:
    with suppress(Exception):  # whatever is wrong while it starts
        client._wire.json("GET", "/healthz", attempts=1)
        return True
    return False


def _until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"it has not happened within {patience:g} s")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str]) -> int:
    """Kills and restarts may be given, as in `20 4`."""
    kills, restarts = map(int, arguments) if arguments else (50, 10)
    draw = random.Random(0)
    result = faults(aims(kills, draw), restarts, draw)
    print(json.dumps(result))
    return 0 if sound(result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
