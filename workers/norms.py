"""Batch normalisation that is fast on a processor for few channels.

Torch's kernels take channels-last maps a pixel at a time and vectorise over its channels, so that maps of 5 or 10
channels leave most of a vector unused: ten times the time that reading the map takes. Here the same kernels are given k
neighbouring pixels as one row of k * c columns, and what they say of a channel's k columns is put together. It is also
more exact, since each column adds up fewer numbers.

Letters: n pixels of all images, c channels, k pixels of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import has_torch_function

EXACT = (torch.float32, torch.float64)
COLUMNS = 128
"""A row has at least half as many columns, where the number of pixels allows it."""
FEW = 4
"""From so many pixels a row this is faster, where a map has `MANY` numbers."""
MANY = 2**17


class Norm(nn.BatchNorm2d):
    """torch's batch norm, computed by `batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised maps (b, c, s, s)."""
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum or 0.0, self.eps
        )


def batch_norm(
    x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, epsilon: float,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.batch_norm` of maps (b, c, s, s), by rows of pixels where this trains on a processor."""
    pixels = x.permute(0, 2, 3, 1)
    narrow = x.numel() >= MANY and _pixels(x.numel() // x.shape[1], x.shape[1]) >= FEW
    by_rows = narrow and x.device.type == "cpu" and x.dtype in EXACT and pixels.is_contiguous()
    if not training or not by_rows or has_torch_function((x,)):  # the last: several processes train (`parallel`)
        return functional.batch_norm(x, mean, variance, weight, bias, training, momentum, epsilon)
    made: tuple[Tensor, Tensor, Tensor] = _ByRows.apply(x, weight, bias, epsilon)  # type: ignore[no-untyped-call]
    y, batch_mean, batch_variance = made
    if mean is not None and variance is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            mean.lerp_(batch_mean, momentum)
            variance.lerp_(batch_variance * (count / max(1, count - 1)), momentum)
    return y


class _ByRows(torch.autograd.Function):
    """Normalised maps, with mean and variance (c,) of the batch.

    With r = 1 / sqrt(variance + epsilon), y = (x - mean) r w + b and g the gradient of y:
    dx = r w (g - sum(g) / n - (x - mean) r^2 sum(g (x - mean)) / n).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        c = x.shape[1]
        k = _pixels(x.numel() // c, c)
        means, variances = torch.batch_norm_update_stats(_columns(x, k), None, None, 0.0)
        between, mean = torch.var_mean(means.view(k, c), 0, correction=0)
        variance = variances.view(k, c).mean(0).add_(between)
        root = (variance + epsilon).rsqrt_()
        scale = root if weight is None else root * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        y = torch.empty_like(x)  # not a view, so that an activation may change it in place
        torch.addcmul(_tiled(shift, k), _rows(x, k), _tiled(scale, k), out=_rows(y, k))
        ctx.save_for_backward(x, mean, root, scale)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, mean, root, scale = ctx.saved_tensors
        g, c, count = gradients[0].contiguous(memory_format=torch.channels_last), len(mean), x.numel() // len(mean)
        k = _pixels(count, c)
        _, products, sums = torch.ops.aten.native_batch_norm_backward(
            _columns(g, k), _columns(x, k), None, None, None, _tiled(mean, k), _tiled(root, k), True, 0.0,
            [False, True, True],
        )  # fmt: skip
        products, sums = _fold(products, c), _fold(sums, c)  # of g (x - mean) r, and of g
        of_x = scale * root * products / -count
        constant = torch.addcmul(scale * sums / -count, mean, of_x, value=-1)
        moved = torch.empty_like(x)
        rows = _rows(moved, k)
        torch.addcmul(_tiled(constant, k), _rows(x, k), _tiled(of_x, k), out=rows)
        rows.addcmul_(_rows(g, k), _tiled(scale, k))
        return moved, products if ctx.needs_input_grad[1] else None, sums if ctx.needs_input_grad[2] else None, None


def _pixels(count: int, c: int) -> int:
    """The largest power of two that divides the pixels and makes a row of at most COLUMNS columns."""
    k = 1
    while 2 * k * c <= COLUMNS and count % (2 * k) == 0:
        k *= 2
    return k


def _rows(maps: Tensor, k: int) -> Tensor:
    """Maps (b, c, s, s) as rows (n / k, k * c), as a view."""
    return maps.permute(0, 2, 3, 1).view(-1, k * maps.shape[1])


def _columns(maps: Tensor, k: int) -> Tensor:
    """The same rows as maps (1, k * c, n / k, 1) for torch's kernels, as a view."""
    return _rows(maps, k).T[None, ..., None]


def _tiled(channels: Tensor, k: int) -> Tensor:
    """A value (c,) of each channel for the columns (k * c,) of a row; `repeat` takes five times as long."""
    return channels.expand(k, -1).reshape(-1)


def _fold(columns: Tensor, c: int) -> Tensor:
    """Sums (c,) of the columns (k * c,) that belong to one channel."""
    return columns.view(-1, c).sum(0)
