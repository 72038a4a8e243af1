"""What the benchmarks that run jobs of a service share: resumable submission, waiting, what is kept of a job.

A job's Idempotency-Key is made from its request: a script that is run again finds its jobs and goes on waiting. Server
and key are those of `secateurs up` (SECATEURS_HOME), or SECATEURS_SERVER and SECATEURS_KEY.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latency_profiler.client import TERMINAL, Client
from latency_profiler.device import cpu
from latency_profiler.errors import ServiceUnreachable
from service.commands.login import connect

Json = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
KEPT = (
    "state", "space_key", "spec", "seconds", "result", "warnings", "error", "reproducible", "environment", "created_at",
)  # fmt: skip
POLL = 5.0


def service() -> Client:
    """The running service."""
    return connect(os.environ.get("SECATEURS_SERVER"), os.environ.get("SECATEURS_KEY"))


def run(client: Client, requests: Sequence[Json]) -> list[Json]:
    """The jobs of these requests, each submitted when those before it have ended, so that each can use their work."""
    return [_ended(client, client.submit(request, idempotency_key=_key(request))["id"]) for request in requests]


def kept(job: Json) -> Json:
    """What a result file says of a job, with the day on which it ended; the machine is this one, as the worker's is."""
    at = time.strftime("%Y-%m-%d", time.localtime(job["finished_at"]))
    return {name: job[name] for name in KEPT} | {"measured_with": measured_with() | {"at": at}}


def write(name: str, content: Json) -> Path:
    """A result file, with what its last line was measured with, and when."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content | measured_with(), indent=1) + "\n")
    return path


def measured_with() -> Json:
    """Machine, date and versions; files whose parts can be of several machines have it in each part."""
    found = {"machine": cpu(), "python": platform.python_version(), "at": time.strftime("%Y-%m-%d")}
    for package in ("torch", "onnxruntime"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _key(request: Json) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _ended(client: Client, job_id: str) -> Json:
    """The job when it has ended; a service that is down for a while is waited for."""
    while True:
        with suppress(ServiceUnreachable):
            job: Json = client.job(job_id)
            if job["state"] in TERMINAL:
                return job
        time.sleep(POLL)
