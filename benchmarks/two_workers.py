"""Candidates per second with two workers, pinned to one core each, against one worker on one core.

    python benchmarks/two_workers.py

It starts a service in a folder of its own, pinned with its worker to a first core, and runs one search; then a worker
for the queue `evaluate` on a second core, and the same search again. The first generation is left out of both, since
the second worker needs some seconds to load torch and the images. Both searches must judge the same candidates with the
same scores. Times are those at which events arrive, exact to half a second.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from latency_profiler.client import Client

GENERATIONS, POPULATION = 3, 24
LIMIT_SECONDS = 145.0
PORT = 8741
JOB = {
    "space": "mobilenet_v1", "width": 0.5, "dataset": "coloured", "effort": "smoke", "baselines": False,
    "constraints": [{"metric": "flops", "max": 1_500_000}],
    "training": {"epochs": 1, "validation_images": 750},
    "search": {"generations": GENERATIONS, "population": POPULATION, "recalibration_images": 750},
}  # fmt: skip
Candidate = tuple[Any, ...]


def two_workers() -> dict[str, Any]:
    """The measurement as one row.

    Raises:
        RuntimeError: there are no two cores, a search took too long, or the searches differ.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise RuntimeError("two workers on a core each need two cores")
    deadline = time.monotonic() + LIMIT_SECONDS
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        home = Path(folder)
        _write_images(home / "data" / "coloured.npz")
        up = [sys.executable, "-m", "service.cli", "up", "--home", folder, "--port", str(PORT), "--no-agent"]
        with _pinned(up, first, home), _client(home, deadline) as client:
            client.add_dataset({"name": "coloured", "kind": "npz", "path": "coloured.npz"})
            alone, by_one = _search(client, deadline)
            celery = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "evaluate", "-c", "1",
                      "--without-gossip", "--without-mingle", "--loglevel", "warning"]  # fmt: skip
            with _pinned(celery, others[0], home):
                together, by_two = _search(client, deadline)
    if by_one != by_two:
        raise RuntimeError("two workers judged other candidates than one, or gave other scores")
    row = {"ours": together, "reference": alone, "ratio": together / alone, "unit": "candidates/s"}
    return {"name": "two_workers", **{name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}}


@contextmanager
def _pinned(command: list[str], core: int, home: Path) -> Iterator[None]:
    """A process that, with all that it starts, runs on one core; its log lies in `home`."""
    with (home / f"core{core}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(home),
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(home: Path) -> Mapping[str, str]:
    """Settings of the default service, and the broker that it has started, if it has."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SECATEURS_")}
    socket = home / "broker" / "broker.sock"
    broker = {"SECATEURS_BROKER_URL": f"redis+socket://{socket}"} if socket.exists() else {}
    return {**env, **broker, "SECATEURS_HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def _client(home: Path, deadline: float) -> Iterator[Client]:
    log = home / f"core{min(os.sched_getaffinity(0))}.log"
    while "is ready" not in log.read_text():
        _pause(deadline)
    known = json.loads((home / "client.json").read_text())
    with Client(known["server"], known["key"]) as client:
        yield client


def _search(client: Client, deadline: float) -> tuple[float, list[Candidate]]:
    """Candidates per second from the second generation on, and all candidates with their scores."""
    job_id, arrivals = client.submit(JOB)["id"], []
    for event in client.events(job_id):
        if event["event"] == "generation":
            arrivals.append(time.monotonic())
        if len(arrivals) == GENERATIONS or time.monotonic() > deadline:
            break
    client.cancel(job_id)
    while client.job(job_id)["finished_at"] is None:
        _pause(deadline)
    if len(arrivals) < GENERATIONS:
        raise RuntimeError(f"the search ended early, or took more than {LIMIT_SECONDS:g} s")
    rows = client.all_candidates(job_id)
    judged = [(row["generation"], row["encoding"], row["proxy_accuracy"], row["proxy_loss"]) for row in rows]
    return (GENERATIONS - 1) * POPULATION / (arrivals[-1] - arrivals[0]), sorted(judged)


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"it took more than {LIMIT_SECONDS:g} s")
    time.sleep(0.1)


def _write_images(path: Path) -> None:
    """5,000 noisy images of 32 x 32 pixels whose colour tells their class, of 10."""
    random, arrays = np.random.default_rng(0), {}
    colours = random.integers(60, 196, (10, 3))
    for part, count in (("train", 5000), ("test", 500)):
        labels = np.arange(count) % 10
        noise = random.normal(0, 60, (count, 32, 32, 3))
        arrays[f"{part}_images"] = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)


if __name__ == "__main__":
    print(json.dumps(two_workers()))
