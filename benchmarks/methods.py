"""The pruning methods against what they are to beat, through the service: one job per variant and seed.

    secateurs datasets add cifar10 cifar10_images.tar.xz
    python benchmarks/methods.py magnitude --seeds 0 1 2
    python benchmarks/methods.py --table

A cell's file is written after every job; run again, the script goes on where it was (see jobs.py). Jobs that share a
dense network take its training over from one another. `interspace` needs a dataset `cifar10-10k`: `--subset` makes its
file, a fixed fifth of the training images, from the archive.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from jobs import RESULTS, kept, run, service, write

from latency_profiler.cost import flops, layer_flops
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service import images

Json = dict[str, Any]
CLASSES = 10
SUBSET = 10_000
TUNED = {"gate": "centred", "curvature": "gauss_newton"}
"""Collaborative pruning as it did best on one seed of `resnet20`."""


@dataclass(frozen=True)
class Cell:
    """Requests that differ in one thing; `common` is what all have."""

    common: Json
    variants: Mapping[str, Json]


def main() -> None:
    """Run a cell's jobs, make the subset, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", nargs="?", choices=CELLS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="of the cell's, by their beginnings")
    parser.add_argument("--max-ms", type=float, default=0.11, help="side_by_side's budget on this-machine")
    parser.add_argument("--subset", nargs=2, metavar=("ARCHIVE", "NPZ"), help="make the file of cifar10-10k")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.subset:
        return _subset(*map(Path, options.subset))
    if options.cell and not options.table:
        _run(options.cell, options.seeds, options.only, options.max_ms)
    _print_tables()


def _run(name: str, seeds: list[int], only: list[str], max_ms: float) -> None:
    cell, path = CELLS[name], RESULTS / f"methods_{name}.json"
    with service() as client:
        for seed in seeds:
            for variant, changes in cell.variants.items():
                if only and not variant.startswith(tuple(only)):
                    continue
                request = cell.common | changes | {"seed": seed}
                bounds = [{"max_ms": max_ms} | one if "device" in one else one for one in request["constraints"]]
                [job] = run(client, [request | {"constraints": bounds}])
                found = json.loads(path.read_text())["variants"] if path.exists() else {}
                found.setdefault(variant, {})[str(seed)] = kept(job)
                write(f"methods_{name}", {"cell": name, "variants": found})


def _magnitude() -> Cell:
    """LeNet-300-100 on digits: a twelfth of the weights, in rounds, at once, without retraining, with L1 and L2."""
    space = get_space("lenet_300_100", 8, 1.0, CLASSES, True)
    dense = {"epochs": 60, "batch_size": 64, "learning_rate": 0.1, "weight_decay": 1e-4, "augment": False}
    common = {
        "space": "lenet_300_100", "image_size": 8, "dataset": "digits", "effort": "quick", "method": "magnitude",
        "dense": dense | {"label_smoothing": 0.0},
    }  # fmt: skip
    rounds = {"rounds": 5, "retraining_epochs": 40, "retraining_rate": 1.0}
    variants = {
        "in rounds": {"constraints": _weights(space, 1 / 12), "magnitude": rounds},
        "at once": {
            "constraints": _weights(space, 1 / 12),
            "magnitude": rounds | {"rounds": 1, "retraining_epochs": 200},
        },
    }
    for penalty in ("l1", "l2"):
        for epochs in (0, 20):
            for share in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32):
                asked = {"rounds": 1, "retraining_epochs": epochs, "penalty": penalty, "retraining_penalty": penalty}
                name = f"{penalty}, {'retrained' if epochs else 'not retrained'}, {share:.3f}"
                variants[name] = {"constraints": _weights(space, share), "magnitude": asked}
    return Cell(common, variants)


def _collaborative() -> Cell:
    """ResNet-20 of half its widths on CIFAR-10, half of the FLOPs: rankings, and auxiliary classifiers."""
    space = get_space("resnet20", 32, 0.5, CLASSES, True)
    common = {
        "space": "resnet20", "image_size": 32, "width": 0.5, "dataset": "cifar10", "effort": "standard",
        "method": "collaborative", "constraints": [{"metric": "flops", "max": _full(space) // 2}],
    }  # fmt: skip
    settings: dict[str, Json] = {
        "collaborative": {}, "diagonal": {"ranking": "diagonal"}, "l1": {"ranking": "l1"},
        "auxiliary": {"auxiliaries": 2}, "global": {"allocation": "global"}, "sequential": {"order": "sequential"},
        "diagonal, global": {"ranking": "diagonal", "allocation": "global"},
        "more images": {"images": 16_384}, "more images, global": {"images": 16_384, "allocation": "global"},
    }  # fmt: skip
    shared = TUNED | {"fine_tuning": {"epochs": 4, "learning_rate": 0.03}}
    return Cell(common, {name: {"collaborative": shared | one} for name, one in settings.items()})


def _interspace() -> Cell:
    """VGG-16 of an eighth of its widths on a fifth of CIFAR-10: filter bases against the same pruning without them."""
    space = get_space("vgg16", 32, 0.125, CLASSES, True)
    common = {
        "space": "vgg16", "image_size": 32, "width": 0.125, "dataset": "cifar10-10k", "effort": "standard",
        "method": "interspace", "baselines": False, "dense": {"epochs": 12, "learning_rate": 0.1},
    }  # fmt: skip
    return Cell(common, {
        f"{pruning} {rate:g} {sharing}": {
            "constraints": _weights(space, 1 - rate), "interspace": {"pruning": pruning, "sharing": sharing}
        }
        for rate in (0.95, 0.99, 0.85)
        for pruning in ("random", "snip", "synflow", "set")
        for sharing in ("fine", "spatial")
    })  # fmt: skip


def _side_by_side() -> Cell:
    """MetaPruning, collaborative pruning and the uniform width under one budget: multiply-adds, and milliseconds."""
    space = get_space("mobilenet_v1", 32, 0.5, CLASSES, True)
    common = {
        "space": "mobilenet_v1", "image_size": 32, "width": 0.5, "dataset": "cifar10", "effort": "standard",
        "compare_with": ["collaborative"], "measure_on": ["this-machine"],
        "collaborative": TUNED | {"fine_tuning": {"learning_rate": 0.03}},
    }  # fmt: skip
    budget = [{"metric": "flops", "max": _full(space) // 8}]
    latency = [{"metric": "latency", "device": "this-machine"}]
    alone = {"method": "collaborative", "compare_with": [], "baselines": False}
    return Cell(common, {
        "flops": {"constraints": budget}, "latency": {"constraints": latency},
        "collaborative, latency": {"constraints": latency} | alone,
    })  # fmt: skip


def _weights(space: Space, share: float) -> list[Json]:
    layers = space.layers(space.channels(space.largest))
    return [{"metric": "parameters", "max": int(share * sum(layer_flops(one) // one.out_size**2 for one in layers))}]


def _full(space: Space) -> int:
    return flops(space.layers(space.channels(space.largest)))


CELLS = {
    "magnitude": _magnitude(), "collaborative": _collaborative(), "interspace": _interspace(),
    "side_by_side": _side_by_side(),
}  # fmt: skip


def _subset(archive: Path, file: Path) -> None:
    loaded = images.load("archive", archive.name, archive.parent, 32, file.parent / "cache")
    chosen = np.random.default_rng(0).permutation(len(loaded.train_y))[:SUBSET]
    np.savez(
        file, train_images=loaded.train_x[chosen], train_labels=loaded.train_y[chosen], test_images=loaded.test_x,
        test_labels=loaded.test_y,
    )  # fmt: skip


def _print_tables() -> None:
    """Means over the seeds."""
    for cell in CELLS:
        path = RESULTS / f"methods_{cell}.json"
        if not path.exists():
            continue
        print(f"\n{cell}\n\n| variant | method | seeds | test | dense | flops | sparse flops | kept | ms |")
        print("|---" * 9 + "|")
        for variant, seeds in json.loads(path.read_text())["variants"].items():
            for line in _lines(variant, [one["result"] for one in seeds.values() if one["result"]]):
                print(line)


def _lines(variant: str, results: list[Json]) -> Iterator[str]:
    for name in [*results[0]["methods"], "uniform"] if results else []:
        found = [one["methods"].get(name) or one[name] for one in results]
        if not all(found):
            continue
        pruned = [one["pruned"] or {} for one in found]
        dense = [one["dense"]["test_accuracy"] for one in results if one["dense"]]
        cells = [
            f"{100 * mean(one['test_accuracy'] for one in found):.2f}", f"{100 * mean(dense):.2f}" if dense else "",
            f"{mean(one['flops'] for one in found):.0f}", _mean(one.get("sparse_flops") for one in pruned),
            _mean(one.get("kept") for one in pruned),
            ", ".join(f"{device} {ms:.3f}" for device, ms in found[0]["measured_ms"].items()),
        ]  # fmt: skip
        yield f"| {variant} | {name} | {len(found)} | " + " | ".join(cells) + " |"


def _mean(values: Iterator[Any]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.0f}" if known else ""


if __name__ == "__main__":
    main()
