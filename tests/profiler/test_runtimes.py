"""Runtimes behind one protocol, and the fingerprint of what they run on."""

import hashlib
import json
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from latency_profiler.device import Fingerprint, conditions, fingerprint
from latency_profiler.errors import InvalidInput, RuntimeUnavailable
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.runtimes import base
from latency_profiler.runtimes.base import Runtime, Settings, open_runtime
from latency_profiler.runtimes.simulated import EMPTY_SECONDS, Simulated
from latency_profiler.spaces.registry import get_space
from latency_profiler.timing import Effort, measure

SHORT = Effort(value=1e-4, least=3, most=3)
NAMES = ["onnxruntime", "simulated", "torch"]
LAYERS = [
    Layer(Op.CONV, 8, 16, 8, 3, 1, 1, Activation.RELU, norm=True),
    Layer(Op.CONV, 8, 16, 8, 1, 1, 0, Activation.RELU6, norm=True, residual=True),
    Layer(Op.DEPTHWISE, 12, 12, 8, 3, 2, 1, Activation.RELU, norm=True),
    Layer(Op.MAX_POOL, 8, 8, 8, 2, 2),
    Layer(Op.GLOBAL_POOL, 8, 8, 4, 4, 4),
    Layer(Op.LINEAR, 32, 10, 1),
]


@pytest.fixture(params=NAMES)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return open_runtime(request.param, Settings(batch=2))


def test_every_kind_of_layer_and_a_network_can_be_measured(runtime: Runtime) -> None:
    space = get_space("mobilenet_v2", 8, 0.1, 10)
    nodes = space.nodes(space.channels(space.smallest))
    subjects = [runtime.empty_run(), runtime.load_network(nodes), *map(runtime.load_layer, LAYERS)]
    for subject in subjects:
        assert 0 < measure(subject, SHORT).median < 0.1


def test_fingerprint_tells_runtimes_and_settings_apart(runtime: Runtime) -> None:
    one = fingerprint(runtime)
    assert (one.runtime, one.runtime_version, one.batch) == (runtime.name, runtime.version, 2)
    assert one == fingerprint(runtime)
    others = [fingerprint(open_runtime(runtime.name, Settings(batch=1)))]
    others += [fingerprint(open_runtime(name, Settings(batch=2))) for name in NAMES if name != runtime.name]
    assert one.sha256 not in {other.sha256 for other in others}


def test_fingerprint_survives_json_with_its_digest() -> None:
    one = fingerprint(Simulated(Settings()))
    facts = json.loads(json.dumps(one.to_json()))
    assert Fingerprint.from_json(facts) == one
    text = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(facts[key])}" for key in sorted(facts)) + "}"
    assert one.sha256 == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(InvalidInput, match="'cores' is '2'"):
        Fingerprint.from_json({**facts, "cores": "2"})
    with pytest.raises(InvalidInput, match="not a fingerprint"):
        Fingerprint.from_json({**facts, "load": 0.1})


def test_conditions_are_json_and_no_part_of_the_fingerprint() -> None:
    now = json.loads(json.dumps(conditions()))
    assert {"at", "agent", "load", "source"} <= set(now)
    assert not set(now) & set(fingerprint(Simulated(Settings())).to_json())


def test_other_settings_are_refused() -> None:
    with pytest.raises(InvalidInput, match="dtype is 'int8'"):
        Settings(dtype="int8")
    with pytest.raises(InvalidInput, match="threads is 0"):
        Settings(threads=0)
    with pytest.raises(InvalidInput, match="known runtimes: onnxruntime, simulated, torch"):
        open_runtime("tensorrt", Settings())


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("tensorrt", "no_such_package:Runtime", base.GROUP)
    monkeypatch.setattr(base, "entry_points", lambda group: [point])
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'secateurs\[tensorrt\]'"):
        open_runtime("tensorrt", Settings())


def values(seed: int, layer: Layer, count: int = 5) -> list[float]:
    subject = Simulated(Settings(), seed).load_layer(layer)
    return [subject.seconds(10) for _ in range(count)]


def test_simulated_device_is_a_function_of_seed_layer_and_repetition() -> None:
    assert values(0, LAYERS[0]) == values(0, LAYERS[0])
    assert len(set(values(0, LAYERS[0]))) == 5
    assert values(0, LAYERS[0]) != values(1, LAYERS[0])
    assert values(0, LAYERS[0], 3) == values(0, LAYERS[0], 5)[:3]


def test_simulated_device_has_steps_of_eight_channels() -> None:
    def mean(c_out: int) -> float:
        return Simulated(Settings()).load_layer(Layer(Op.CONV, 64, c_out, 16, 3, 1, 1)).mean

    inside = [mean(c) - mean(c - 1) for c in (10, 11, 12, 13, 14, 15, 16)]
    assert max(inside) < (mean(17) - mean(16)) / 10
    assert np.ptp(inside) == pytest.approx(0, abs=1e-12)


def test_simulated_network_pays_for_its_call_once() -> None:
    device = Simulated(Settings())
    space = get_space("resnet20", 32, 1.0, 10)
    nodes = space.nodes(space.channels(space.largest))
    alone = sum(device.load_layer(node.layer).mean - EMPTY_SECONDS for node in nodes)
    assert device.load_network(nodes).mean == pytest.approx(EMPTY_SECONDS + 0.96 * alone)
    assert alone < sum(device.load_layer(node.layer).mean for node in nodes)
