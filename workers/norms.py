"""Batch normalisation that is fast on a processor for few channels.

Torch's kernels take channels-last maps a pixel at a time and vectorise over its channels, so that maps of 5 or 10
channels leave most of a vector unused: ten times the time that reading the map takes. Here k neighbouring pixels are
read as one row of k * c columns, and the sums of a channel's k columns are added up at the end.

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
    by_rows = x.device.type == "cpu" and x.dtype in EXACT and pixels.is_contiguous()
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

    With d = x - mean, r = 1 / sqrt(variance + epsilon), y = d r w + b and g the gradient of y:
    dx = r w (g - sum(g) / n - d r^2 sum(g d) / n).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        c = x.shape[1]
        count, k = x.numel() // c, _pixels(x.numel() // c, c)
        rows = _rows(x, k)
        mean = _fold(rows.sum(0), c) / count
        centred = rows - mean.repeat(k)
        variance = _fold(torch.linalg.vecdot(centred, centred, dim=0), c) / count
        root = torch.rsqrt(variance + epsilon)
        scale = (root if weight is None else root * weight).repeat(k)
        y = torch.empty_like(x)  # not a view, so that an activation may change it in place
        if bias is None:
            torch.mul(centred, scale, out=_rows(y, k))
        else:
            torch.addcmul(bias.repeat(k), centred, scale, out=_rows(y, k))
        ctx.save_for_backward(centred, root, weight)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        centred, root, weight = ctx.saved_tensors
        pixels = gradients[0].permute(0, 2, 3, 1)
        c, count = len(root), centred.numel() // len(root)
        k, g = centred.shape[1] // c, pixels.reshape(centred.shape)
        sums, products = _fold(g.sum(0), c), _fold(torch.linalg.vecdot(g, centred, dim=0), c)
        scale = root if weight is None else root * weight
        of_centred, constant = -scale * root.square() * products / count, -scale * sums / count
        moved = torch.addcmul(constant.repeat(k), centred, of_centred.repeat(k)).addcmul_(g, scale.repeat(k))
        return (
            moved.view(pixels.shape).permute(0, 3, 1, 2),
            None if weight is None else products * root,
            sums if ctx.needs_input_grad[2] else None,
            None,
        )


def _pixels(count: int, c: int) -> int:
    """The largest power of two that divides the pixels and makes a row of at most COLUMNS columns."""
    k = 1
    while 2 * k * c <= COLUMNS and count % (2 * k) == 0:
        k *= 2
    return k


def _rows(maps: Tensor, k: int) -> Tensor:
    """Maps (b, c, s, s) as rows (n / k, k * c), as a view."""
    return maps.permute(0, 2, 3, 1).view(-1, k * maps.shape[1])


def _fold(columns: Tensor, c: int) -> Tensor:
    """Sums (c,) of the columns (k * c,) that belong to one channel."""
    return columns.view(-1, c).sum(0)
