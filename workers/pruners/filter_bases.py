"""A network whose filters are written in trainable filter bases (Interspace Pruning, CVPR 2022).

A filter h of m = k * k entries, row by row, is h = F lambda: column n of the basis F (m, m) is basis filter n, and the
coefficients lambda are what is pruned. They stand where the ordinary weight stood, in its shape, so an interspace
network has the prunable entries, names and forward of the plain one, and bases besides. A convolution in no basis has
F = I: its coefficients are its weight. That is standard pruning, by the same code.

Only kernels larger than 1x1 have a basis; of one entry it would be a factor (section 3 of the seed).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from latency_profiler.errors import InvalidInput
from latency_profiler.layers import Node, Op
from latency_profiler.spaces.space import Space
from workers.datasets import generator
from workers.networks import PlainNetwork

Sharing = Literal["spatial", "coarse", "medium", "fine"]
Initialisation = Literal["standard", "orthonormal"]


@dataclass(frozen=True, slots=True)
class Bases:
    """Which convolutions are written in filter bases, and how these begin and move."""

    sharing: Sharing = "fine"
    """`fine` is a basis per layer, `medium` one per block, `coarse` one for all, each per kernel size; `spatial` is
    standard pruning. The paper finds fine best at high pruning rates, coarse at low ones."""
    first: bool = True
    """Whether the first convolution has a basis. No source: chosen here."""
    initialisation: Initialisation = "standard"
    """`standard` is F = I, `orthonormal` a random rotation, under which normal coefficients give filters of the same
    distribution. The paper's choice is not known; chosen here."""
    trained: bool = True
    """Whether bases are trained, as in the paper; otherwise they stay as they began."""
    rate: float = 1.0
    """Learning rate of the bases over that of all else, behind clipping. No source: chosen here."""
    decayed: bool = False
    """Whether bases have weight decay. No source: F D and D^-1 lambda are the same filters, so one side has it."""

    def __post_init__(self) -> None:
        for value, known in ((self.sharing, get_args(Sharing)), (self.initialisation, get_args(Initialisation))):
            if value not in known:
                raise InvalidInput(f"filter bases cannot be {value!r}; there are: {', '.join(known)}")


class InterspaceNetwork(PlainNetwork):
    """A plain network with filters in bases; sub-modules besides: `bases.<group>_<k>x<k>`."""

    def __init__(self, space: Space, channels: Sequence[int], seed: int = 0, bases: Bases | None = None) -> None:
        super().__init__(space, channels, seed)
        self.scheme = bases or Bases()
        self.groups = sharing_groups(space, self.nodes, self.scheme)
        """The basis of each node that has one."""
        self.bases = nn.ParameterDict()
        for i, group in sorted(self.groups.items()):
            if group not in self.bases:
                basis = _basis(self.nodes[i].layer.kernel ** 2, self.scheme, seed, group)
                self.bases[group] = nn.Parameter(basis, requires_grad=self.scheme.trained)

    def weight(self, i: int) -> Tensor:
        """The filters of the convolution at node i, h = F lambda."""
        coefficients = super().weight(i)
        if i not in self.groups:
            return coefficients
        filters: Tensor = coefficients.flatten(2) @ self.bases[self.groups[i]].T
        return filters.view_as(coefficients)

    def prunable(self) -> dict[str, nn.Parameter]:
        """Theta, by node: coefficients, or weights where there is no basis; no bias, batch norm or basis."""
        layers = {int(name): layer for name, layer in (*self.convs.items(), *self.linears.items())}
        found = {}
        for i in sorted(layers):
            weight = layers[i].weight
            assert isinstance(weight, nn.Parameter)
            found[str(i)] = weight
        return found

    def decayed(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained, with and without weight decay: as of the plain network, and the bases."""
        decayed, others = super().decayed()
        bases = list(self.bases.values())
        known = set(map(id, bases))
        others = [parameter for parameter in others if id(parameter) not in known]
        if not self.scheme.trained:
            return decayed, others
        return (decayed + bases, others) if self.scheme.decayed else (decayed, others + bases)

    @torch.no_grad()
    def plain(self) -> PlainNetwork:
        """The same network with dense weights and no bases, in eval mode."""
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("bases.")}
        mine = next(self.parameters())
        made = PlainNetwork(self.space, self.channels).to(mine.device, mine.dtype)
        made.load_state_dict(state | {f"convs.{i}.weight": self.weight(i) for i in self.groups})
        return made.eval()

    @torch.no_grad()
    def adopt(self, state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> None:
        """Take over a plain network's state, with lambda = F^-1 h in the bases that are there.

        Args:
            masks: coefficients that are known to be zero are set so, without the rounding of F^-1.
        """
        bases = {f"bases.{group}": basis for group, basis in self.bases.items()}
        self.load_state_dict({**state, **bases})
        for i, group in self.groups.items():
            filters = super().weight(i)
            inverse = torch.linalg.inv(self.bases[group].double())
            filters.copy_((filters.flatten(2).double() @ inverse.T).view_as(filters))
        for name, parameter in self.prunable().items():
            if masks is not None:
                parameter.masked_fill_(~masks[name], 0.0)

    def twin(self, dtype: torch.dtype | None = None) -> "InterspaceNetwork":
        """A copy to try things on, twice differentiable: torch's own batch norms stand for ours, which are not."""
        mine = next(self.parameters())
        made = InterspaceNetwork(self.space, self.channels, 0, self.scheme)
        for name, norm in self.norms.items():
            assert isinstance(norm, nn.BatchNorm2d)
            made.norms[name] = nn.BatchNorm2d(norm.num_features, eps=norm.eps)
        made.to(mine.device, dtype or mine.dtype).load_state_dict(self.state_dict())
        return made


def sharing_groups(space: Space, nodes: Sequence[Node], scheme: Bases) -> dict[int, str]:
    """Name of the basis of each convolution that has one; equal names are one basis, of one kernel size."""
    convolutions = [i for i, node in enumerate(nodes) if node.layer.op in (Op.CONV, Op.DEPTHWISE)]
    without = set() if scheme.first else set(convolutions[:1])
    found: dict[int, str] = {}
    for i in convolutions:
        kernel = nodes[i].layer.kernel
        if kernel > 1 and i not in without and scheme.sharing != "spatial":
            group = {"coarse": "all", "medium": block(space, nodes[i]), "fine": str(i)}[scheme.sharing]
            found[i] = f"{group}_{kernel}x{kernel}"
    return found


def block(space: Space, node: Node) -> str:
    """The block of a network whose layers share a basis under `medium`.

    In ResNets the stem and each stage, in VGG-16 the convolutions between poolings: the paper's blocks, and here the
    first part of a layer's name. MobileNets are not in the paper; their blocks hold the layers of one map size, as
    VGG-16's do.
    """
    if space.name.startswith("mobilenet"):
        return f"maps{node.layer.out_size}"
    return node.name.partition(".")[0]


def _basis(m: int, scheme: Bases, seed: int, group: str) -> Tensor:
    """A basis (m, m) at the beginning."""
    if scheme.initialisation == "standard":
        return torch.eye(m)
    q, r = torch.linalg.qr(torch.randn(m, m, generator=generator(seed, "basis", group), dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()  # with these signs, uniform among rotations and reflections
    return rotation.float()
