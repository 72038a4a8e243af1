"""A lookup table as CSV, one line per measured layer, for spreadsheets."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from latency_profiler.layers import Layer

FIGURES = ("seconds", "p90", "iqr", "count", "steady")
CONDITIONS = (
    "loops", "warmup", "empty_run", "speed", "load", "frequency_mhz", "governor", "at", "agent", "runtime", "source",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@")
"""A cell that begins so would be computed by the spreadsheet."""


def to_csv(entries: Iterable[Mapping[str, Any]]) -> str:
    """Entries of a document as `GET …/lookup-table` gives it; values stand in one cell, with spaces between them."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*Layer.__dataclass_fields__, *FIGURES, *CONDITIONS, "outliers", "values"])
    for entry in entries:
        conditions = entry.get("conditions") or {}
        cells = [entry["layer"][name] for name in Layer.__dataclass_fields__]
        cells += [entry.get(name) for name in FIGURES] + [conditions.get(name) for name in CONDITIONS]
        writer.writerow([*map(_cell, cells), _series(conditions.get("outliers")), _series(entry.get("values"))])
    return out.getvalue()


def _series(values: Any) -> str:
    """Numbers in one cell; whatever else stands in a condition is no series."""
    numbers = values if isinstance(values, list | tuple) else ()
    return " ".join(str(value) for value in numbers if isinstance(value, int | float))


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
