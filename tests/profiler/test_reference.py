"""Seconds at a machine's usual speed, on a machine that is as fast as the test says."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latency_profiler.isolation import Bench
from latency_profiler.layers import Layer, Node, Op
from latency_profiler.measuring import measure_group
from latency_profiler.reference import MEMORY, NOW, SAVING_SECONDS, Reference, reference_of
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.timing import LAYER, Stopwatch, measure

LAYER_SECONDS, NETWORK_SECONDS = 2e-4, 1e-3
LINEAR = Layer(Op.LINEAR, 8, 8, size=1)
ITEMS: list[dict[str, Any]] = [
    {"work_id": 1, "kind": "layer", "key": LINEAR.key, "payload": {"layer": LINEAR.to_json()}},
    {"work_id": 2, "kind": "network", "key": "a network", "payload": {"nodes": []}},
    {"work_id": 3, "kind": "canary", "key": f"{LINEAR.key}@1", "payload": {"layer": LINEAR.to_json()}},
]


@dataclass
class Machine:
    """A machine that is also a runtime: everything takes `slow` times as long as it should."""

    slow: float = 1.0
    now: float = 0.0
    name = version = "machine"
    settings = Settings()
    framed = False
    dtypes = ("float32",)

    def subject(self, seconds: float) -> Stopwatch:
        def run() -> None:
            self.now += self.slow * seconds

        return Stopwatch(run, clock=lambda: self.now)

    def load_layer(self, _: Layer) -> Stopwatch:
        return self.subject(LAYER_SECONDS)

    def load_network(self, _: list[Node]) -> Stopwatch:
        return self.subject(NETWORK_SECONDS)

    def empty_run(self) -> Stopwatch:
        return self.subject(LAYER_SECONDS / 2)


def read(reference: Reference, machine: Machine) -> float:
    return reference.speed([measure(machine.load_network([]))]).of(NETWORK_SECONDS)


def test_what_is_measured_in_a_slow_phase_counts_as_in_a_usual_one() -> None:
    machine = Machine()
    reference = Reference([machine.load_network([])], clock=lambda: machine.now)
    for _ in range(3):
        measure_group(machine, ITEMS, 0, reference=reference)
        machine.now += 2 * NOW
    machine.slow = 1.1
    layer, network, canary = measure_group(machine, ITEMS, 0, reference=reference)
    assert layer["seconds"] == pytest.approx(LAYER_SECONDS / 2)
    assert network["seconds"] == pytest.approx(NETWORK_SECONDS)
    assert network["conditions"]["p90"] == pytest.approx(NETWORK_SECONDS)
    assert network["values"] == pytest.approx(len(network["values"]) * [1.1 * NETWORK_SECONDS]), "raw"
    for one in (layer, network):
        assert one["conditions"]["speed"] == pytest.approx(1 / 1.1)
        assert one["conditions"]["reference"] == pytest.approx([1.1 * NETWORK_SECONDS])
        assert one["conditions"]["empty_run"] == pytest.approx(LAYER_SECONDS / 2)
    assert canary["seconds"] == pytest.approx(1.1 * LAYER_SECONDS / 2), "a canary says how slow the device has become"
    assert canary["conditions"]["speed"] == 1.0


def test_readings_of_now_are_taken_together() -> None:
    machine = Machine()
    reference = Reference([machine.load_network([])], clock=lambda: machine.now)
    assert read(reference, machine) == 1.0
    machine.now += 2 * NOW
    speeds = []
    for machine.slow in (1.0, 1.3, 1.1):
        speeds.append(read(reference, machine))
    assert speeds == pytest.approx([1.0, 1 / 1.15, 1.05 / 1.1])


def test_what_is_mostly_overhead_slows_down_as_the_small_reference_does() -> None:
    machine, overhead, computing = Machine(), Machine(), Machine()
    small, large = overhead.subject(NETWORK_SECONDS), computing.subject(3 * NETWORK_SECONDS)
    reference = Reference([small, large], clock=lambda: machine.now)
    for _ in range(3):
        reference.speed([measure(small), measure(large)])
        machine.now += 2 * NOW
    overhead.slow, computing.slow = 1.1, 1.4
    speed = reference.speed([measure(small), measure(large)])
    wanted = {0.1: 1.1, 1.0: 1.1, 2.0: (1.1 * 1.4) ** 0.5, 3.0: 1.4, 50.0: 1.4}
    assert {size: speed.of(size * NETWORK_SECONDS) for size in wanted} == pytest.approx(
        {size: 1 / slow for size, slow in wanted.items()}
    )


def test_a_clock_that_is_lowered_for_good_becomes_usual() -> None:
    machine = Machine()
    reference = Reference([machine.load_network([])], clock=lambda: machine.now)
    read(reference, machine)
    machine.slow = 2.0
    for _ in range(MEMORY):
        machine.now += 2 * NOW
        speed = read(reference, machine)
    assert speed == pytest.approx(1.0)


def test_what_is_usual_outlives_the_process(tmp_path: Path) -> None:
    machine, file = Machine(), tmp_path / "usual"
    reference = Reference([machine.load_network([])], clock=lambda: machine.now, file=file)
    for _ in range(5):
        read(reference, machine)
        machine.now += SAVING_SECONDS
    machine.slow = 1.25
    later = Reference([machine.load_network([])], clock=lambda: machine.now, file=file)
    assert [read(later, machine) for _ in range(4)] == pytest.approx([0.8] * 4)
    machine.now += 2 * SAVING_SECONDS
    read(later, machine)
    assert [seconds for [seconds] in json.loads(file.read_bytes())] == pytest.approx(
        [NETWORK_SECONDS] * 5 + [1.25 * NETWORK_SECONDS] * 5
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}x",
        b"7",
        b'[["fast"]]',
        b"[[1.0, 1.0]]",
        b"[[0.0]]",
        b"[[-1]]",
        b"[[NaN]]",
        b"[[Infinity]]",
        b"[null]",
        b"[1.0]",
        b"\xff",
    ],
)
def test_a_file_that_cannot_be_read_is_made_anew(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    machine, file = Machine(), tmp_path / "usual"
    file.write_bytes(content)
    reference = Reference([machine.load_network([])], clock=lambda: machine.now, file=file)
    assert "learned anew" in caplog.text
    assert read(reference, machine) == 1.0
    assert json.loads(file.read_bytes()) == [pytest.approx([NETWORK_SECONDS])]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    reference = Reference([machine.load_network([])], clock=lambda: machine.now, file=tmp_path / "none" / "usual")
    assert caplog.text == ""
    assert read(reference, machine) == 1.0
    assert "cannot be kept" in caplog.text


def test_the_measuring_process_keeps_what_is_usual(tmp_path: Path) -> None:
    bench = Bench("onnxruntime", Settings(), usual=tmp_path / "usual")
    try:
        bench.measure(ITEMS[:1], 0)
    finally:
        bench.close()
    [[small, large]] = json.loads((tmp_path / "usual").read_bytes())
    assert 0 < small < large < 1


def test_nothing_counts_beside_a_reference_that_fails() -> None:
    def fail() -> None:
        raise ValueError("out of memory")

    results = measure_group(Machine(), ITEMS, 0, reference=Reference([Stopwatch(fail)]))
    assert [one["error"] for one in results] == 3 * ["the reference failed: ValueError: out of memory"]


def test_only_runtimes_of_this_machine_have_a_reference(caplog: pytest.LogCaptureFixture) -> None:
    assert reference_of(open_runtime("simulated", Settings())) is None
    assert caplog.records == []
    found = reference_of(open_runtime("onnxruntime", Settings()))
    assert found is not None
    small, large = (measure(one.subject).median for one in found.series(LAYER))
    assert 0 < small < large

    def refuse(_: object) -> Stopwatch:
        raise ValueError("no such kernel")

    limited = SimpleNamespace(name="limited", empty_run=Machine().empty_run, load_network=refuse)
    with caplog.at_level(logging.WARNING):
        assert reference_of(limited) is None  # type: ignore[arg-type]
    assert "no such kernel" in caplog.text
