"""PyTorch compiled by TorchInductor: convolution and what follows it as one kernel. Needs a C++ compiler.

Weights are frozen, that is constants which are packed once. Compiling takes up to seconds a layer, and half a minute
more for the first; a call costs more than an eager one (its guards), which the empty run shows.
"""

import torch
from torch import fx

from latency_profiler.runtimes.base import Loaded
from latency_profiler.runtimes.torch import Forward, Tensors, Torch
from latency_profiler.spaces.space import IMAGE


class TorchCompile(Torch):
    """What `Torch` computes, traced into one graph and compiled for its shapes."""

    name = "torch-compile"

    def empty_run(self) -> Loaded:
        """Adding one to one number: a compiled function that computes nothing is no call."""
        return self._ready(lambda inputs: inputs[IMAGE] + 1, {IMAGE: torch.ones(1)})

    def _ready(self, compute: Forward, inputs: Tensors) -> Loaded:
        # A graph module has code of its own; closures over layers would share one, and its cache of eight versions.
        module = fx.symbolic_trace(compute)
        compiled = torch.compile(
            module, fullgraph=True, dynamic=False, options={"freezing": True, "compile_threads": 1}
        )
        loaded = super()._ready(compiled, inputs)
        loaded.run()  # compiles
        return loaded
