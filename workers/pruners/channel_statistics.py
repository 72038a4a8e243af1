"""What the loss does when channels are removed, to second order: u and S of every slot (CCP, sections 2 and 3).

With gates b that are 1, a[n, i] = dL_n / db_i for image n and channel i gives all: one backward pass per image for all
slots at once, since every image has gates of its own. u is the mean of a. S approximates the Hessian by the gates:

- `fisher`: the mean of a a^T (the empirical Fisher matrix of the cross entropy).
- `gauss_newton`: the mean of J^T H J, with J the outputs' derivatives by the gates and H the loss's Hessian by the
  outputs; exact where outputs are piecewise linear in a slot's gates. A backward pass per class.
- `monte_carlo`: the same in expectation, from one more backward pass with random labels or signs.

With auxiliary heads a slot's loss is the network's plus that of the first head behind the slot. All sums are float64;
S is a Gram matrix, of at most so high a rank as there were rows. Letters: b images, c channels, k classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from workers.datasets import generator
from workers.evaluation import Images
from workers.networks import PlainNetwork
from workers.placement import place
from workers.pruners.auxiliary import Heads, outputs
from workers.pruners.gates import DENSE, Gate
from workers.pruners.quadratic import Quadratic

Curvature = Literal["fisher", "gauss_newton", "monte_carlo"]
Loss = Literal["cross_entropy", "squared_error"]


@dataclass(frozen=True, slots=True)
class Expansion:
    """What is expanded, where, and how."""

    gate: Gate = "activation"
    loss: Loss = "cross_entropy"
    curvature: Curvature = "fisher"


class ChannelStatistics:
    """Gathers u and S, a batch at a time; shaped like a trainer, so that it can stop after any.

    Args:
        images: what the loss is averaged over.
        slots: indices of the slots whose channels are gated.
        weight: of the heads' losses.
    """

    def __init__(
        self, network: PlainNetwork, images: Images, batch_size: int, slots: Sequence[int], expansion: Expansion,
        seed: int, device: torch.device, heads: Heads | None = None, weight: float = 1.0,
    ) -> None:  # fmt: skip
        self._network, self._images, self._batch_size, self._heads = network.to(device), images, batch_size, heads
        self._expansion, self._seed, self._device, self._weight = expansion, seed, device, weight
        self._widths = {i: network.channels[i] for i in slots}
        self._u = {i: torch.zeros(c, dtype=torch.float64, device=device) for i, c in self._widths.items()}
        self._s = {i: torch.zeros(c, c, dtype=torch.float64, device=device) for i, c in self._widths.items()}
        self.total = -(-len(images) // batch_size) if slots else 0
        self.done = 0

    def advance(self, pause: Callable[[], bool]) -> None:
        """Look at batches until the end, or until `pause`, asked after every batch, says so."""
        self._network.eval()  # batch norms in training mode would mix the images
        for images, labels in islice(self._images.plain(self._batch_size, self._device), self.done, self.total):
            self._add(images, labels)
            self.done += 1
            if pause():
                break

    def latest(self) -> dict[str, float]:
        """Nothing is known before the end."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {f"u.{i}": u for i, u in self._u.items()} | {f"s.{i}": s for i, s in self._s.items()}

    def counters(self) -> dict[str, Any]:
        """How many batches are behind."""
        return {"done": self.done}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Go on where another one with the same arguments was."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.done = counters["done"]

    def quadratics(self) -> dict[int, Quadratic]:
        """The means over all images, by slot index."""
        count = max(1, len(self._images))
        return {i: Quadratic((u / count).cpu().numpy(), (self._s[i] / count).cpu().numpy()) for i, u in self._u.items()}

    def _add(self, images: Tensor, labels: Tensor) -> None:
        gates = {i: torch.ones(len(images), c).to(images).requires_grad_() for i, c in self._widths.items()}
        parts = self._parts(images, gates)
        slopes = [slope(self._expansion.loss, logits.detach(), labels) for logits, _, _ in parts]
        rows: dict[int, Tensor] = {}
        for (logits, slots, weight), direction in zip(parts, slopes, strict=True):
            for i, row in _pulled(logits, weight * direction, slots, gates):
                rows[i] = rows[i] + row if i in rows else row
        for i, row in rows.items():
            self._u[i] += row.sum(0)
        if self._expansion.curvature == "fisher":
            self._square(rows.items())
            return
        random = generator(self._seed, "curvature", self.done)
        for logits, slots, weight in parts:
            for root in roots(self._expansion, logits.detach(), random):
                self._square(_pulled(logits, weight**0.5 * root, slots, gates))

    def _parts(self, images: Tensor, gates: dict[int, Tensor]) -> list[tuple[Tensor, list[int], float]]:
        """Outputs (b, k) whose losses are expanded, the slots that they are expanded for, and their weights."""
        heads = self._heads
        logits, *others = outputs(self._network, heads, images, gates, self._expansion.gate)
        parts = [(logits, list(gates), 1.0)]
        for k, one in enumerate(others):
            assert heads is not None
            parts.append((one, [i for i in gates if heads.behind(i) == k], self._weight))
        return [part for part in parts if part[1]]

    def _square(self, rows: Iterable[tuple[int, Tensor]]) -> None:
        for i, row in rows:
            self._s[i].addmm_(row.T, row)


@torch.no_grad()
def magnitudes(network: PlainNetwork, slot: int) -> Quadratic:
    """A problem whose solution keeps the channels with the largest L1 norms of filters (Li et al., ICLR 2017).

    Of a slot that several dense layers end in, the sum over them.
    """
    ends = [i for i, unit in enumerate(network.space.units) if unit.target.index == slot and unit.op in DENSE]
    weights = dict(network.named_parameters())
    rows = [weights.get(f"convs.{i}.weight", weights.get(f"linears.{i}.weight")) for i in ends]
    each = [row.abs().flatten(1).double().sum(1) for row in rows if row is not None]
    norms = torch.stack(each).sum(0).cpu().numpy()
    return Quadratic(-norms, np.zeros((len(norms), len(norms))))


def slope(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Derivatives (b, k) of every image's loss by its outputs; the squared error is half of it, to one-hot targets."""
    made = logits.softmax(1) if loss == "cross_entropy" else logits
    return made - functional.one_hot(labels, logits.shape[1]).to(logits)


def roots(expansion: Expansion, logits: Tensor, random: torch.Generator) -> Iterator[Tensor]:
    """Vectors (b, k) whose outer products sum, at least in expectation, to every image's Hessian by its outputs.

    That is diag(q) - q q^T for the cross entropy, with the rows of diag(q)^1/2 (1 - 1 q^T) as roots; the identity for
    the squared error.
    """
    if expansion.loss == "squared_error":
        yield from _identity(logits) if expansion.curvature == "gauss_newton" else [_signs(logits, random)]
        return
    q = logits.softmax(1)
    if expansion.curvature == "gauss_newton":
        for k, one in enumerate(_identity(logits)):
            yield q[:, k : k + 1].sqrt() * (one - q)
    else:
        drawn = torch.multinomial(q.cpu(), 1, generator=random)[:, 0]
        yield slope("cross_entropy", logits, place(drawn, logits.device))


def _identity(logits: Tensor) -> Iterator[Tensor]:
    for k in range(logits.shape[1]):
        one = torch.zeros_like(logits)
        one[:, k] = 1.0
        yield one


def _signs(logits: Tensor, random: torch.Generator) -> Tensor:
    signs = 2 * torch.randint(0, 2, logits.shape, generator=random) - 1
    return place(signs, logits.device).to(logits)


def _pulled(
    logits: Tensor, direction: Tensor, slots: list[int], gates: dict[int, Tensor]
) -> list[tuple[int, Tensor]]:  # fmt: skip
    """Derivatives (b, c) of logits . direction by the gates of some slots, as float64."""
    rows = torch.autograd.grad(logits, [gates[i] for i in slots], direction, retain_graph=True)
    return [(i, row.double()) for i, row in zip(slots, rows, strict=True)]
