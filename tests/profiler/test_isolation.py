"""Runtimes that hang, crash and print: the process that measures with them is lost, the agent is not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest

from latency_profiler import isolation
from latency_profiler.agent import Agent, Options
from latency_profiler.errors import NoMeasuringProcess
from latency_profiler.isolation import Bench, Turn
from latency_profiler.measuring import LEAST_SECONDS, measure_group, measure_groups
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from tests.profiler.test_agent import Service, layer_item

ODD = '''
import os, signal, time
from latency_profiler.runtimes.simulated import Simulated

class Odd(Simulated):
    """A layer of 16 channels kills its process, one of 24 hangs it, one of 32 prints; one of 48 is slow."""

    def __init__(self, settings):
        if os.path.exists("away"):
            raise OSError("the board is away")
        super().__init__(settings)

    def load_layer(self, layer):
        if layer.c_out == 16:
            os.kill(os.getpid(), signal.SIGSEGV)
        while layer.c_out == 24:
            time.sleep(60)
        if layer.c_out == 48:
            time.sleep(1.0)
        if layer.c_out == 32:
            print("what a native library has to say", flush=True)
        return super().load_layer(layer)
'''
POINTS = "[secateurs.runtimes]\nodd = odd:Odd\n"


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A runtime that another package has added."""
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "odd-1.dist-info").mkdir()
    (tmp_path / "odd-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (tmp_path / "odd-1.dist-info" / "entry_points.txt").write_text(POINTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(isolation, "LOOK_SECONDS", 0.05)
    return "odd"


def test_a_layer_that_crashes_or_hangs_its_process_has_failed_alone(odd: str) -> None:
    looks: list[bool] = []
    bench = Bench(odd, Settings(), patience=30.0, waiting=lambda: looks.append(True))
    items = [layer_item(at, channels) for at, channels in enumerate((8, 16, 32))]
    try:
        results = bench.measure(items, 0)
        assert [one["work_id"] for one in results] == [0, 1, 2]
        assert results[1]["error"] == "the measuring process died of SIGSEGV"
        assert results[0]["seconds"] > LEAST_SECONDS < results[2]["seconds"]
        bench._patience = 0.2
        [hung] = bench.measure([layer_item(3, 24)], 0)
        assert hung["error"] == "the measuring process hung for 0.2 s and was killed"
        assert looks, "somebody could renew the lease meanwhile"
        assert bench._process is None
        bench._patience = 30.0
        assert bench.measure([layer_item(4, 40)], 0)[0]["seconds"] > LEAST_SECONDS, "the next one is measured"
    finally:
        bench.close()


def test_a_group_that_takes_long_does_not_hang_as_long_as_it_goes_on(odd: str) -> None:
    bench = Bench(odd, Settings(), patience=4.0)
    try:
        results = bench.measure([layer_item(at, 48) for at in range(5)], 0)
    finally:
        bench.close()
    assert [one.get("error") for one in results] == [None] * 5


def test_no_layer_is_to_blame_where_the_process_does_not_start(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = Service([layer_item(1, 8)])
    options = Options("http://service", "bench", "t", odd, spool=tmp_path / "spool", once=True, lock=tmp_path / "lock")
    agent = Agent(options, transport=httpx2.MockTransport(service))
    (tmp_path / "away").touch()
    with pytest.raises(NoMeasuringProcess, match="before it was ready"):
        agent.run()
    assert service.results == {}
    (tmp_path / "away").unlink()
    Agent(options, transport=httpx2.MockTransport(service)).run()
    assert service.results[1]["seconds"] > LEAST_SECONDS


def test_what_was_measured_before_the_process_was_lost_is_handed_in() -> None:
    items = [layer_item(at, 8 + at) for at in range(1, 30)]
    calls = list[int]()

    def measure(group: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        calls.append(len(group))
        if len(calls) == 3:
            raise NoMeasuringProcess("onnxruntime", "died of SIGKILL")
        return measure_group(Simulated(Settings()), group, seed)

    results = measure_groups(measure, items, np.random.default_rng(0))
    assert len({one["work_id"] for one in results}) == calls[0] + calls[1]
    assert all(one["seconds"] > LEAST_SECONDS for one in results)


def test_an_agent_keeps_its_lease_while_a_measurement_hangs(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service([layer_item(1, 24)])
    inner = service._lease

    def short(body: dict[str, Any]) -> httpx2.Response:
        answer = inner(body)
        return httpx2.Response(200, json=json.loads(answer.content) | {"lease_seconds": 0.2})

    monkeypatch.setattr(service, "_lease", short)
    options = Options(
        "http://service", "bench", "t", odd, spool=tmp_path / "spool", once=True, patience=1.0, lock=tmp_path / "lock"
    )
    Agent(options, transport=httpx2.MockTransport(service)).run()
    renewals = [body for body in service.leases if "renew" in body]
    assert {(body["renew"], body["limit"]) for body in renewals} == {("l", 0)}
    assert "hung for 1 s" in service.results[1]["error"]
    assert len({body["connection"] for body in service.leases}) == len({body["host"] for body in service.leases}) == 1


def test_one_agent_of_a_machine_measures_at_a_time(tmp_path: Path) -> None:
    one, other = Turn(tmp_path / "lock"), Turn(tmp_path / "lock")
    assert one.take()
    assert not other.take()
    one.give_back()
    assert other.take()
    assert not one.take()
    other.close()
    assert one.take(), "a process that ends gives it back"
    one.close()


def test_a_lock_that_nobody_can_open_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    turn = Turn(tmp_path / "link")
    assert turn.take()
    turn.give_back()
    turn.close()
    assert not (tmp_path / "target").exists()


def test_the_measuring_process_ends_with_its_agent(tmp_path: Path) -> None:
    code = (
        "from latency_profiler.isolation import Bench; from latency_profiler.runtimes.base import Settings\n"
        "bench = Bench('simulated', Settings()); bench._open(); print(bench._process.pid, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
