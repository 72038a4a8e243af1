"""Batch norm by rows of pixels: equal to torch's, forward, backward and in its running statistics."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers import norms
from workers.norms import Norm, batch_norm

SHAPES = [(7, 5, 32), (128, 82, 4), (5, 1, 3), (9, 200, 1), (16, 10, 8)]


@pytest.fixture(autouse=True)
def _by_rows_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "MANY", 0)
    monkeypatch.setattr(norms, "FEW", 1)


def channels_last(b: int, c: int, s: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return (torch.randn(b, s, s, c, generator=random) * 3 + 5).permute(0, 3, 1, 2)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_with_gradients_and_running_statistics(shape: tuple[int, int, int], affine: bool) -> None:
    c, x = shape[1], channels_last(*shape)
    found = []
    for compute in (batch_norm, functional.batch_norm):
        images = x.clone().requires_grad_()
        weight = torch.linspace(0.5, 2.0, c).requires_grad_() if affine else None
        bias = torch.linspace(-1.0, 1.0, c).requires_grad_() if affine else None
        mean, variance = torch.zeros(c), torch.ones(c)
        y = compute(images, mean, variance, weight, bias, True, 0.1, 1e-5)
        functional.relu_(y).square().sum().backward()  # type: ignore[no-untyped-call]
        leaves = [leaf.grad for leaf in (images, weight, bias) if leaf is not None]
        found.append([y.detach(), mean, variance, *leaves])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_gradient_is_the_derivative() -> None:
    x = channels_last(4, 3, 2).double().requires_grad_()
    weight, bias = torch.tensor([[0.5, 1.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w, b: batch_norm(x, None, None, w, b, True, 0.1, 1e-5), leaves)


def test_a_second_derivative_is_refused() -> None:
    """Ours would be wrong without a word: what the backward pass reads was computed outside the graph."""
    x = channels_last(4, 3, 2).requires_grad_()
    y = batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()  # type: ignore[no-untyped-call]


def test_maps_in_another_order_of_memory_are_torch_s_own_affair() -> None:
    x = channels_last(4, 3, 8).contiguous()
    y = batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    assert torch.equal(y, functional.batch_norm(x, None, None, training=True))


def test_module_keeps_torch_s_cumulative_average() -> None:
    ours, theirs = Norm(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for part in torch.split(channels_last(12, 3, 8), 4):
        ours(part), theirs(part)
    assert torch.allclose(ours.running_mean, theirs.running_mean)  # type: ignore[arg-type]
    assert torch.allclose(ours.running_var, theirs.running_var)  # type: ignore[arg-type]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
