"""Graphs in int8: what runtimes make of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from latency_profiler.graphs import build_model
from latency_profiler.quantising import quantised, weight_steps
from latency_profiler.runtimes.base import Loaded, Settings
from latency_profiler.tensors import random_inputs, random_weights, single
from tests.profiler.test_graphs import reference
from tests.profiler.test_runtimes import LAYERS, NETWORKS, opened, structure

FLOATS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool"}


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_onnx_runtime_computes_in_integers_only(name: str, size: int, tmp_path: Path) -> None:
    nodes, options = structure(name, size), onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    model = quantised(build_model(nodes))
    onnx.checker.check_model(model, full_check=True)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert not FLOATS & kinds.keys(), kinds
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == 1, "what enters and what leaves"
    weighted = sum(bool(weights) for weights in (random_weights([node]) for node in nodes))
    assert kinds["QLinearConv"] + kinds["QGemm"] == weighted


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layers_in_int8_are_near(runtime: str) -> None:
    quick = opened(runtime, Settings(batch=2, dtype="int8"))
    for layer in LAYERS:
        nodes = single(layer)
        expected = reference(nodes, random_weights(nodes), random_inputs(nodes, 2))
        loaded = quick.load_layer(layer)
        assert isinstance(loaded, Loaded)
        assert np.abs(loaded.output() - expected).mean() < 0.05, layer.key


def test_every_output_channel_has_steps_of_its_own() -> None:
    weights = {"w": np.array([[0.5, -1.27], [0.0, 0.0]], dtype=np.float32)}
    steps = weight_steps(weights, "w")
    assert steps[0] == pytest.approx(0.01)
    assert np.isfinite(weights["w"] / steps[:, None]).all()
