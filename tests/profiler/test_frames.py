"""A layer's frame: two networks that differ by the layer alone, and the seconds that it adds to one of them."""

from dataclasses import replace

import numpy as np
import pytest

from latency_profiler.frames import frame
from latency_profiler.layers import Layer, Op
from latency_profiler.measuring import LEAST_SECONDS, measure_work
from latency_profiler.planning import plan_layers
from latency_profiler.runtimes.base import Settings, open_runtime
from latency_profiler.runtimes.simulated import Simulated, SimulatedSubject
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import IMAGE

SPACES = ["mobilenet_v1", "mobilenet_v2", "resnet20", "resnet50", "vgg16"]
CONV = Layer(Op.CONV, 16, 24, size=8, kernel=3, stride=2, padding=1, norm=True)
RESIDUAL = Layer(Op.CONV, 16, 24, size=8, norm=True, residual=True)


@pytest.mark.parametrize("name", SPACES)
def test_every_layer_of_a_space_stands_in_a_network_whose_shapes_fit(name: str) -> None:
    for layer in plan_layers(get_space(name, 32, 0.25, 10, True), 3):
        found = frame(layer)
        if found is None:
            assert layer.op is Op.LINEAR
            continue
        assert [node.layer for node in found.around if node.name == "layer"] == [layer]
        assert all(node.name != "layer" for node in found.without or ())
        for nodes in (found.around, found.without or ()):
            for at, node in enumerate(nodes):
                source = nodes[node.input].layer if node.input != IMAGE else None
                assert node.input < at
                assert source is None or (source.c_out, source.out_size) == (node.layer.c_in, node.layer.size)
                if node.shortcut is not None:
                    assert node.shortcut < at
                    other = nodes[node.shortcut].layer
                    assert (other.c_out, other.out_size) == (node.layer.c_out, node.layer.out_size)


def test_what_is_left_without_a_layer_is_its_input_and_a_pool() -> None:
    found = frame(CONV)
    assert found is not None and found.without is not None  # noqa: PT018
    assert [node.layer.op for node in found.around] == [Op.CONV, Op.CONV, Op.GLOBAL_POOL]
    assert [(node.layer.op, node.layer.c_out) for node in found.without] == [(Op.CONV, 16), (Op.GLOBAL_POOL, 16)]


def test_the_shortcut_of_a_residual_layer_is_made_before_its_input() -> None:
    found = frame(RESIDUAL)
    assert found is not None
    assert [node.layer.c_out for node in found.around] == [24, 16, 24, 24]
    assert found.around[2].shortcut == 0


@pytest.mark.parametrize("c_out", [3, 8])
def test_a_residual_layer_of_three_channels_does_not_read_the_image(c_out: int) -> None:
    found = frame(Layer(Op.CONV, 3, c_out, size=4, kernel=3, padding=1, norm=True, residual=True))
    assert found is not None
    layer = next(node for node in found.around if node.name == "layer")
    assert layer.input >= 0
    assert layer.shortcut == 0


def test_nothing_stands_before_the_layer_that_reads_the_image() -> None:
    found = frame(Layer(Op.CONV, 3, 16, size=32, kernel=3, stride=2, padding=1, norm=True))
    assert found is not None
    assert (found.without, [node.input for node in found.around]) == (None, [IMAGE, 0])


class Reordering(Simulated):
    """Simulated hardware that brings every network's input and output into another order, which takes a while."""

    framed = True

    def load_network(self, nodes):
        subject = super().load_network(nodes)
        return SimulatedSubject(subject.mean + 2e-5, subject.rng)

    def load_layer(self, layer):
        subject = super().load_layer(layer)
        return SimulatedSubject(subject.mean + 2e-5, subject.rng)


class Alone(Reordering):
    """The same, measured without frames."""

    framed = False


def test_a_layers_seconds_are_the_difference_that_it_makes() -> None:
    item = {"work_id": 1, "kind": "layer", "key": CONV.key, "payload": {"layer": CONV.to_json()}}
    layer, pools = Simulated(Settings())._layer_seconds(CONV), 1e-6
    for runtime, expected in ((Reordering, layer), (Alone, layer + 2e-5)):
        (result,) = measure_work(runtime(Settings()), [item], np.random.default_rng(0))
        assert result["seconds"] == pytest.approx(expected, abs=pools)
        rest = result["conditions"]["rest_values"]
        assert result["conditions"]["rest"] == pytest.approx(np.median(rest), abs=1e-9)
        raw = np.median(result["values"]) - np.median(rest)
        assert result["seconds"] == pytest.approx(raw, abs=1e-8), "what is stored follows from the raw values"
        spread = [float(np.subtract(*np.percentile(values, (75, 25)))) for values in (result["values"], rest)]
        assert result["iqr"] == pytest.approx(np.hypot(*spread), abs=1e-8)


def test_a_frame_that_cannot_be_loaded_is_a_failed_measurement() -> None:
    class Broken(Reordering):
        def load_network(self, nodes):
            raise RuntimeError("no such operator")

    item = {"work_id": 1, "kind": "layer", "key": CONV.key, "payload": {"layer": CONV.to_json()}}
    (result,) = measure_work(Broken(Settings()), [item], np.random.default_rng(0))
    assert result["error"] == "RuntimeError: no such operator"


def test_real_runtimes_measure_frames() -> None:
    large = replace(RESIDUAL, c_in=64, c_out=64, size=16, kernel=3, padding=1)
    for name in ("onnxruntime", "openvino"):
        runtime = open_runtime(name, Settings())
        item = {"work_id": 1, "kind": "layer", "key": large.key, "payload": {"layer": large.to_json()}}
        (result,) = measure_work(runtime, [item], np.random.default_rng(0))
        assert result["seconds"] > LEAST_SECONDS
        assert result["conditions"]["rest"] != result["conditions"]["empty_run"], "a frame of its own"
