"""What is to be seen in a lookup table: the slowest layers, what a multiply-add costs, and what is covered."""

from collections import defaultdict
from dataclasses import dataclass

from latency_profiler.cost import layer_flops
from latency_profiler.layers import Op
from latency_profiler.lookup_table import Entry, LatencyTable

SLOWEST = 10


@dataclass(frozen=True, slots=True)
class Slow:
    """A layer and its milliseconds."""

    key: str
    ms: float


@dataclass(frozen=True, slots=True)
class Operator:
    """Milliseconds per multiply-add of one image over all measured layers of an operator; None where it has none."""

    op: Op
    layers: int
    ms_per_multiply_add: float | None


@dataclass(frozen=True, slots=True)
class Covered:
    """Layers that differ in their widths only: how many are measured, and the least and greatest widths."""

    family: str
    layers: int
    c_in: tuple[int, int]
    c_out: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Survey:
    """All of it; families and operators by name, the slowest layer first."""

    slowest: tuple[Slow, ...]
    operators: tuple[Operator, ...]
    coverage: tuple[Covered, ...]


def survey(table: LatencyTable, batch: int = 1) -> Survey:
    """What a table shows; its seconds are those of so many images together."""
    entries = sorted(table.entries.values(), key=lambda entry: (-entry.seconds, entry.layer.key))
    operators, families = defaultdict[Op, list[Entry]](list), defaultdict[str, list[Entry]](list)
    for entry in entries:
        operators[entry.layer.op].append(entry)
        families[entry.layer.family].append(entry)
    return Survey(
        tuple(Slow(entry.layer.key, 1000 * entry.seconds) for entry in entries[:SLOWEST]),
        tuple(_operator(op, found, batch) for op, found in sorted(operators.items())),
        tuple(_covered(family, found) for family, found in sorted(families.items())),
    )


def _operator(op: Op, entries: list[Entry], batch: int) -> Operator:
    counts = batch * sum(layer_flops(entry.layer) for entry in entries)
    seconds = sum(entry.seconds for entry in entries)
    return Operator(op, len(entries), 1000 * seconds / counts if counts else None)


def _covered(family: str, entries: list[Entry]) -> Covered:
    inputs, outputs = zip(*((entry.layer.c_in, entry.layer.c_out) for entry in entries), strict=True)
    return Covered(family, len(entries), (min(inputs), max(inputs)), (min(outputs), max(outputs)))
