"""What a search gains over the uniform width and over random search, at equal multiply-adds or milliseconds.

    secateurs datasets add cifar10 cifar10_images.tar.xz
    python benchmarks/gain.py mobilenet_v1_eighth --seeds 0 1 2
    python benchmarks/gain.py mobilenet_v2_eighth --set '{"retraining": {"finalists": 1}}' --suffix _first
    python benchmarks/gain.py --table

Each seed is two jobs of a running service with one PruningNet: evolution with the uniform width as its baseline, and
random search with as many candidates. All winners are trained from scratch with the same settings and scored once on
the test set. A cell's file is written after every seed; run again, the script goes on where it was (see jobs.py), and
measures no seed again that the file has.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from statistics import mean
from typing import Any

from jobs import RESULTS, kept, run, service, write

from latency_profiler.client import Client
from latency_profiler.cost import flops
from latency_profiler.spaces.registry import get_space

Json = dict[str, Any]
CLASSES = 10


@dataclass(frozen=True)
class Cell:
    """One line of the table: the budget is this share of what the whole network costs."""

    space: str
    width: float
    share: float
    device: str | None = None
    """Budget in milliseconds on this device instead of multiply-adds."""
    image_size: int = 32


CELLS = {
    "mobilenet_v1_eighth": Cell("mobilenet_v1", 0.5, 1 / 8),
    "mobilenet_v1_quarter": Cell("mobilenet_v1", 0.5, 1 / 4),
    "mobilenet_v1_ms": Cell("mobilenet_v1", 0.5, 1 / 2, "this-machine"),
    "mobilenet_v2_eighth": Cell("mobilenet_v2", 0.5, 1 / 8),
    "mobilenet_v2_quarter": Cell("mobilenet_v2", 0.5, 1 / 4),
    "mobilenet_v1_half": Cell("mobilenet_v1", 0.5, 1 / 2),
    "resnet20_half": Cell("resnet20", 1.0, 1 / 2),
    "resnet20_quarter": Cell("resnet20", 1.0, 1 / 4),
}


def main() -> None:
    """Run a cell's seeds, or print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", nargs="?", choices=CELLS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--set", default="{}", metavar="JSON", help='fields of the request, e.g. {"retraining": {}}')
    parser.add_argument("--suffix", default="", help="of the result's file, for other settings than a cell's own")
    parser.add_argument("--without-random", action="store_true", help="leave random search out, which takes a third")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table or not options.cell:
        return _print_table()
    common = {"dataset": options.dataset, "effort": options.effort, **json.loads(options.set)}
    with service() as client:
        request = common | _request(client, CELLS[options.cell])
        for seed in options.seeds:
            asked = request | {"seed": seed}
            if _is_there(options.cell + options.suffix, asked, not options.without_random):
                print(f"seed {seed} is there already", file=sys.stderr)
                continue
            jobs = run(client, _requests(asked, not options.without_random))
            found = dict(zip(("evolution", "random"), jobs, strict=False))
            _store(options.cell + options.suffix, asked, {name: kept(job) for name, job in found.items()})
    _print_table()


def _request(client: Client, cell: Cell) -> Json:
    space = get_space(cell.space, cell.image_size, cell.width, CLASSES, True)
    whole = space.channels(space.largest)
    fields: Json = {"space": cell.space, "width": cell.width, "image_size": cell.image_size}
    if cell.device is None:
        return fields | {"constraints": [{"metric": "flops", "max": int(flops(space.layers(whole)) * cell.share)}]}
    asked = {"classes": CLASSES, "last_layer": "free", "channels": list(whole), "devices": [cell.device]}
    price = client.price(cell.space, {"width": cell.width, "image_size": cell.image_size, **asked})
    most_ms = round(price["latency_ms"][cell.device] * cell.share, 4)
    return fields | {"constraints": [{"metric": "latency", "device": cell.device, "max_ms": most_ms}]}


def _requests(request: Json, random: bool) -> list[Json]:
    search = request.get("search", {}) | {"strategy": "random"}
    return [request, *([request | {"search": search, "baselines": False, "fidelity": {}}] if random else [])]


def _stored(name: str) -> Json:
    """Seed → what a cell's file has of it."""
    path = RESULTS / f"gain_{name}.json"
    seeds: Json = json.loads(path.read_text())["seeds"] if path.exists() else {}
    return seeds


def _is_there(name: str, request: Json, random: bool) -> bool:
    """Whether this was measured before; what an older file holds does not say what was asked."""
    found = _stored(name).get(str(request["seed"]))
    return found is not None and found.get("request", request) == request and (not random or "random" in found)


def _store(name: str, request: Json, jobs: Json) -> None:
    seeds = _stored(name) | {str(request["seed"]): {"request": request, **jobs}}
    write(f"gain_{name}", {"cell": name, "seeds": seeds})


def _print_table() -> None:
    """Means over the seeds; the gain over random search over those that have it."""
    print("| cell | seeds | winner | uniform | over uniform | over random search |")
    print("|---" * 6 + "|")
    for cell in CELLS:
        seeds = _stored(cell)
        won = [one for one in seeds.values() if one["evolution"]["result"]]
        if won:
            winner, uniform = (mean(_percent(one, "evolution", of) for one in won) for of in ("winner", "uniform"))
            over = [
                _percent(one, "evolution", "winner") - _percent(one, "random", "winner")
                for one in won
                if one.get("random", {}).get("result")
            ]
            random = f"{mean(over):+.2f} ({len(over)})" if over else ""
            print(f"| {cell} | {len(won)} | {winner:.2f} | {uniform:.2f} | {winner - uniform:+.2f} | {random} |")


def _percent(seed: Json, job: str, network: str) -> float:
    """Test accuracy."""
    accuracy: float = seed[job]["result"][network]["test_accuracy"]
    return 100 * accuracy


if __name__ == "__main__":
    main()
