"""A lookup table as CSV, one line per measured layer, for spreadsheets."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from latency_profiler.layers import Layer

FIGURES = ("seconds", "p90", "iqr", "count", "steady")
CONDITIONS = ("loops", "warmup", "empty_run", "load", "frequency_mhz", "governor", "at", "agent", "runtime", "source")
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
        series = (conditions.get("outliers") or (), entry.get("values") or ())
        writer.writerow([_cell(cell) for cell in cells] + [" ".join(map(str, values)) for values in series])
    return out.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
