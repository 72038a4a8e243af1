"""Do winners hold their milliseconds? Thirty jobs under latency budgets, and what their winners take when asked again.

    secateurs up &
    python benchmarks/budget.py

Three devices on this machine (ONNX Runtime, OpenVINO and PyTorch, one thread each; the script starts their agents) with
ten budgets each, spread over what is feasible. The jobs are small (`smoke`, the built-in digits): their latencies are
what counts. When all have ended, every winner is measured by this script: loaded anew three times, runs of all winners
of a device in turn, their median in quiet moments. It prints one JSON line a job and writes results/budget.json after
each device; devices that are there are not done again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import numpy as np
from jobs import RESULTS, measured_with, run, service, write

from latency_profiler.client import Client
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from latency_profiler.yardstick import Yardstick

Json = dict[str, Any]
DEVICES = {"budget-onnxruntime": "onnxruntime", "budget-openvino": "openvino", "budget-torch": "torch"}
BUDGETS = 10
LOADS, RUNS = 3, 60
REFILL = 16
"""Runs that are not timed before each that is: the caches were the other winners'."""
QUIET_SECONDS = 60.0
SPACE: Json = {"name": "mobilenet_v1", "image_size": 32, "width": 0.25, "classes": 10, "free_last": True}
ASKED: Json = {"image_size": 32, "width": 0.25, "classes": 10, "last_layer": "free"}


def main() -> None:
    """Run the jobs, measure their winners, write what was found."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the agents end with this script
    space, path = get_space(**SPACE), RESULTS / "budget.json"
    lines: list[Json] = json.loads(path.read_text())["jobs"] if path.exists() else []
    todo = {name: runtime for name, runtime in DEVICES.items() if all(line["device"] != name for line in lines)}
    with service() as client, _agents(client, todo):
        for device, runtime in todo.items():
            _profiled(client, device)
            jobs = run(client, [_request(device, most_ms) for most_ms in _budgets(client, space, device)])
            lines += _judged(space, device, runtime, jobs)
            for line in lines[-len(jobs) :]:
                print(json.dumps(line), flush=True)
            write("budget", {"figures": _figures(lines), "jobs": lines})
    print(json.dumps(_figures(lines)))


def _figures(lines: list[Json]) -> Json:
    """Of the winners: how many broke their budget when measured again, and what share of it they used."""
    won = [line for line in lines if line["state"] == "succeeded"]
    return {
        "jobs": len(lines), "succeeded": len(won), "broken": sum(line["again_ms"] > line["max_ms"] for line in won),
        "worst": max(line["again_ms"] / line["max_ms"] for line in won),
        "used": mean(line["again_ms"] / line["max_ms"] for line in won),
        "verified_used": mean(line["verified_ms"] / line["max_ms"] for line in won),
    }  # fmt: skip


@contextmanager
def _agents(client: Client, runtimes: Mapping[str, str]) -> Iterator[None]:
    """An agent for every device, until the jobs have ended; devices of a former run are made anew."""
    processes = []
    try:
        for device, runtime in runtimes.items():
            processes.append(_agent(client, device, runtime))
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _agent(client: Client, device: str, runtime: str) -> "subprocess.Popen[bytes]":
    if any(one["name"] == device for one in client.devices()["items"]):
        client.delete_device(device)
    token = client.add_device(device)["token"]
    command = [sys.executable, "-m", "latency_profiler.agent", "--server", client.url, "--device", device]
    return subprocess.Popen([*command, "--runtime", runtime], env={**os.environ, "SECATEURS_TOKEN": token})


def _profiled(client: Client, device: str) -> None:
    client.profile(device, ASKED | {"space": "mobilenet_v1", "mode": "sampled"})
    while (profile := client.profiles(device)["items"][0])["done"] + profile["failed"] < profile["planned"]:
        time.sleep(2.0)


def _budgets(client: Client, space: Space, device: str) -> list[float]:
    """Milliseconds, spread over what is feasible."""
    table = LatencyTable.from_json(client.lookup_table(device))
    prices = [1000 * table.price(space, space.channels(genes)).seconds for genes in space.ladder]
    least, most = min(prices), prices[-1]  # the whole network: not every device is slowest with it
    shares = (np.arange(BUDGETS) + 1) / (BUDGETS + 1)
    return [round(least + float(share) * (most - least), 5) for share in shares]


def _request(device: str, most_ms: float) -> Json:
    return {
        "space": "mobilenet_v1", "image_size": 32, "width": 0.25, "last_layer": "free", "dataset": "digits",
        "effort": "smoke", "constraints": [{"metric": "latency", "device": device, "max_ms": most_ms}],
        "search": {"seed": 0, "generations": 6, "population": 24, "parents": 8}, "baselines": False,
    }  # fmt: skip


def _judged(space: Space, device: str, runtime: str, jobs: list[Json]) -> list[Json]:
    won = [job for job in jobs if job["state"] == "succeeded"]
    again = _measure(space, runtime, [tuple(job["result"]["winner"]["channels"]) for job in won]) if won else []
    taken = dict(zip((job["id"] for job in won), again, strict=True))
    lines = []
    for job in jobs:
        most_ms = job["spec"]["constraints"][0]["max_ms"]
        line = {"name": "budget", "device": device, "max_ms": most_ms, "state": job["state"], "error": job["error"]}
        line["measured_with"] = measured_with()
        if job["id"] in taken:
            winner = job["result"]["winner"]
            line |= {
                "predicted_ms": winner["predicted_ms"][device], "verified_ms": winner["measured_ms"][device],
                "again_ms": 1000 * taken[job["id"]], "rounds": job["result"]["rounds"],
            }  # fmt: skip
        lines.append(line)
    return lines


def _measure(space: Space, runtime: str, networks: list[tuple[int, ...]]) -> list[float]:
    """Median seconds of each network's runs."""
    opened, rng = open_runtime(runtime, Settings()), np.random.default_rng(0)
    yardstick, runs = Yardstick(), [list[float]() for _ in networks]
    for _ in range(LOADS):
        loaded = [opened.load_network(space.nodes(channels)) for channels in networks]
        until = time.perf_counter() + QUIET_SECONDS
        for _ in range(RUNS):
            for at in rng.permutation(len(loaded)):
                quiet = yardstick.settle(until)
                loaded[at].seconds(REFILL)
                took = loaded[at].seconds(1)
                if quiet and yardstick.quiet():
                    runs[at].append(took)
    return [median(one) for one in runs]


if __name__ == "__main__":
    main()
