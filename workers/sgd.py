"""SGD with momentum; for generators, at a cost that grows with the part of a parameter that a step uses.

A step of a PruningNet uses a small leading block of each generator's second layer; the gradient of the rest is zero,
but momentum and weight decay still move it. For an entry without gradient one step is linear,

    m' = momentum * m + decay * w
    w' = w - rate * m'

so `skipped` steps are one 2 x 2 matrix power, applied when the entry is next used. With the gradient g of the step
itself added (m' += g, w' -= rate * g) this is plain SGD up to rounding, at the cost of the block instead of the whole.
The matrix belongs to one learning rate: `catch_up` brings every entry up to date before the rate changes.

What a block writes is weight @ hidden + bias, so the gradient of its weight is the bias's times the hidden units, and
is never stored.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from workers.pruning_net import Crop


@dataclass(frozen=True, slots=True)
class Rule:
    """What one step does."""

    rate: float
    momentum: float
    decay: float

    def powers(self, steps: int) -> Tensor:
        """(steps + 1, 4): row k has the entries w<-w, w<-m, m<-w, m<-m of k steps without gradient."""
        m_row = [self.decay, self.momentum]
        one = np.array([[1 - self.rate * m_row[0], -self.rate * m_row[1]], m_row])
        rows = [np.eye(2)]
        for _ in range(steps):
            rows.append(one @ rows[-1])
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(steps + 1, 4))


class Momentum:
    """Plain SGD over whole parameters, of which the first ones have weight decay and the others none."""

    def __init__(self, decayed: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        self.parameters: list[Tensor] = [*decayed, *others]
        self.moments = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._decayed = len(decayed)

    @torch.no_grad()
    def step(self, rule: Rule) -> None:
        """Move by the gathered gradients, and drop them; a parameter without one moves by momentum and decay."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self._decayed:
            torch._foreach_add_(gradients[: self._decayed], self.parameters[: self._decayed], alpha=rule.decay)
        torch._foreach_mul_(self.moments, rule.momentum)
        torch._foreach_add_(self.moments, gradients)
        torch._foreach_add_(self.parameters, self.moments, alpha=-rule.rate)
        for parameter in self.parameters:
            parameter.grad = None


class CroppedSGD:
    """Moves one weight (c_out, c_in, k*k, H) and its bias (c_out, c_in, k*k) by gradients of their leading blocks.

    `done` (c_out, c_in) counts the steps since the last `catch_up` that are contained in each entry.
    """

    def __init__(self, whole: Crop) -> None:
        self.whole = whole
        self.momentum = Crop(torch.zeros_like(whole.weight), torch.zeros_like(whole.bias))
        self.done = torch.zeros(whole.bias.shape[:2], dtype=torch.int64, device=whole.bias.device)

    def begin(self, crop: Crop, step: int, powers: Tensor, rate: float) -> Crop:
        """A leading block as it is after `step` steps: copies, of which the bias gathers gradients.

        The block itself takes its next step, but for the gradient, which `end` adds.
        """
        c_out, c_in = crop.bias.shape[:2]
        done = self.done[:c_out, :c_in]
        before, after = powers[step - done], powers[step + 1 - done]  # (c_out, c_in, 4)
        weight, bias = (_moved(value, moment, before, after, rate) for value, moment in self._pairs(c_out, c_in))
        done.fill_(step + 1)
        return Crop(weight, bias.requires_grad_())

    def end(self, crop: Crop, hidden: Tensor, rate: float) -> None:
        """The rest of the step: the block that `begin` gave moves by the gradient that its bias gathered.

        Args:
            hidden: the hidden units (H,) that the block was multiplied with.
        """
        gradient = crop.bias.grad
        assert gradient is not None
        (weight, of_weight), (bias, of_bias) = self._pairs(*gradient.shape[:2])
        of_weight.addcmul_(gradient[..., None], hidden)
        weight.addcmul_(gradient[..., None], hidden, value=-rate)
        of_bias.add_(gradient)
        bias.add_(gradient, alpha=-rate)

    def catch_up(self, step: int, powers: Tensor) -> None:
        """Bring every entry to `step` steps, and count from zero again."""
        factors = powers[step - self.done]
        for value, moment in self._pairs(*self.done.shape):
            moved = _combined(value, moment, factors, 2)
            value.copy_(_combined(value, moment, factors, 0))
            moment.copy_(moved)
        self.done.zero_()

    def _pairs(self, c_out: int, c_in: int) -> list[tuple[Tensor, Tensor]]:
        """The leading blocks of weight and bias, each with its momentum."""
        whole, momentum = self.whole, self.momentum
        return [
            (whole.weight.detach()[:c_out, :c_in], momentum.weight[:c_out, :c_in]),
            (whole.bias.detach()[:c_out, :c_in], momentum.bias[:c_out, :c_in]),
        ]


def _moved(value: Tensor, moment: Tensor, before: Tensor, after: Tensor, rate: float) -> Tensor:
    """The value under the powers `before`; in place, value and moment go on to where the powers `after` lead."""
    current = _combined(value, moment, before, 0)
    moment.mul_(_column(after, 3, value)).addcmul_(value, _column(after, 2, value))
    torch.add(current, moment, alpha=-rate, out=value)
    return current


def _combined(value: Tensor, moment: Tensor, factors: Tensor, column: int) -> Tensor:
    """Value * factors[column] + moment * factors[column + 1], entry by entry of (c_out, c_in)."""
    return (value * _column(factors, column, value)).addcmul_(moment, _column(factors, column + 1, value))


def _column(factors: Tensor, column: int, value: Tensor) -> Tensor:
    """One factor for each entry of (c_out, c_in), shaped to multiply `value`."""
    return factors[..., column].reshape(*factors.shape[:2], *(1,) * (value.dim() - 2))
