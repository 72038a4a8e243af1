"""Search spaces: slots that hold widths, genes that choose them, and the network between them.

A *slot* is a width that one or several layers share (all outputs of a residual stage are one slot). A space is
described once, by a `Blueprint`: its slots and its layers in terms of slots. Layers, FLOPs, parameters, the torch
network, the PruningNet and the lookup table's plan are all derived from that description.

*Channels* are one number per slot: first the slots that genes choose, in the encoding's order, then the fixed ones.
*Choice* i of a slot with base width b is the integer `b * (10 + 3 i) // 100`, at least 1, i = 0..30 (MetaPruning, the
authors' model files; the integer form equals their float truncation on every published width).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from latency_profiler.errors import InvalidChannels, InvalidEncoding
from latency_profiler.layers import Activation, Layer, Node, Op

CHOICES = 31
IMAGE = -1
WEIGHTED = (Op.CONV, Op.DEPTHWISE, Op.LINEAR)
"""Operators that have weights."""
LARGEST_WIDTH = 65_536


def scale(choice: int) -> float:
    """Share of the base width that a choice stands for, 0.10 to 1.00."""
    return (10 + 3 * choice) / 100


def width_of(base: int, choice: int) -> int:
    """Channels of a choice: integer truncation, at least one channel."""
    return max(1, base * (10 + 3 * choice) // 100)


@dataclass(frozen=True, slots=True)
class Slot:
    """A width shared by all layers that name it.

    `index` is its place in channels; None marks a constant that is no choice of the space (image channels, classes).
    """

    name: str
    base: int
    index: int | None

    def width(self, channels: Sequence[int]) -> int:
        """The slot's channel number in a structure."""
        return self.base if self.index is None else channels[self.index]

    def at(self, choice: int) -> int:
        """Its width at a choice; a constant has one only."""
        return self.base if self.index is None else width_of(self.base, choice)

    def widths(self) -> list[int]:
        """All that it can have, from the smallest to the largest."""
        return sorted({self.at(choice) for choice in range(CHOICES)})


@dataclass(frozen=True, slots=True)
class Unit:
    """One layer of a space, with slots where a structure has numbers.

    `features` multiplies the input width (a linear layer that reads a flattened map of that many pixels).
    `encoding` are the slots whose scales a PruningNet block is fed; `norm_slot` is the slot whose choice selects the
    batch norm among the 31 of this place.
    """

    name: str
    op: Op
    source: Slot
    target: Slot
    size: int
    input: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    activation: Activation = Activation.NONE
    norm: bool = False
    shortcut: int | None = None
    features: int = 1
    encoding: tuple[Slot, ...] = ()
    norm_slot: Slot | None = None

    def layer(self, channels: Sequence[int]) -> Layer:
        """The layer of one structure."""
        return self.at(self.source.width(channels), self.target.width(channels))

    def at(self, source: int, target: int) -> Layer:
        """The layer between slots of these widths, which are equal where it is tied."""
        return Layer(
            op=self.op,
            c_in=source * self.features,
            c_out=target,
            size=self.size,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            activation=self.activation,
            norm=self.norm,
            residual=self.shortcut is not None,
        )

    @property
    def tied(self) -> bool:
        """Whether input and output are one width: depthwise convolutions and poolings."""
        return self.source is self.target

    @property
    def kind(self) -> tuple[str, bool, tuple[int, bool], tuple[int, bool]]:
        """Places of one kind can have the same layers."""
        ends = [(slot.base, slot.index is None) for slot in (self.source, self.target)]
        return f"{self.features}*{self.at(1, 1).family}", self.tied, ends[0], ends[1]


@dataclass(frozen=True)
class Space:
    """A backbone with the choices allowed per gene, at an image size, width multiplier and class count.

    `counts_relu` and `counts_global_pool` say which modules the authors' FLOPs counter sees in this family. A space
    with one image channel sees colour images in grey.
    """

    name: str
    image_size: int
    width: float
    classes: int
    free_last: bool
    genes: tuple[Slot, ...]
    fixed: tuple[Slot, ...]
    units: tuple[Unit, ...]
    counts_relu: bool
    counts_global_pool: bool
    image_channels: int

    @property
    def key(self) -> str:
        """Identity of the space, e.g. `mobilenet_v1@32x0.5/10+last`."""
        last = LAST if self.free_last else ""
        return f"{self.name}@{self.image_size}x{width_text(self.width)}/{self.classes}{last}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots in the order of channels."""
        return self.genes + self.fixed

    @property
    def normed(self) -> bool:
        """Whether every layer whose width is free ends in batch norm, as a PruningNet needs it."""
        return all(unit.norm for unit in self.units if unit.target in self.slots and unit.op in WEIGHTED)

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The 31 widths of every gene."""
        return tuple(tuple(width_of(slot.base, i) for i in range(CHOICES)) for slot in self.genes)

    @cached_property
    def depths(self) -> tuple[float, ...]:
        """How deep in the network every gene's width first appears, from -1 (the first unit) to 1 (the last)."""
        first = {unit.target: i for i, unit in reversed(tuple(enumerate(self.units)))}
        return tuple(2 * first[slot] / (len(self.units) - 1) - 1 for slot in self.genes)

    @property
    def largest(self) -> tuple[int, ...]:
        """Encoding of the unpruned network."""
        return (CHOICES - 1,) * len(self.genes)

    @property
    def smallest(self) -> tuple[int, ...]:
        """Encoding of the smallest network."""
        return (0,) * len(self.genes)

    @property
    def ladder(self) -> tuple[tuple[int, ...], ...]:
        """Encodings with one choice for all genes, from the smallest to the largest.

        Where costs grow with widths, the ends are the cheapest and the dearest structure; latencies need not: a kernel
        for widths that are no multiple of a block may be several times slower than that for a wider layer.
        """
        return tuple((choice,) * len(self.genes) for choice in range(CHOICES))

    def channels(self, encoding: Sequence[int]) -> tuple[int, ...]:
        """Channel numbers of an encoding, fixed slots at their base width.

        Raises:
            InvalidEncoding: wrong number of genes, or a gene outside 0..30.
        """
        if len(encoding) != len(self.genes):
            raise InvalidEncoding(f"{self.name} has {len(self.genes)} genes, the encoding has {len(encoding)}")
        for slot, gene in zip(self.genes, encoding, strict=True):
            if not 0 <= gene < CHOICES:
                raise InvalidEncoding(f"gene {slot.name!r} is {gene}; it must be 0 to {CHOICES - 1}")
        chosen = tuple(widths[gene] for widths, gene in zip(self.choices, encoding, strict=True))
        return chosen + tuple(slot.base for slot in self.fixed)

    def encoding(self, channels: Sequence[int]) -> tuple[int, ...]:
        """The canonical encoding of channels: the smallest choice that gives each width.

        Raises:
            InvalidChannels: a width that is none of its slot's choices.
        """
        channels = self.complete(channels)
        for slot in self.fixed:
            if slot.width(channels) != slot.base:
                raise InvalidChannels(
                    f"{slot.name!r} is fixed at {slot.base} in {self.name}, not {slot.width(channels)}"
                )
        genes = []
        for slot, widths, width in zip(self.genes, self.choices, channels, strict=False):
            if width not in widths:
                raise InvalidChannels(f"{slot.name!r} cannot be {width}; its choices are {sorted(set(widths))}")
            genes.append(widths.index(width))
        return tuple(genes)

    def complete(self, channels: Sequence[int]) -> tuple[int, ...]:
        """Channels with the fixed slots added where only the genes' widths were given, checked.

        Raises:
            InvalidChannels: wrong number of channels, or one outside 1..65536.
        """
        given = tuple(int(width) for width in channels)
        if len(given) == len(self.genes):
            given += tuple(slot.base for slot in self.fixed)
        if len(given) != len(self.slots):
            wanted = f"{len(self.slots)}" + (f" (or {len(self.genes)} without the fixed ones)" if self.fixed else "")
            raise InvalidChannels(f"{self.name} has {wanted} channel numbers, {len(channels)} were given")
        for slot, width in zip(self.slots, given, strict=True):
            if not 1 <= width <= LARGEST_WIDTH:
                raise InvalidChannels(f"{slot.name!r} is {width}; a width must be 1 to {LARGEST_WIDTH}")
        return given

    def uniform(self, share: float) -> tuple[int, ...]:
        """Channels of the uniform network: every slot, the last one too, at one share of its base width."""
        return tuple(max(1, int(slot.base * share + 1e-9)) for slot in self.slots)

    def nodes(self, channels: Sequence[int]) -> tuple[Node, ...]:
        """The network of a structure, in an order in which it can be computed."""
        channels = self.complete(channels)
        return tuple(Node(unit.name, unit.layer(channels), unit.input, unit.shortcut) for unit in self.units)

    def layers(self, channels: Sequence[int]) -> tuple[Layer, ...]:
        """The layers of a structure, in the order of `units`."""
        channels = self.complete(channels)
        return tuple(unit.layer(channels) for unit in self.units)

    def digest(self, channels: Sequence[int]) -> str:
        """Identity of a structure: the same for every encoding that gives these widths."""
        text = f"{self.key}:{','.join(map(str, self.complete(channels)))}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


LAST = "+last"
"""Ends the key of a space whose last layer is free."""


def other_last(key: str) -> str:
    """Key of the space that differs in its last layer alone, fixed or free: a device measures the same networks."""
    return key.removesuffix(LAST) if key.endswith(LAST) else key + LAST


def width_text(width: float) -> str:
    """A width multiplier as keys have it: no two are written alike."""
    short = f"{width:g}"
    return short if float(short) == width else repr(width)


@dataclass
class Blueprint:
    """Where a space is drawn: slots first, then layers from image to classifier.

    Every layer method takes the index of the node that it reads (`IMAGE` for the image) and returns its own.
    """

    image_size: int
    width: float
    classes: int
    free_last: bool
    image_channels: int = 3
    genes: list[Slot] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)

    @property
    def small(self) -> bool:
        """Small images (64 pixels or less) use the CIFAR convention: stride-1 stem, no early pooling."""
        return self.image_size <= 64

    def gene(self, name: str, base: int) -> Slot:
        """A slot that the next gene chooses; the last one drawn is the fixed one, see `finish`."""
        slot = Slot(name, max(1, int(base * self.width + 1e-9)), len(self.genes))
        self.genes.append(slot)
        return slot

    def conv(
        self, source: int, target: Slot, kernel: int, *, stride: int = 1, padding: int | None = None,
        activation: Activation = Activation.NONE, norm: bool = True, shortcut: int | None = None, name: str,
        encoding: tuple[Slot, ...] = (), norm_slot: Slot | None = None,
    ) -> int:  # fmt: skip
        """A dense convolution with batch norm or a bias; `padding` None keeps the size at stride 1."""
        return self._add(
            name, Op.CONV, source, target, kernel=kernel, stride=stride,
            padding=kernel // 2 if padding is None else padding, activation=activation, norm=norm,
            shortcut=shortcut, encoding=encoding, norm_slot=norm_slot or target,
        )  # fmt: skip

    def depthwise(
        self, source: int, *, stride: int, activation: Activation, name: str, encoding: tuple[Slot, ...]
    ) -> int:
        """A 3×3 depthwise convolution with batch norm."""
        slot = self._slot(source)
        return self._add(
            name, Op.DEPTHWISE, source, slot, kernel=3, stride=stride, padding=1,
            activation=activation, norm=True, encoding=encoding, norm_slot=slot,
        )  # fmt: skip

    def max_pool(self, source: int, *, kernel: int, stride: int, padding: int = 0, name: str) -> int:
        """Max pooling."""
        slot = self._slot(source)
        return self._add(name, Op.MAX_POOL, source, slot, kernel=kernel, stride=stride, padding=padding)

    def global_pool(self, source: int, *, name: str = "pool") -> int:
        """Mean over all pixels."""
        size = self.size(source)
        return self._add(name, Op.GLOBAL_POOL, source, self._slot(source), kernel=size, stride=size)

    def linear(self, source: int, target: Slot, *, activation: Activation = Activation.NONE, name: str) -> int:
        """A linear layer with bias on the flattened source."""
        pixels = self.size(source) ** 2
        return self._add(name, Op.LINEAR, source, target, activation=activation, features=pixels)

    def classifier(self, source: int) -> int:
        """The linear layer to the classes."""
        return self.linear(source, Slot("classes", self.classes, None), name="classifier")

    def size(self, node: int) -> int:
        """Side of a node's output in pixels."""
        if node == IMAGE:
            return self.image_size
        return self.units[node].layer([slot.base for slot in self.genes]).out_size

    def finish(self, name: str, *, counts_relu: bool, counts_global_pool: bool) -> Space:
        """The space; the last gene drawn is fixed at its base width (as published) unless `free_last`."""
        free = len(self.genes) if self.free_last else len(self.genes) - 1
        return Space(
            name, self.image_size, self.width, self.classes, self.free_last,
            tuple(self.genes[:free]), tuple(self.genes[free:]), tuple(self.units), counts_relu, counts_global_pool,
            self.image_channels,
        )  # fmt: skip

    def _slot(self, node: int) -> Slot:
        return Slot("image", self.image_channels, None) if node == IMAGE else self.units[node].target

    def _add(self, name: str, op: Op, source: int, target: Slot, **fields: Any) -> int:
        size = 1 if op is Op.LINEAR else self.size(source)
        self.units.append(Unit(name, op, self._slot(source), target, size, source, **fields))
        return len(self.units) - 1


Draw = Callable[[Blueprint], Space]
