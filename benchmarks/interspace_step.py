"""What filter bases cost in training, beside standard pruning; one JSON line per setting.

    python benchmarks/interspace_step.py [--rounds 20] [--batch 128] [--rate 0.95]

`ratio` is the time of an interspace step over that of a standard one, the median over rounds in which all settings take
turns on the same images; `spread` are its quartiles. Times are processor seconds of one thread, which other work on the
machine disturbs least. `overhead` is the number of parameters in bases as a share of the dense network's prunable ones,
and `of_kept` as a share of those that are kept. `flops_overhead` is what the sparse form of inference (equation 8) adds
to the kept multiply-adds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch

from latency_profiler.spaces.registry import get_space
from workers.datasets import Data, prepare
from workers.pruners.allowance import Allowance
from workers.pruners.basis_costs import basis_parameters, layer_costs
from workers.pruners.filter_bases import Bases, Sharing
from workers.pruners.interspace import InterspaceTrainer
from workers.pruners.interspace_settings import InterspaceSettings
from workers.supervisor import RUNNER_ENVIRONMENT
from workers.training import TrainingSettings

CPU = torch.device("cpu")
NAME, SIZE, WIDTHS = "vgg16", 32, (0.25, 0.5)
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.95)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in RUNNER_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RUNNER_ENVIRONMENT})
    torch.set_num_threads(1)
    for width in WIDTHS:
        trainers = {sharing: _trainer(sharing, width, options.batch, options.rate) for sharing in get_args(Sharing)}
        seconds = _seconds(trainers, options)
        for sharing, trainer in trainers.items():
            print(json.dumps(_figure(sharing, trainer, seconds, options)), flush=True)


def _trainer(sharing: Sharing, width: float, batch: int, rate: float) -> InterspaceTrainer:
    """One that has pruned at random, and is about to train."""
    space = get_space(NAME, SIZE, width, 10)
    channels = space.uniform(1.0)
    trainer = InterspaceTrainer(
        space, channels, _data(batch), TrainingSettings(1, batch, 0.1),
        InterspaceSettings("random", Bases(sharing)), Allowance.at_rate(space.nodes(channels), rate), 0, CPU,
    )  # fmt: skip
    trainer.advance(lambda: True)
    trainer.network.train()
    return trainer


def _data(batch: int) -> Data:
    random = np.random.default_rng(0)
    pixels, labels = (
        random.integers(0, 256, (2 * batch, SIZE, SIZE, 3), dtype=np.uint8),
        random.integers(0, 10, 2 * batch),
    )
    return prepare((pixels, labels), (pixels[:10], labels[:10]), 10, flip=True, validation=batch // 4, seed=0)


def _seconds(trainers: dict[Sharing, InterspaceTrainer], options: argparse.Namespace) -> dict[Sharing, list[float]]:
    """Of one step, by setting, round by round."""
    found: dict[Sharing, list[float]] = {sharing: [] for sharing in trainers}
    images, labels = trainers["spatial"].batches.training(options.batch, 0, 0, CPU)
    for i in range(-WARM_UP, options.rounds):
        for sharing, trainer in trainers.items():
            took = _timed(lambda: trainer._update(images, labels, 0.01, 0))  # noqa: B023
            if i >= 0:
                found[sharing].append(took)
    return found


def _timed(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _figure(
    sharing: Sharing, trainer: InterspaceTrainer, seconds: dict[Sharing, list[float]], options: argparse.Namespace
) -> dict[str, Any]:
    ratios = [one / standard for one, standard in zip(seconds[sharing], seconds["spatial"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    bases, costs = basis_parameters(trainer.network), layer_costs(trainer.network, trainer.masks)
    kept = sum(cost.sparse for cost in costs)
    return {
        "name": "interspace_step", "space": trainer.network.space.key, "batch": options.batch, "rate": options.rate,
        "sharing": sharing, "seconds": round(statistics.median(seconds[sharing]), 4), "ratio": round(median, 3),
        "spread": [round(low, 3), round(high, 3)], "basis_parameters": bases,
        "overhead": bases / trainer.allowance.total, "of_kept": round(bases / trainer.allowance.maximum, 5),
        "flops_overhead": round(sum(cost.responses for cost in costs) / kept - 1, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
