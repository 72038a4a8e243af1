"""Auxiliary classifiers: heads behind some nodes of a network, trained with it and dropped afterwards (CCP-AC).

The publication names neither their form nor their places. Here a head is the mean over pixels and a linear layer, and
the heads stand at *joints*: nodes whose map is all that later nodes see of the image.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_profiler.errors import InvalidInput
from latency_profiler.layers import Op
from latency_profiler.spaces.space import Space
from workers.datasets import Data, generator
from workers.networks import PlainNetwork, bare, run
from workers.parallel import ALONE, Team
from workers.pruners.gates import Gate, gated, of, passed
from workers.sgd import Momentum, Rule
from workers.training import ScratchTrainer, TrainingSettings


def joints(space: Space) -> list[int]:
    """The joints before the last convolution."""
    last = max(i for i, unit in enumerate(space.units) if unit.op is Op.CONV)
    earliest = [min(unit.input, unit.input if unit.shortcut is None else unit.shortcut) for unit in space.units]
    return [i for i in range(last) if all(read >= i for read in earliest[i + 1 :])]


class Heads(nn.Module):
    """Linear classifiers on the pixels' mean of a network's maps at some nodes, `linears.<node>`."""

    def __init__(self, network: PlainNetwork, nodes: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.space, self.nodes, self._seed = network.space, nodes, seed
        widths = {i: network.nodes[i].layer.c_out for i in nodes}
        self.linears = nn.ModuleDict({str(i): bare(nn.Linear, widths[i], self.space.classes) for i in nodes})
        random = generator(seed, "heads")
        with torch.no_grad():
            for i in nodes:
                self.linear(i).weight.normal_(0.0, 0.01, generator=random)
                self.linear(i).bias.zero_()

    @classmethod
    def spread(cls, network: PlainNetwork, count: int, seed: int) -> Self:
        """So many heads, evenly spread over the joints.

        Raises:
            InvalidInput: there are fewer joints.
        """
        places = joints(network.space)
        if not 0 < count <= len(places):
            raise InvalidInput(f"{network.space.name} has places for 1 to {len(places)} auxiliary heads, not {count}")
        nodes = tuple(places[(i + 1) * len(places) // (count + 1)] for i in range(count))
        return cls(network, nodes, seed)

    def linear(self, node: int) -> nn.Linear:
        """The head behind a node."""
        linear = self.linears[str(node)]
        assert isinstance(linear, nn.Linear)
        return linear

    def behind(self, slot: int) -> int | None:
        """Which head is the first one behind a slot; None where there is none."""
        first = min(i for i, unit in enumerate(self.space.units) if unit.target.index == slot)
        return next((k for k, node in enumerate(self.nodes) if node >= first), None)

    def forward(self, maps: Mapping[int, Tensor], gates: Mapping[int, Tensor], kind: Gate) -> list[Tensor]:
        """Logits (b, classes) of every head, for the maps (b, c, s, s) at its node, read as other dense layers do."""
        read = {i: passed(maps[i], self.space.units[i].target, gates, kind) for i in self.nodes}
        logits: list[Tensor] = [self.linear(i)(read[i].mean((2, 3))) for i in self.nodes]
        return logits

    @torch.no_grad()
    def shrink(self, network: PlainNetwork, kept: Mapping[int, Tensor]) -> "Heads":
        """The heads for what `surgery.shrink` has made of their network."""
        smaller = Heads(network, self.nodes, self._seed).to(next(self.parameters()))
        for i in self.nodes:
            columns, weight = of(self.space.units[i].target, kept), self.linear(i).weight
            smaller.linear(i).weight.copy_(weight if columns is None else weight[:, columns])
            smaller.linear(i).bias.copy_(self.linear(i).bias)
        return smaller


def outputs(
    network: PlainNetwork, heads: Heads | None, images: Tensor, gates: Mapping[int, Tensor], kind: Gate
) -> list[Tensor]:  # fmt: skip
    """Logits (b, classes) of a network with gates, and of its heads."""
    apply = gated(network, gates, kind)
    maps: dict[int, Tensor] = {}
    wanted = () if heads is None else heads.nodes

    def watched(i: int, x: Tensor) -> Tensor:
        if network.nodes[i].input in wanted:
            maps[network.nodes[i].input] = x
        return apply(i, x)

    logits = run(network.nodes, images, watched)
    return [logits] if heads is None else [logits, *heads(maps, gates, kind)]


class SupervisedTrainer(ScratchTrainer):
    """Trains a network and its heads together, by the sum of their losses.

    Args:
        weight: of every head's loss.
        frozen: whether only the heads learn; the network then stays as it is, its batch norms too.
    """

    def __init__(
        self, network: PlainNetwork, heads: Heads, data: Data, settings: TrainingSettings, seed: int,
        device: torch.device, weight: float, frozen: bool = False, team: Team = ALONE,
    ) -> None:  # fmt: skip
        super().__init__(network.space, network.channels, data, settings, seed, device, team, network.state_dict())
        self.heads, self._weight, self._frozen = heads, weight, frozen
        team.share(heads.parameters())
        self._heads_sgd = Momentum(list(heads.parameters()), [])
        self.network.requires_grad_(not frozen)

    def state(self) -> dict[str, Tensor]:
        """As without heads, and theirs."""
        heads = {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        momentum = {f"momentum.heads.{i}": tensor for i, tensor in enumerate(self._heads_sgd.moments)}
        return super().state() | heads | momentum

    def _update(self, images: Tensor, labels: Tensor, rate: float, step: int) -> None:
        self.network.train(not self._frozen)
        with self._autocast(), self._team.synchronised():
            logits, *others = outputs(self.network, self.heads, images, {}, "activation")
        loss = self._loss(logits, labels) + len(labels) / self._batch * self._weight * self._others(others, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip([*self._sgd.parameters, *self._heads_sgd.parameters])
        rule = Rule(rate, self.settings.momentum, self.settings.weight_decay)
        self._heads_sgd.step(rule)
        if not self._frozen:
            self._sgd.step(rule)

    def _others(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        losses = [functional.cross_entropy(one.float(), labels, label_smoothing=smoothing) for one in logits]
        return torch.stack(losses).sum()
