"""Options that several commands share, and what their texts mean."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from latency_profiler.cost import Statistic
from latency_profiler.errors import InvalidInput
from service import choices

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

Server = Annotated[str | None, typer.Option(envvar="SECATEURS_SERVER", help="Address of the service.")]
Key = Annotated[str | None, typer.Option(envvar="SECATEURS_KEY", help="Your API key.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
SpaceName = Annotated[str, typer.Argument(metavar="SPACE", help="Search space, e.g. mobilenet_v1.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
DeviceName = Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")]
Devices = Annotated[list[str] | None, typer.Option("--device", help="Device that the next --max-ms is about.")]
MaxMs = Annotated[list[float] | None, typer.Option(help="Most milliseconds on that device.")]
Quantile = Annotated[
    Statistic | None, typer.Option(help="Of the runs of a network: p50 (the median), or p90 (nine of ten).")
]  # fmt: skip
LastLayer = Annotated[
    choices.LastLayer | None, typer.Option(help="Whether the width before the classifier can be chosen.")
]  # fmt: skip
Limit = Annotated[int, typer.Option(min=1, max=200, help="How many to show.")]
Count = Annotated[str | None, typer.Option(metavar="COUNT", help="A number, e.g. 1500000, 300K or 1.5M.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]
AnyWidth = Annotated[float | None, typer.Option(help="Width multiplier.")]
Width = Annotated[float, typer.Option(help="Width multiplier.")]


def parse_count(text: str | None) -> int | None:
    """A number of multiply-adds or parameters: 1500000, 1.5M, 300K, 4G.

    Raises:
        InvalidInput: it is none.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([KMG]?)", text.strip().upper().replace("_", ""))
    if not match:
        raise InvalidInput(f"{text!r} is no number; write it like 1500000, 300K or 1.5M")
    return round(float(match[1]) * UNITS[match[2]])


def parse_integers(text: str) -> list[int]:
    """Integers between commas or spaces.

    Raises:
        InvalidInput: something else is among them.
    """
    try:
        return [int(part) for part in re.split(r"[,\s]+", text.strip("[]() \t,"))]
    except ValueError:
        raise InvalidInput(f"{text!r} is no list of integers; write it like 28,18,10") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or from standard input for `-`.

    Raises:
        InvalidInput: there is none.
    """
    try:
        content = json.loads(sys.stdin.read() if str(file) == "-" else file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read JSON from {file}: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{file} holds no JSON object")
    return content


def latency_bounds(devices: list[str] | None, max_ms: list[float] | None) -> dict[str, float]:
    """Pairs of `--device` and `--max-ms`, in their order.

    Raises:
        InvalidInput: one without the other, or a device twice.
    """
    names, bounds = devices or [], max_ms or []
    if len(names) != len(bounds) or len(set(names)) != len(names):
        raise InvalidInput("every device needs one bound: --device NAME --max-ms 0.8 [--device OTHER --max-ms 1.2]")
    return dict(zip(names, bounds, strict=True))


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value != [] and value != {}}
