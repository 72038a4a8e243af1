"""What filter bases cost, layer by layer (Interspace Pruning, section on computational costs; formulas derived).

An interspace layer can be computed as its basis filters' responses to every input channel, combined by the sparse
coefficients, or as an ordinary dense convolution after its filters are built. Letters: k kernel side, m = k * k.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from latency_profiler.cost import layer_flops
from workers.pruners.allowance import positions
from workers.pruners.filter_bases import InterspaceNetwork


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One prunable layer; costs are multiply-adds for one image."""

    name: str
    kernel: int
    basis: str | None
    """The basis that it is written in, which other layers may share."""
    entries: int
    kept: int
    dense: int
    """All entries at each pixel of the output."""
    sparse: int
    """The kept entries at each pixel of the output: standard pruning."""
    responses: int
    """The sparse form in a basis: each basis filter at each pixel of every input channel, and the kept coefficients."""
    materialised: int
    """The dense convolution, and m products for every kept coefficient to build its filters (not per image)."""

    @property
    def overhead(self) -> float:
        """What responses cost beyond the kept entries, as a share of these: k^2 / (c_out (1 - p)) for convolutions."""
        return (self.responses - self.sparse) / self.sparse if self.sparse else 0.0


def layer_costs(network: InterspaceNetwork, masks: Mapping[str, Tensor]) -> list[LayerCost]:
    """Every prunable layer, in the network's order."""
    found = []
    for name, mask in masks.items():
        node, basis = network.nodes[int(name)], network.groups.get(int(name))
        pixels, m, kept = positions(node.layer), node.layer.kernel**2, int(mask.sum())
        dense, sparse = layer_flops(node.layer), kept * pixels
        of_basis = node.layer.c_in * m * m * pixels if basis else 0
        building = m * kept if basis else 0
        found.append(
            LayerCost(
                node.name, node.layer.kernel, basis, mask.numel(), kept, dense, sparse, sparse + of_basis,
                dense + building,
            )
        )  # fmt: skip
    return found


def basis_parameters(network: InterspaceNetwork) -> int:
    """Numbers in all bases: the sum of k^4, which pruning rates leave out."""
    return sum(basis.numel() for basis in network.bases.values())
