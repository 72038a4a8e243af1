"""Training steps as CUDA graphs.

In a step of a small network the host needs longer to launch hundreds of kernels than a GPU needs to run them. A step
that is the same every time is recorded once and launched as a whole.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """Work that can be repeated on new values of its inputs (`torch.cuda.CUDAGraph`)."""

    def replay(self) -> None:
        """Do it again."""


class Replay:
    """Does the same work on tensors of the same shapes again and again.

    Args:
        work: gets a learning rate and tensors; it may change what it owns in place, and must not make the host wait.
    """

    def __init__(self, work: Callable[..., None], device: torch.device) -> None:
        self._work, self._stream = work, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._rate: float | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._recording: Recording | None = None

    def __call__(self, rate: float, *inputs: Tensor) -> None:
        """The work: as it is at the first time with a rate, recorded at the second, and repeated from then on."""
        if rate != self._rate:
            self._rate, self._recording = rate, None
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._work(rate, *inputs)
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            return
        if self._recording is None:
            self._inputs = tuple(one.clone() for one in inputs)
            self._recording = self._record(rate)
        for mine, new in zip(self._inputs, inputs, strict=True):
            mine.copy_(new)
        self._recording.replay()

    def _record(self, rate: float) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._work(rate, *self._inputs)
        return graph
