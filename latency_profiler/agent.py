"""The agent of one device: leases work, measures it, hands it in, and begins again.

It holds no state but its spool: whatever happens to the agent or to the service, a lease expires and its work is
given out anew, and an upload that was sent twice is stored once. The service being away is no error; being refused is.
It measures in another process (`isolation`), and keeps its lease while that works or waits for its turn.
"""

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from platformdirs import user_state_path

from latency_profiler.client import Client
from latency_profiler.device import agent_version, fingerprint, host
from latency_profiler.errors import InvalidInput, NoMeasuringProcess, SecateursError, ServiceError
from latency_profiler.isolation import LOOK_SECONDS, PATIENCE, Bench, Turn
from latency_profiler.measuring import measure_groups
from latency_profiler.runtimes.base import DTYPES, Settings, names, open_runtime
from latency_profiler.spool import Spool
from latency_profiler.wire import pause, temporary

log = logging.getLogger("secateurs.agent")
MOST_ITEMS = 32
LEASE_SHARE = 0.4
"""Of a lease's seconds, how much may be spent measuring; the rest is for handing in."""
RENEWALS = 4
"""How often a lease is renewed in its time."""
REFUSED = (401, 403, 404)
"""Statuses that no repetition changes: a wrong token, another device's token, an unknown device."""


@dataclass(frozen=True, slots=True)
class Options:
    """What an agent is started with."""

    server: str
    device: str
    token: str
    runtime: str = "onnxruntime"
    settings: Settings = field(default_factory=Settings)
    spool: Path | None = None
    """None is a folder of the user's, per server and device."""
    once: bool = False
    """End when there is nothing to measure, or the service is away."""
    seed: int = 0
    """Of the order in which layers are measured."""
    patience: float = PATIENCE
    """Seconds after which a measurement hangs."""
    lock: Path | None = None
    """The file that agents of this machine hold in turn; None is the one that all of them know."""


@dataclass
class Lease:
    """Work that belongs to this agent for `seconds`, unless it is renewed."""

    id: str
    items: list[dict[str, Any]]
    seconds: float
    renewed: float = field(default_factory=time.monotonic)


class Agent:
    """One device's agent; `stop` may be set from anywhere.

    Raises:
        InvalidInput, RuntimeUnavailable: the options cannot work.
    """

    def __init__(
        self, options: Options, stop: threading.Event | None = None, transport: httpx2.BaseTransport | None = None
    ) -> None:
        self.stop = stop or threading.Event()
        self._options = options
        self._runtime = open_runtime(options.runtime, options.settings)
        self._fingerprint = fingerprint(self._runtime)
        self._identity = {"connection": uuid.uuid4().hex, "host": host()}
        self._client = Client(options.server, options.token, transport=transport, sleep=self.stop.wait)
        self._spool = Spool(options.spool or default_spool(options.server, options.device))
        self._rng = np.random.default_rng(options.seed)
        self._limit = MOST_ITEMS
        usual = self._spool.folder / f"{self._fingerprint.sha256}.usual"
        self._bench = Bench(options.runtime, options.settings, options.patience, usual=usual)
        self._turn = Turn(options.lock)

    def run(self) -> None:
        """Work until stopped (or, with `once`, until there is nothing to do).

        Raises:
            ServiceError: the service refuses this agent, or, with `once`, it is away.
            NoMeasuringProcess: with `once`, nothing can be measured now.
        """
        try:
            self._run()
        finally:
            self._bench.close()
            self._turn.close()

    def _run(self) -> None:
        failures = 0
        while not self.stop.is_set():
            try:
                idle = self._round()
                failures = 0
            except (ServiceError, NoMeasuringProcess) as error:
                if self._options.once or (isinstance(error, ServiceError) and not temporary(error)):
                    raise
                failures += 1
                idle = pause(failures)
                log.warning("%s; trying again in %g s", error, idle)
            if idle and self._options.once:
                return
            self.stop.wait(idle)

    def _round(self) -> float:
        """Hand in what waits, lease, measure, hand in; seconds until the next round."""
        self._hand_in()
        answer = self._client.lease(
            self._options.device, self._fingerprint.to_json(), agent_version(), self._limit, **self._identity
        )
        try:
            poll = float(answer["poll_seconds"])
            lease = Lease(str(answer["lease_id"]), answer["items"], float(answer["lease_seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceError(502, {"detail": f"the service's lease cannot be read: {error}"}) from error
        if not lease.items:
            return max(poll, 0.1)
        self._measure(lease)
        self._hand_in()
        return 0.0

    def _measure(self, lease: Lease) -> None:
        """Wait for this agent's turn on the machine, measure for a part of the lease's time, and spool it."""
        self._bench.waiting = lambda: self._keep(lease)
        while not (taken := self._turn.take()) and not self.stop.wait(LOOK_SECONDS / 20):
            self._keep(lease)
        if not taken or self.stop.is_set():
            return
        began = time.monotonic()
        until = began + LEASE_SHARE * lease.seconds
        try:
            results = measure_groups(
                self._bench.measure, lease.items, self._rng,
                lambda: self._may_go_on(until), lambda: not self.stop.is_set(), self.stop.wait,
            )  # fmt: skip
        finally:
            self._turn.give_back()
        if not results:  # stopped before any network was measured often enough; the lease runs out
            return
        seconds = time.monotonic() - began
        self._limit = int(np.clip((until - began) / (seconds / len(results)), 1, MOST_ITEMS))
        log.info("measured %d of %d in %.1f s", len(results), len(lease.items), seconds)
        self._spool.put(
            {
                "upload_id": uuid.uuid4().hex,
                "lease_id": lease.id,
                "fingerprint": self._fingerprint.sha256,
                "results": results,
            }
        )

    def _keep(self, lease: Lease) -> None:
        """Renew the lease from time to time; if that fails it may run out, and late results still count."""
        if time.monotonic() - lease.renewed < lease.seconds / RENEWALS:
            return
        lease.renewed = time.monotonic()
        try:
            self._client.lease(
                self._options.device, self._fingerprint.to_json(), agent_version(), 0, renew=lease.id, **self._identity
            )
        except ServiceError as error:
            log.info("the lease could not be renewed: %s", error)

    def _may_go_on(self, until: float) -> bool:
        return time.monotonic() < until and not self.stop.is_set()

    def _hand_in(self) -> None:
        """Hand in every upload of the spool; one that the service will never take is dropped."""
        for upload in self._spool.pending():
            try:
                stored = self._client.measurements(self._options.device, upload)
                log.info("handed in %d results: %s", len(upload["results"]), stored)
            except ServiceError as error:
                if error.status in REFUSED or temporary(error):
                    raise
                log.warning("upload %s was refused (%s) and is dropped", upload["upload_id"], error)
            self._spool.drop(upload)


class JsonLines(logging.Formatter):
    """What the agent says, as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (seconds since 1970), level and message."""
        return json.dumps({"time": record.created, "level": record.levelname, "message": record.getMessage()})


def run(options: Options) -> None:
    """Run an agent in this process until SIGTERM or SIGINT; a second signal ends it at once.

    Raises:
        SecateursError: the agent cannot work, with a message for its user.
    """
    agent = Agent(options)

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        agent.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log.info("measuring for %r at %s with %s", options.device, options.server, options.runtime)
    agent.run()


def default_spool(server: str, device: str) -> Path:
    """The user's folder for what an agent could not hand in yet."""
    digest = hashlib.sha256(f"{server} {device}".encode()).hexdigest()[:16]
    return user_state_path("secateurs") / "agent" / digest


def read_token(token: str | None, file: Path | None) -> str:
    """The device's token: given, in a file, or in `SECATEURS_TOKEN`.

    Raises:
        InvalidInput: there is none.
    """
    try:
        found = token or (file.read_text().strip() if file else os.environ.get("SECATEURS_TOKEN", ""))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the token file cannot be read: {error}") from error
    if not found:
        raise InvalidInput("no token: give --token or --token-file, or set SECATEURS_TOKEN")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m latency_profiler.agent`: exit status 0 when stopped, 1 when the agent cannot work."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    if given.json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
    try:
        settings = Settings(given.threads, given.batch, given.dtype)
        token = read_token(given.token, given.token_file)
        run(Options(given.server, given.device, token, given.runtime, settings, given.spool, given.once))
    except (SecateursError, OSError) as error:  # of the spool: a full disk, a file where a folder should be
        if given.json:
            log.error("%s", error)
        else:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Measure layers on this machine for a Secateurs service."
    parser = argparse.ArgumentParser(prog="python -m latency_profiler.agent", description=about)
    parser.add_argument("--server", required=True, help="address of the service, e.g. http://127.0.0.1:8740")
    parser.add_argument("--device", required=True, help="name under which this device was registered")
    parser.add_argument("--token", help="the device's token (visible to other users of this machine)")
    parser.add_argument("--token-file", type=Path, help="file that holds it; else SECATEURS_TOKEN is read")
    parser.add_argument("--runtime", default="onnxruntime", help=f"one of {', '.join(names())}")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument("--batch", type=int, default=1, help="images per run")
    parser.add_argument("--dtype", default="float32", help=f"one of {', '.join(DTYPES)}, if the runtime has it")
    parser.add_argument("--spool", type=Path, help="folder for measurements that could not be handed in yet")
    parser.add_argument("--json", action="store_true", help="log one JSON object a line")
    parser.add_argument("--once", action="store_true", help="end when there is nothing to measure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
