"""Data-parallel training: several processes of one job train in lock-step, each on its part of every batch.

Fabric joins the processes that torchrun has started and gives each its device. Its wrapper for modules (torch's DDP)
is not used: it averages gradients of whole parameters at their own place, but a PruningNet's belong to cropped leaves
that are new in every step. What is summed instead is the gradient of each *weight that meets images*: of a structure's
generated weights, not of the generators, which are some 30 times larger; each process repeats the step of the
generators with the same numbers. So all processes hold the same parameters after every step, and one process's
training is what they do together, up to the order in which numbers are added.

All processes run on one machine. Process 0 decides: the others do what it tells, and stop when it stops.
"""

import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PATIENCE = timedelta(days=3650)
"""How long a process waits for an order. It ends before that: with its launcher, or when process 0 is gone."""


class Team:
    """The processes that train together; this one is a single process, which shares nothing and costs nothing."""

    rank = 0
    size = 1

    def part(self, images: int) -> slice:
        """This process's part of a batch."""
        return slice(0, images)

    def synchronised(self) -> AbstractContextManager[object]:
        """Within it, batch norms in training mode use the statistics of the whole batch."""
        return nullcontext()

    def share(self, weights: Iterable[Tensor]) -> None:
        """From now on the gradients of these weights are sums over all processes."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return tensor

    def agree(self, decision: bool) -> bool:
        """What process 0 has decided."""
        return decision

    def tell(self, order: dict[str, Any] | None) -> None:
        """Process 0 only: what the others do next; None sends them home."""

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values of process 0, in place."""


ALONE = Team()


def launched() -> bool:
    """Whether this process is one of those that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """The number of this process among those of this machine; 0 if it is the only one."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def launch(processes: int, module: str, arguments: list[str]) -> int:
    """Run a module as so many processes under torchrun; returns 0 if all of them ended so.

    SIGTERM goes to process 0 alone, which ends the others when it is ready. The processes are to die with this one.
    Addresses are exchanged through a store that anybody who reaches its port can read; it is never unpickled.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signal.signal(signal.SIGTERM, _to_process_0)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="secateurs-torchrun-") as logs:
        options = [
            f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={_free_port()}",
            "--max-restarts=0", "--signals-to-handle=SIGINT", "--shutdown-timeout=5", f"--log-dir={logs}",
        ]  # fmt: skip
        try:
            torchrun.main([*options, "-m", module, *arguments])
        except ChildFailedError:  # torchrun has logged which
            return 1
    return 0


def _to_process_0(*_: object) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.environ().get("RANK") == "0":
                child.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Ranks(Team):
    """Processes that torchrun has started.

    Args:
        device: of this process.
        timeout: seconds after which a process that waits for another one in the midst of training gives up.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        # Only here: importing Fabric takes seconds, and most jobs have one process.
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, timeout=timedelta(seconds=timeout))
        Fabric(accelerator=device.type, devices=self.size, strategy=strategy).launch()
        # Orders and decisions travel between hosts, so that no GPU is waited for, and may be hours apart.
        self._orders = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def part(self, images: int) -> slice:
        """Equal parts, as far as that goes; some are empty where there are fewer images than processes."""
        return slice(self.rank * images // self.size, (self.rank + 1) * images // self.size)

    def synchronised(self) -> AbstractContextManager[object]:
        """As all processes must be in it together."""
        return _SynchronisedNorms()

    def share(self, weights: Iterable[Tensor]) -> None:
        """For parameters once, for computed weights before they are used."""
        for weight in weights:
            weight.register_hook(_summed)  # type: ignore[no-untyped-call]

    def sum(self, tensor: Tensor) -> Tensor:
        """Without the barrier that Fabric's own would wait at first."""
        distributed.all_reduce(tensor)
        return tensor

    def agree(self, decision: bool) -> bool:
        """Waits for it, but for no device."""
        flag = torch.tensor([decision])
        distributed.broadcast(flag, 0, group=self._orders)
        return bool(flag)

    def tell(self, order: dict[str, Any] | None) -> None:
        """As JSON: torch's broadcast of objects would pickle."""
        text = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
        distributed.broadcast(torch.tensor([len(text)]), 0, group=self._orders)
        distributed.broadcast(text, 0, group=self._orders)

    def hear(self) -> dict[str, Any] | None:
        """What process 0 tells; waits for it."""
        length = torch.zeros(1, dtype=torch.int64)
        distributed.broadcast(length, 0, group=self._orders)
        text = torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(text, 0, group=self._orders)
        order: dict[str, Any] | None = json.loads(text.numpy().tobytes())
        return order

    def align(self, tensors: Iterable[Tensor]) -> None:
        """One after the other, so that no copy of all is made."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, 0)
            tensor.detach().copy_(whole)


def _summed(gradient: Tensor) -> Tensor:
    whole = gradient.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(whole)
    return whole


class _SynchronisedNorms(TorchFunctionMode):
    """Every `functional.batch_norm` in training mode sees the whole batch; torch's own SyncBatchNorm needs a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm and kwargs.get("training"):
            x, mean, variance = args
            return _BatchNorm.apply(  # type: ignore[no-untyped-call]
                x, kwargs["weight"], kwargs["bias"], mean, variance, kwargs["momentum"], kwargs["eps"]
            )
        return func(*args, **kwargs)


class _BatchNorm(torch.autograd.Function):
    """Batch norm (b, c, s, s) over the images of all processes, from torch's kernels for fixed statistics.

    Gradients of weight and bias come out summed over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_variance: Tensor | None, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        c = x.shape[1]
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
        mean, variance = mean.double(), variance.double()
        sums = torch.cat([mean, variance + mean * mean, torch.ones_like(mean[:1])]) * (x.numel() // c)
        distributed.all_reduce(sums)
        count = sums[-1]
        mean = sums[:c] / count
        variance = (sums[c:-1] / count - mean * mean).clamp_(min=0.0)
        if running_mean is not None and running_variance is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_variance.lerp_((variance * (count / (count - 1))).to(running_variance.dtype), momentum)
        mean, variance = mean.float(), variance.float()
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        normed: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, variance, count = ctx.saved_tensors
        c = x.shape[1]
        scaled, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([of_weight, of_bias]).double()
        distributed.all_reduce(sums)
        # With fixed statistics dx = factor * dy; their own dependence on x subtracts
        # factor * (sum(dy) + x_hat * sum(dy * x_hat)) / count (Ioffe and Szegedy 2015, section 3).
        inverse = torch.rsqrt(variance.double() + ctx.eps)
        factor = inverse if weight is None else inverse * weight
        slope = factor * inverse * sums[:c] / count
        offset = factor * sums[c:] / count - slope * mean
        shape = (1, c, 1, 1)
        moved = scaled - torch.addcmul(offset.to(x.dtype).view(shape), x, slope.to(x.dtype).view(shape))
        of_weight, of_bias = sums[:c].to(mean.dtype), sums[c:].to(mean.dtype)
        return moved, None if weight is None else of_weight, None if weight is None else of_bias, *[None] * 4
