"""SGD with momentum; for generators, at a cost that grows with the part of a parameter that a step uses.

A step of a PruningNet uses a small leading block of each generator's second layer; the gradient of the rest is zero,
but momentum and weight decay still move it:

    m' = momentum * m + decay * w + g
    w' = w - rate * m'

Without a gradient g this is a linear map of (w, m) with two eigenvectors: a slow mode, which is weight decay, and a
fast one, which is what momentum still carries. Written in them, w = p + q, with p' = slow * p + a * g and q' = fast * q
+ b * g. What is kept is P = p / slow^t and Q = q / fast^t after t steps: they do not change where there is no gradient,
so a step touches nothing but its block, and all entries are those of plain SGD up to rounding. The modes belong to one
learning rate; `rebase` changes them with it.

What a block writes is weight @ hidden + bias, so its weight's gradient is the bias's times the hidden units, and is
never stored; and it is P @ (slow^t * hidden) + Q @ (fast^t * hidden) + bias, so neither is the weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.pruning_net import Crop

SPAN = 1e9
"""A mode's unit shrinks by this factor at most before P, or Q, is written in a new one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one step does."""

    rate: float
    momentum: float
    decay: float

    @property
    def apart(self) -> bool:
        """Whether there are two modes; else weights would oscillate. Near the bound they are told apart badly."""
        return self.rate * self.decay < (1 - math.sqrt(self.momentum)) ** 2


class Momentum:
    """Plain SGD over whole parameters, of which the first ones have weight decay and the others none.

    Args:
        rates: learning rates of some of them, over a rule's.
    """

    def __init__(
        self, decayed: list[nn.Parameter], others: list[nn.Parameter], rates: Mapping[nn.Parameter, float] | None = None
    ) -> None:
        self.parameters: list[Tensor] = [*decayed, *others]
        self.moments = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._decayed = len(decayed)
        own = [(rates or {}).get(parameter, 1.0) for parameter in (*decayed, *others)]
        self._groups = {rate: [i for i, one in enumerate(own) if one == rate] for rate in own}

    @torch.no_grad()
    def step(self, rule: Rule) -> None:
        """Move by the gathered gradients, and drop them; a parameter without one moves by momentum and decay."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self._decayed:
            torch._foreach_add_(gradients[: self._decayed], self.parameters[: self._decayed], alpha=rule.decay)
        torch._foreach_mul_(self.moments, rule.momentum)
        torch._foreach_add_(self.moments, gradients)
        for rate, group in self._groups.items():
            moved, by = [self.parameters[i] for i in group], [self.moments[i] for i in group]
            torch._foreach_add_(moved, by, alpha=-rate * rule.rate)
        for parameter in self.parameters:
            parameter.grad = None


class Modes:
    """The two modes of a rule: a row of two numbers is (slow, fast).

    Raises:
        ValueError: the rule's modes are not `apart`.
    """

    def __init__(self, rule: Rule) -> None:
        if not rule.apart:
            raise ValueError(f"{rule}: weight decay this strong makes weights oscillate")
        mean, rate = (1 + rule.momentum - rule.rate * rule.decay) / 2, rule.rate
        slow = mean + math.sqrt(mean**2 - rule.momentum)
        if rule.momentum:
            fast = rule.momentum / slow
            per_slow, per_fast = (1 - slow) / (rate * slow), (1 - fast) / (rate * fast)
            of_slow = (1 + rate * per_fast) / (per_slow - per_fast)
            self.gains = of_slow, -rate - of_slow
            self.moments = per_slow, per_fast
        else:  # there is one mode; the other stays zero
            slow, fast, self.gains, self.moments = 1 - rate * rule.decay, 1.0, (-rate, 0.0), (0.0, 1.0)
        self._modes = slow, fast
        self._spans = [max(1, int(math.log(SPAN) / -math.log(mode))) if mode < 1.0 else 2**53 for mode in (slow, fast)]
        """Steps after which P, and Q, get a new unit."""

    def units(self, step: int) -> tuple[float, float]:
        """What P and Q are multiplied by after `step` steps to be p and q."""
        slow, fast = (mode ** (step % span) for mode, span in zip(self._modes, self._spans, strict=True))
        return slow, fast

    def steps(self, step: int) -> tuple[float, float]:
        """By what P and Q change for each unit of the gradient of the `step`-th step."""
        slow, fast = (mode ** (step % span + 1) for mode, span in zip(self._modes, self._spans, strict=True))
        return self.gains[0] / slow, self.gains[1] / fast

    def renewals(self, step: int) -> list[tuple[int, float]]:
        """Which of P (0) and Q (1) is to be multiplied by what after the `step`-th step, which ends its unit."""
        both = enumerate(zip(self._modes, self._spans, strict=True))
        return [(at, mode**span) for at, (mode, span) in both if (step + 1) % span == 0]


class CroppedSGD:
    """Moves one weight (c_out, c_in, k*k, H) and its bias (c_out, c_in, k*k) by gradients of their leading blocks.

    `weight` (c_out, c_in, k*k, 2H) and `bias` (c_out, c_in, k*k, 2) hold P and then Q. They are the truth; the
    parameters themselves are as they were at the last `write`.
    """

    def __init__(self, whole: Crop, modes: Modes) -> None:
        self._whole = whole
        still = Crop(torch.zeros_like(whole.weight), torch.zeros_like(whole.bias))
        self.weight, self.bias = torch.cat([still.weight] * 2, -1), torch.stack([still.bias] * 2, -1)
        self._enter(whole, still, modes)

    def begin(self, c_out: int, c_in: int, units: Tensor) -> Crop:
        """A leading block, for hidden units that are `fed`, with modes of these units (2,); its bias gathers gradients.

        What a step multiplies by is a tensor, which is brought to a GPU once for all blocks.
        """
        return Crop(self.weight[:c_out, :c_in], (self.bias[:c_out, :c_in] @ units).requires_grad_())

    def end(self, crop: Crop, hidden: Tensor, by: Tensor, renewals: Sequence[tuple[int, float]]) -> None:
        """Take a step: by the gradient that the bias of the block from `begin` has gathered.

        Args:
            hidden: the hidden units (H,) that the block was multiplied with.
            by: what `Modes.steps` gives, as a tensor (2,).
            renewals: what `Modes.renewals` gives.
        """
        gradient = crop.bias.grad
        assert gradient is not None
        crop.weight.addcmul_(gradient[..., None], fed(hidden, by))
        c_out, c_in = gradient.shape[:2]
        self.bias[:c_out, :c_in].addcmul_(gradient[..., None], by)
        for at, factor in renewals:
            for part in (self.weight, self.bias):
                part.tensor_split(2, -1)[at].mul_(factor)

    def rebase(self, old: Modes, steps: int, new: Modes) -> None:
        """After `steps` steps of the old modes: the same state in new ones, before their first step."""
        self._enter(self.current(old, steps), self.moments(old, steps), new)

    def current(self, modes: Modes, step: int) -> Crop:
        """Weight and bias after `step` steps."""
        return self._mixed(modes.units(step))

    def moments(self, modes: Modes, step: int) -> Crop:
        """Their momentum after `step` steps."""
        slow, fast = modes.units(step)
        return self._mixed((slow * modes.moments[0], fast * modes.moments[1]))

    @torch.no_grad()
    def write(self, modes: Modes, step: int) -> None:
        """Let the parameters be what they are after `step` steps."""
        now = self.current(modes, step)
        self._whole.weight.copy_(now.weight)
        self._whole.bias.copy_(now.bias)

    def _mixed(self, factors: tuple[float, float]) -> Crop:
        weight, bias = (
            torch.add(*(half * factor for half, factor in zip(part.tensor_split(2, -1), factors, strict=True)))
            for part in (self.weight, self.bias)
        )
        return Crop(weight, bias[..., 0])

    @torch.no_grad()
    def _enter(self, value: Crop, moment: Crop, modes: Modes) -> None:
        """Solve p + q = value and p * moments[0] + q * moments[1] = moment."""
        per_slow, per_fast = modes.moments
        for part, w, m in (
            (self.weight, value.weight, moment.weight), (self.bias, value.bias[..., None], moment.bias[..., None])
        ):  # fmt: skip
            slow, fast = part.tensor_split(2, -1)
            torch.sub(m, w, alpha=per_fast, out=slow)
            slow.div_(per_slow - per_fast)
            torch.sub(w, slow, out=fast)


def fed(hidden: Tensor, factors: Tensor) -> Tensor:
    """Hidden units (H,) for both modes (2H,), each times its one of the factors (2,)."""
    return (factors[:, None] * hidden).flatten()
