"""ONNX Runtime on the CPU: what people deploy, and the default.

Inputs and outputs are bound to arrays once, so that a run copies nothing but what the graph itself moves.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime

from latency_profiler.graphs import INPUT_NAMES, OUTPUT_NAME, build_model, empty_model
from latency_profiler.layers import Layer, Node
from latency_profiler.quantising import quantised
from latency_profiler.runtimes.base import Loaded, Settings
from latency_profiler.spaces.space import IMAGE
from latency_profiler.tensors import Array, output_shape, random_inputs, single


class OnnxRuntime:
    """Sessions with all graph optimisations, sequential, `settings.threads` threads inside an operator."""

    name = "onnxruntime"
    version: str = onnxruntime.__version__
    framed = True
    dtypes = ("float32", "int8")  # its CPU provider has no convolution in bfloat16 or float16

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._options = _options(settings.threads)

    def load_layer(self, layer: Layer) -> Loaded:
        """One layer as a graph of its own."""
        return self.load_network(single(layer))

    def load_network(self, nodes: Sequence[Node]) -> Loaded:
        """A whole network as one graph."""
        batch = self.settings.batch
        output = np.zeros(output_shape(nodes[-1].layer, batch), dtype=np.float32)
        model = build_model(nodes, batch=batch)
        model = quantised(model) if self.settings.dtype == "int8" else model
        return self._bind(model, random_inputs(nodes, batch), output)

    def empty_run(self) -> Loaded:
        """A session that only passes one number on."""
        number = np.ones((1, 1), dtype=np.float32)
        return self._bind(empty_model(), {IMAGE: number}, number.copy())

    def _bind(self, model: onnx.ModelProto, inputs: dict[int, Array], output: Array) -> Loaded:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), self._options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        for index, array in inputs.items():
            binding.bind_ortvalue_input(INPUT_NAMES[index], onnxruntime.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output(OUTPUT_NAME, onnxruntime.OrtValue.ortvalue_from_numpy(output))

        def result() -> Array:
            session.run_with_iobinding(binding)
            return output.copy()

        return Loaded(lambda: session.run_with_iobinding(binding), output=result)


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads of a session that has finished its run must not spin while another session is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
