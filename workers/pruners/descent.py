"""Training under masks: what is pruned stays zero, whatever the optimiser remembers (Han et al. 2015, section 3.3).

Zeroing gradients is not enough: momentum and Adam's averages go on moving a weight whose gradient is zero. So after
every step the masks are applied to the weights and to all that the optimiser remembers of them.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from workers.networks import PlainNetwork
from workers.sgd import Momentum, Rule

Group = Literal["all", "conv", "fc"]
"""Layers that are pruned and trained together: convolutions with their batch norms, or fully-connected layers."""
Penalty = Literal["l1", "l2"]
Optimiser = Literal["momentum", "adam"]
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as Kingma and Ba (2015) give them."""


def in_group(network: PlainNetwork, name: str, group: Group) -> bool:
    """Whether the layer of a node belongs to a group."""
    return group == "all" or (group == "fc") == (name in network.linears)


class Adam:
    """Adam over whole parameters, of which the first ones have weight decay as part of their gradient."""

    def __init__(self, decayed: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        self.parameters: list[Tensor] = [*decayed, *others]
        self.moments = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = torch.zeros((), dtype=torch.int64)
        self._decayed = len(decayed)

    @torch.no_grad()
    def step(self, rule: Rule) -> None:
        """Move by the gathered gradients, and drop them; the rule's momentum is not used."""
        self.steps += 1
        first, second = (1 - beta ** int(self.steps) for beta in BETAS)
        for i, (parameter, moment, square) in enumerate(zip(self.parameters, self.moments, self.squares, strict=True)):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if i < self._decayed:
                gradient = gradient.add(parameter, alpha=rule.decay)
            moment.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            parameter.addcdiv_(moment, (square / second).sqrt_().add_(EPSILON), value=-rule.rate / first)
            parameter.grad = None


class MaskedDescent:
    """An optimiser of the layers of one group, which begins without memory of earlier steps.

    All other layers hold still; `hold` keeps the statistics of their batch norms too.

    Args:
        masks: of all layers; they must stay the same tensors.
        decay: how strongly weights and biases are drawn to zero: by themselves (`l2`), or by their sign (`l1`).
    """

    def __init__(
        self, network: PlainNetwork, masks: Mapping[str, Tensor], group: Group, *, optimiser: Optimiser,
        momentum: float, penalty: Penalty, decay: float,
    ) -> None:  # fmt: skip
        self._network, self._group = network, group
        self._momentum, self._penalty, self._decay = momentum, penalty, decay
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(in_group(network, _unit(name), group))
        self._decayed, others = ([one for one in part if one.requires_grad] for part in network.decayed())
        self._descent = (Momentum if optimiser == "momentum" else Adam)(self._decayed, others)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._names = [names[id(parameter)] for parameter in self.parameters]
        self._masks = {
            i: masks[_unit(name)]
            for i, name in enumerate(self._names)
            if name.endswith("weight") and not name.startswith("norms")
        }

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return self._descent.parameters

    def hold(self) -> None:
        """Put the network in training mode, but for the batch norms of layers that hold still."""
        self._network.train()
        for name, norm in self._network.norms.items():
            norm.train(in_group(self._network, name, self._group))

    def mask_gradients(self) -> None:
        """Drop the gradients of pruned weights."""
        for i, mask in self._masks.items():
            if (gradient := self.parameters[i].grad) is not None:
                gradient.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move by the gathered gradients and the penalty, and apply the masks."""
        if self._penalty == "l1":
            for parameter in self._decayed:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient.add_(parameter.sign(), alpha=self._decay)
        self._descent.step(Rule(rate, self._momentum, self._decay if self._penalty == "l2" else 0.0))
        for i, mask in self._masks.items():
            for tensors in (self.parameters, *self._remembered().values()):
                tensors[i].masked_fill_(~mask, 0.0)

    def state(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by name; not copies."""
        tensors = {
            f"{kind}.{name}": tensor
            for kind, remembered in self._remembered().items()
            for name, tensor in zip(self._names, remembered, strict=True)
        }
        return tensors | ({"steps": self._descent.steps} if isinstance(self._descent, Adam) else {})

    def _remembered(self) -> dict[str, list[Tensor]]:
        squares = {"squares": self._descent.squares} if isinstance(self._descent, Adam) else {}
        return {"moments": self._descent.moments} | squares


def _unit(parameter: str) -> str:
    """The node of a parameter: `convs.3.weight` is one of node 3."""
    return parameter.split(".")[1]
