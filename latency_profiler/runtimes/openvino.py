"""OpenVINO on the CPU: Intel's runtime, from the same graphs as ONNX Runtime's."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import onnx
import openvino

from latency_profiler.graphs import INPUT_NAMES, build_model, empty_model
from latency_profiler.layers import Layer, Node
from latency_profiler.quantising import quantised
from latency_profiler.runtimes.base import Loaded, Settings
from latency_profiler.spaces.space import IMAGE
from latency_profiler.tensors import Array, random_inputs, single

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
"""What computes in no integers computes in."""


class OpenVino:
    """Models compiled for one stream of `settings.threads` threads, optimised for a latency."""

    name = "openvino"
    framed = True
    version: str = version("openvino")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._core = openvino.Core()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """bfloat16 where the processor has it: elsewhere the runtime would silently compute in float32."""
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("float32", "bfloat16", "int8") if able else ("float32", "int8")

    def load_layer(self, layer: Layer) -> Loaded:
        """One layer as a graph of its own."""
        return self.load_network(single(layer))

    def load_network(self, nodes: Sequence[Node]) -> Loaded:
        """A whole network as one graph; where dtype is not float32, inputs and outputs are converted in it."""
        batch = self.settings.batch
        model = build_model(nodes, batch=batch)
        model = quantised(model) if self.settings.dtype == "int8" else model
        return self._compile(model, random_inputs(nodes, batch))

    def empty_run(self) -> Loaded:
        """A request that only passes one number on."""
        return self._compile(empty_model(), {IMAGE: np.ones((1, 1), dtype=np.float32)})

    def _compile(self, graph: onnx.ModelProto, inputs: dict[int, Array]) -> Loaded:
        model = self._core.read_model(graph.SerializeToString(), b"")
        request = self._core.compile_model(model, "CPU", self._options()).create_infer_request()
        for index, array in inputs.items():
            request.get_tensor(INPUT_NAMES[index]).data[:] = array

        def result() -> Array:
            request.infer()
            return np.array(request.get_output_tensor().data)

        return Loaded(request.infer, output=result)

    def _options(self) -> dict[str, str | int | bool]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.settings.threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.settings.dtype],
            "ENABLE_CPU_PINNING": False,
        }
