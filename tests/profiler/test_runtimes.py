"""Runtimes behind one protocol: all compute the same function; and the fingerprint of what they run on."""

import hashlib
import json
import shutil
import tomllib
import weakref
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latency_profiler.device import Fingerprint, conditions, fingerprint
from latency_profiler.errors import InvalidInput, RuntimeUnavailable
from latency_profiler.layers import Activation, Layer, Node, Op
from latency_profiler.runtimes import base
from latency_profiler.runtimes.base import Loaded, Runtime, Settings, open_runtime
from latency_profiler.runtimes.simulated import COOL, EMPTY_SECONDS, HOT, Pace, Simulated, SimulatedPhone
from latency_profiler.spaces.registry import get_space
from latency_profiler.tensors import Array, random_inputs, random_weights, single
from latency_profiler.timing import Effort, Subject, measure
from tests.profiler.test_graphs import reference

SHORT = Effort(value=1e-4, least=3, most=3)
COMPUTING = ["ncnn", "onnxruntime", "openvino", "torch"]
"""Runtimes that compute; `torch-compile`, which takes half a minute to begin, has one test of its own."""
NAMES = [*COMPUTING, "simulated"]
NETWORKS = [
    ("mobilenet_v1", 8), ("mobilenet_v2", 16), ("resnet20", 16), ("resnet50", 8), ("resnet50", 72), ("vgg16", 8),
    ("lenet_300_100", 8), ("lenet_5", 28),
]  # fmt: skip
NEAR = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2, "int8": 0.3}
"""Largest difference to float64, as a share of the largest output: 50 layers deep, each rounds once more."""
LAYERS = [
    Layer(Op.CONV, 8, 16, 8, 3, 1, 1, Activation.RELU, norm=True),
    Layer(Op.CONV, 8, 16, 8, 1, 1, 0, Activation.RELU6, norm=True, residual=True),
    Layer(Op.DEPTHWISE, 12, 12, 8, 3, 2, 1, Activation.RELU, norm=True),
    Layer(Op.MAX_POOL, 8, 8, 8, 2, 2),
    Layer(Op.GLOBAL_POOL, 8, 8, 4, 4, 4),
    Layer(Op.LINEAR, 32, 10, 1),
]


def opened(name: str, settings: Settings) -> Runtime:
    """A runtime, or a skipped test where its extra is not installed."""
    try:
        return open_runtime(name, settings)
    except RuntimeUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=NAMES)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return opened(request.param, Settings(batch=2))


@pytest.fixture(params=COMPUTING)
def computing(request: pytest.FixtureRequest) -> Runtime:
    return opened(request.param, Settings(batch=2))


def difference(subject: Subject, nodes: Sequence[Node]) -> float:
    """Of a subject's output to what the nodes say, as a share of the largest number."""
    assert isinstance(subject, Loaded)
    expected = reference(nodes, random_weights(nodes), random_inputs(nodes, 2))
    output: Array = subject.output()
    assert output.shape == expected.shape
    assert output.dtype == np.float32
    return float(np.abs(output - expected).max() / np.abs(expected).max())


def structure(name: str, size: int) -> Sequence[Node]:
    space = get_space(name, size, 0.1, 10, free_last=True)
    genes = np.random.default_rng(size).integers(0, 31, len(space.genes)).tolist()
    return space.nodes(space.channels(genes))


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_all_runtimes_compute_the_same_network(computing: Runtime, name: str, size: int) -> None:
    nodes = structure(name, size)
    assert difference(computing.load_network(nodes), nodes) < NEAR["float32"]


@pytest.mark.parametrize("activation", list(Activation))
def test_all_runtimes_compute_the_same_layers(computing: Runtime, activation: Activation) -> None:
    layers = [
        Layer(Op.CONV, 5, 7, 9, 3, 2, 1, activation),
        Layer(Op.CONV, 6, 8, 8, 3, 2, 1, activation),
        Layer(Op.CONV, 5, 7, 9, 1, 1, 0, activation, residual=True),
        Layer(Op.CONV, 3, 8, 16, 7, 2, 3, activation),
        Layer(Op.DEPTHWISE, 6, 6, 9, 3, 1, 1, activation),
        Layer(Op.DEPTHWISE, 16, 16, 8, 3, 2, 1, activation),
        Layer(Op.LINEAR, 20, 7, 1, activation=activation),
        Layer(Op.MAX_POOL, 6, 6, 8, 3, 2, 1, activation),
        Layer(Op.MAX_POOL, 6, 6, 8, 2, 2, 0, activation),
        Layer(Op.GLOBAL_POOL, 6, 6, 4, 4, 4, 0, activation),
    ]
    wrong = {one.key: difference(computing.load_layer(one), single(one)) for one in layers}
    assert {key: share for key, share in wrong.items() if share > 1e-5} == {}


def test_lesser_dtypes_compute_the_same_less_exactly(computing: Runtime) -> None:
    nodes = structure("mobilenet_v2", 16)
    for dtype in computing.dtypes[1:]:
        share = difference(opened(computing.name, Settings(batch=2, dtype=dtype)).load_network(nodes), nodes)
        assert NEAR["float32"] < share < NEAR[dtype], dtype


def test_a_dtype_is_offered_only_where_convolutions_are_computed_in_it(computing: Runtime) -> None:
    for layer in (Layer(Op.CONV, 16, 32, 8, 1, 1, 0), Layer(Op.CONV, 16, 32, 8, 3, 2, 1)):
        outputs = {
            dtype: opened(computing.name, Settings(dtype=dtype)).load_layer(layer).output()  # type: ignore[attr-defined]
            for dtype in computing.dtypes
        }
        for dtype in computing.dtypes[1:]:
            assert not np.array_equal(outputs["float32"], outputs[dtype]), dtype


def test_a_result_depends_on_no_batch_and_no_number_of_threads(computing: Runtime) -> None:
    layer = Layer(Op.CONV, 5, 7, 9, 3, 2, 1, Activation.RELU)
    expected = reference(single(layer), random_weights(single(layer)), random_inputs(single(layer), 5))
    subject = opened(computing.name, Settings(threads=2, batch=5)).load_layer(layer)
    assert isinstance(subject, Loaded)
    for _ in range(2):
        np.testing.assert_allclose(subject.output(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch-compile needs a C++ compiler: install g++")
@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is not ours
def test_torch_compile_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small network of every operator, since its first compilation takes long."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    nodes = (
        Node("stem", Layer(Op.CONV, 3, 8, 8, 3, 1, 1, Activation.RELU, norm=True), -1),
        Node("depthwise", Layer(Op.DEPTHWISE, 8, 8, 8, 3, 1, 1, Activation.RELU6, norm=True), 0),
        Node("add", Layer(Op.CONV, 8, 8, 8, 1, 1, 0, Activation.RELU, norm=True, residual=True), 1, 0),
        Node("halve", Layer(Op.MAX_POOL, 8, 8, 8, 2, 2), 2),
        Node("pool", Layer(Op.GLOBAL_POOL, 8, 8, 4, 4, 4), 3),
        Node("classifier", Layer(Op.LINEAR, 8, 5, 1), 4),
    )
    runtime = opened("torch-compile", Settings(batch=2))
    assert difference(runtime.load_network(nodes), nodes) < NEAR["float32"]
    assert runtime.empty_run().seconds(3) > 0


def test_every_runtime_is_an_entry_point_and_its_extra_has_its_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert base.names() == sorted(project["entry-points"][base.GROUP])
    assert set(base.names()) - set(project["optional-dependencies"]) == {"simulated", "simulated-phone"}


def test_every_kind_of_layer_and_a_network_can_be_measured(runtime: Runtime) -> None:
    space = get_space("mobilenet_v2", 8, 0.1, 10)
    nodes = space.nodes(space.channels(space.smallest))
    subjects = [runtime.empty_run(), runtime.load_network(nodes), *map(runtime.load_layer, LAYERS)]
    for subject in subjects:
        assert 0 < measure(subject, SHORT).median < 10


def test_fingerprint_tells_runtimes_and_settings_apart(runtime: Runtime) -> None:
    one = fingerprint(runtime)
    assert (one.runtime, one.runtime_version, one.batch) == (runtime.name, runtime.version, 2)
    assert one == fingerprint(runtime)
    others = [fingerprint(open_runtime(runtime.name, Settings(batch=1)))]
    others += [fingerprint(opened(name, Settings(batch=2))) for name in ("simulated", "torch") if name != runtime.name]
    others += [fingerprint(opened(runtime.name, Settings(batch=2, dtype=dtype))) for dtype in runtime.dtypes[1:]]
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
    with pytest.raises(InvalidInput, match="dtype is 'int4'; it must be one of float32, bfloat16"):
        Settings(dtype="int4")
    with pytest.raises(InvalidInput, match="runtime 'simulated' computes in float32, not in bfloat16"):
        open_runtime("simulated", Settings(dtype="bfloat16"))
    with pytest.raises(InvalidInput, match="threads is 0"):
        Settings(threads=0)
    with pytest.raises(InvalidInput, match=r"known runtimes: .*ncnn, onnxruntime, openvino, simulated"):
        open_runtime("tensorrt", Settings())


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("tensorrt", "no_such_package:Runtime", base.GROUP)
    monkeypatch.setattr(base, "entry_points", lambda group: [point])
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'secateurs\[tensorrt\]'"):
        open_runtime("tensorrt", Settings())


def test_a_runtime_that_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("board", "os:environ.__getitem__", base.GROUP)  # takes anything, and has no such variable
    monkeypatch.setattr(base, "entry_points", lambda group: [point])
    with pytest.raises(RuntimeUnavailable, match=r"'board' is not available: TypeError"):
        open_runtime("board", Settings())


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


def test_simulated_phone_drifts_and_throttles_by_its_seed() -> None:
    pace = Pace(throttle=0.5)
    took = [pace.spend(1.0) for _ in range(int(COOL) + 10)]
    assert took[: int(COOL)] == [1.0] * int(COOL)
    assert took.count(1.5) == round(HOT / 1.5 + 0.5), "it is hot for a while, and cool again"
    waves = [Pace(drift=0.03).spend(1.0), *(Pace(drift=0.03, phase=phase).spend(1.0) for phase in (1.57, 4.71))]
    assert waves == pytest.approx([1.0, 1.03, 0.97], abs=1e-4)

    def values(seed: int) -> list[float]:
        subject = SimulatedPhone(Settings(), seed).load_layer(LAYERS[0])
        return [subject.seconds(100_000) for _ in range(200)]

    assert values(0) == values(0)
    assert values(0) != values(1)
    assert max(values(0)) > 1.4 * min(values(0))


def test_eager_pytorch_keeps_a_result_no_longer_than_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from latency_profiler.runtimes import torch as eager

    results, alive, activate = list[weakref.ref[Any]](), list[int](), eager._activate

    def note(x: Any, activation: Any) -> Any:
        y = activate(x, activation)
        results.append(weakref.ref(y))
        alive.append(sum(result() is not None for result in results))
        return y

    monkeypatch.setattr(eager, "_activate", note)
    space = get_space("resnet20", 8, 0.5, 10)
    eager.Torch(Settings()).load_network(space.nodes(space.channels(space.largest))).run()
    assert len(alive) > 20
    assert max(alive) == 3, "what is read, the shortcut, and the new one"
