"""The lookup table of one device: layer → seconds, and the price of whole networks.

A network is priced as an overhead and the sum of its layers, each times a slope and with what it costs in a network
beyond that (`terms`). Overhead, slope and the terms' weights are fitted per space from whole networks that the device
measured (`Fit`); without a fit a network is the sum of its layers. A layer that was not measured is interpolated
(`interpolation`), and marked. All times are seconds.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from latency_profiler.cost import Ints
from latency_profiler.errors import InvalidInput, MissingLatencies
from latency_profiler.interpolation import Cell, Family
from latency_profiler.layers import Layer
from latency_profiler.spaces.space import CHOICES, Space, Unit, other_last
from latency_profiler.terms import in_network, is_term

Floats = npt.NDArray[np.float64]
Matrix = tuple[Ints, Ints, Floats]


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured layer: median and interquartile range in seconds, number of values, and whether they were steady."""

    layer: Layer
    seconds: float
    iqr: float = 0.0
    count: int = 1
    steady: bool = True


@dataclass(frozen=True, slots=True)
class Fit:
    """How the sum of layers becomes a network's latency in one space, and how well it does on held-out networks.

    Errors are shares of the measured time over `held_out` networks that the fit has not seen: their mean and maximum
    without sign, the share of networks `within_5` and `within_10` %, and the mean with its sign (`bias`, positive where
    networks are faster than predicted). `spearman` is the rank correlation of predicted and measured times.
    `noise_floor` is the mean difference between two measurements of one network, as they ran. None is
    unknown. `terms` are weights by name (`terms_of`); those that do not help are left out.
    """

    overhead: float
    slope: float
    fitted_on: int
    held_out: int
    mean_error: float
    max_error: float
    within_5: float | None = None
    within_10: float | None = None
    spearman: float | None = None
    bias: float | None = None
    noise_floor: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)

    def in_network(self, layer: Layer, seconds: float) -> float:
        """Seconds that a layer adds to a network, of the seconds that it takes by itself."""
        return in_network(layer, seconds, self.slope, self.terms)


PLAIN = Fit(0.0, 1.0, 0, 0, 0.0, 0.0)
"""The sum of layers, where no networks were measured."""


@dataclass(frozen=True, slots=True)
class LayerPrice:
    """Seconds of one layer, alone or in a network; `interpolated` says that it was not measured itself."""

    layer: Layer
    seconds: float
    interpolated: bool


@dataclass(frozen=True, slots=True)
class Price:
    """Predicted seconds of a network: its overhead and its layers', in network order."""

    seconds: float
    overhead: float
    layers: tuple[LayerPrice, ...]

    @property
    def interpolated(self) -> int:
        """How many layers were interpolated."""
        return sum(price.interpolated for price in self.layers)


@dataclass
class LatencyTable:
    """Measured layers of one device under one fingerprint."""

    device: str
    fingerprint: str
    entries: dict[str, Entry] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._families: dict[str, Family] = defaultdict(Family)
        for entry in self.entries.values():
            self._families[entry.layer.family].add((entry.layer.c_in, entry.layer.c_out), entry.seconds)

    def add(self, entry: Entry) -> None:
        """Take one measured layer; a second measurement of a layer replaces the first."""
        self.entries[entry.layer.key] = entry
        self._families[entry.layer.family].add((entry.layer.c_in, entry.layer.c_out), entry.seconds)

    def layer(self, layer: Layer) -> LayerPrice:
        """Price one layer alone.

        Raises:
            MissingLatencies: it is neither measured nor inside a measured cell.
        """
        family = self._families.get(layer.family)
        if family is not None:
            measured = family.points.get((layer.c_in, layer.c_out))
            if measured is not None:
                return LayerPrice(layer, measured, False)
            interpolated = family.interpolate(layer.c_in, layer.c_out)
            if interpolated is not None:
                return LayerPrice(layer, interpolated, True)
        raise MissingLatencies([layer.key])

    def error(self, layer: Layer) -> float | None:
        """About the share by which a layer's price is off because it is interpolated.

        0 where it was measured, None where too few of its family were to tell.
        """
        family = self._families.get(layer.family)
        if family is None:
            return None
        return 0.0 if (layer.c_in, layer.c_out) in family.points else family.error

    def alignments(self, family: str) -> Cell:
        """Numbers of which inputs and outputs are multiples in a family's fast layers; 1 where no number is seen."""
        return self._families[family].alignments if family in self._families else (1, 1)

    def missing(self, layers: Iterable[Layer]) -> list[str]:
        """Keys of the layers that cannot be priced, without repeats."""
        keys = []
        for layer in dict.fromkeys(layers):
            try:
                self.layer(layer)
            except MissingLatencies:
                keys.append(layer.key)
        return keys

    def fit(self, space: Space) -> Fit | None:
        """The space's fit, else that of the space whose last layer alone is another: it holds for the same networks."""
        return self.fits.get(space.key) or self.fits.get(other_last(space.key))

    def price(self, space: Space, channels: Sequence[int]) -> Price:
        """Price a structure.

        Raises:
            MissingLatencies: with every layer that is missing.
        """
        layers = space.layers(channels)
        try:
            alone = [self.layer(layer) for layer in layers]
        except MissingLatencies as error:
            raise MissingLatencies(self.missing(layers)) from error
        fit = self.fit(space) or PLAIN
        prices = tuple(replace(price, seconds=fit.in_network(price.layer, price.seconds)) for price in alone)
        total = fit.overhead
        for price in prices:
            total += price.seconds
        return Price(total, fit.overhead, prices)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `from_json` is the inverse."""
        return {
            "device": self.device,
            "fingerprint": self.fingerprint,
            "entries": [asdict(entry) for _, entry in sorted(self.entries.items())],
            "fits": {key: asdict(fit) for key, fit in sorted(self.fits.items())},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LatencyTable":
        """Inverse of `to_json`; what else entries hold (raw values, conditions) is left out.

        Raises:
            InvalidInput: not a table.
        """
        try:
            known = Entry.__dataclass_fields__
            rows = [{name: value for name, value in row.items() if name in known} for row in data["entries"]]
            entries = [Entry(**{**row, "layer": Layer.from_json(row["layer"])}) for row in rows]
            fits = {key: Fit(**fit) for key, fit in data.get("fits", {}).items()}
            if unknown := {name for fit in fits.values() for name in fit.terms if not is_term(name)}:
                raise InvalidInput(f"unknown terms of a fit: {', '.join(sorted(unknown))}")
            if bad := [entry.layer.key for entry in entries if not 0 < entry.seconds < 1000]:
                raise InvalidInput(f"seconds must be above 0 and below 1000: {bad[0]}")
            return cls(str(data["device"]), str(data["fingerprint"]), {e.layer.key: e for e in entries}, fits)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"not a lookup table: {error}") from error


class LatencyModel:
    """Latencies of many structures of one space at once, equal to `LatencyTable.price` to the last bit.

    Every layer depends on two slots at most, so each unit becomes a matrix over the widths of those slots. Letters: n
    structures, s slots.

    Raises:
        MissingLatencies: the table lacks a layer that some structure has.
    """

    def __init__(self, table: LatencyTable, space: Space) -> None:
        fit = table.fit(space) or PLAIN
        self._space, self._overhead, self._slots = space, fit.overhead, space.slots
        matrices = dict[Any, Matrix]()
        for unit in space.units:
            if unit.kind not in matrices:
                matrices[unit.kind] = _matrix(table, unit, fit)
        self._units = [(unit.source, unit.target, matrices[unit.kind]) for unit in space.units]

    @property
    def digest(self) -> str:
        """Identity of the prices: models with equal ones price every structure of the grid alike."""
        digest = hashlib.sha256(np.array([self._overhead]).tobytes())
        for _, _, (_, _, seconds) in self._units:
            digest.update(seconds.tobytes())
        return digest.hexdigest()[:32]

    def knows(self, channels: Ints) -> npt.NDArray[np.bool_]:
        """Which (n,) of channels (n, s) have only widths that are choices of the space."""
        known = [np.isin(channels[:, slot.index], slot.widths()) for slot in self._slots]
        return np.all(known, axis=0)  # type: ignore[no-any-return]

    @cached_property
    def fastest(self) -> tuple[int, ...]:
        """Encoding of the fastest structure that changing gene after gene finds, from the fastest uniform one on.

        It need not be the smallest, nor any uniform one.
        """
        tried, least = np.array(self._space.ladder), math.inf
        found = tried[0]
        while (seconds := self._of(tried)).min() < least:  # then every change of one gene
            found, least = tried[seconds.argmin()], float(seconds.min())
            gene, choice = np.divmod(np.arange(CHOICES * len(found)), CHOICES)
            tried = found[None].repeat(len(gene), axis=0)
            tried[np.arange(len(gene)), gene] = choice
        return tuple(found.tolist())

    def _of(self, encodings: Ints) -> Floats:
        return self.seconds(np.array([self._space.channels(encoding) for encoding in encodings.tolist()]))

    def seconds(self, channels: Ints) -> Floats:
        """Latencies (n,) of channels (n, s), whose widths must be choices of the space."""
        total = np.full(len(channels), self._overhead)
        for source, target, (rows, columns, seconds) in self._units:
            i = rows[channels[:, source.index]] if source.index is not None else 0
            j = columns[channels[:, target.index]] if target.index is not None else 0
            total += seconds[i, j]
        return total


def _matrix(table: LatencyTable, unit: Unit, fit: Fit) -> Matrix:
    """Row of each source width, column of each target width, and the seconds in a network at (row, column)."""
    sources, targets = unit.source.widths(), unit.target.widths()
    family = table._families.get(unit.at(1, 1).family)
    seconds = np.full((len(sources), len(targets)), np.nan)
    for (i, c_in), (j, c_out) in product(enumerate(sources), enumerate(targets)):
        if not unit.tied or i == j:
            layer = unit.at(c_in, c_out)
            price = family.price(layer.c_in, c_out) if family else None
            if price is None:
                raise MissingLatencies([layer.key])
            seconds[i, j] = fit.in_network(layer, price)
    return _positions(sources), _positions(targets), seconds


def _positions(widths: list[int]) -> Ints:
    positions = np.full(max(widths) + 1, -1, dtype=np.int64)
    positions[widths] = np.arange(len(widths))
    return positions
