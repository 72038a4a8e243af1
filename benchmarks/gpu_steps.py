"""What a GPU gains by what is done for it: recorded steps from scratch, and PruningNets without cuDNN's plans.

    python benchmarks/gpu_steps.py [--seconds 6]

Both ways take turns on structures near an eighth of a space's multiply-adds; every shape of a PruningNet's step is new,
as in training. One JSON line a figure, in milliseconds; needs a GPU.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jobs import write

from latency_profiler.cost import flops
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from workers import networks
from workers.datasets import Data, prepare
from workers.evaluation import Scorer
from workers.training import PruningNetTrainer, ScratchTrainer, Trainer, TrainingSettings

GPU = torch.device("cuda", 0)
SPACES = (("mobilenet_v1", 0.5), ("mobilenet_v2", 0.5), ("resnet20", 1.0))
NET = TrainingSettings(epochs=12, batch_size=128, learning_rate=0.1, clip_norm=2.0, normalise=True, augment=False)
SCRATCH = TrainingSettings(epochs=8, batch_size=64, learning_rate=0.1, clip_norm=10.0, augment=False)
WARM_UP, BLOCK = 3, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each contender")
    seconds = parser.parse_args().seconds
    data, found = _data(), list[dict[str, Any]]()
    for name, width in SPACES:
        space = get_space(name, 32, width, 10, True)
        for figure in _figures(space, data, seconds):
            found.append({"space": space.key, **figure})
            print(json.dumps(found[-1]), flush=True)
    write("gpu_steps", {"gpu": torch.cuda.get_device_name(GPU), "host": platform.machine(), "figures": found})


def _data() -> Data:
    """Noise in the size of CIFAR-10."""
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 50_000)
    return prepare((pixels, labels), (pixels[:10], labels[:10]), 10, flip=True, validation=5000, seed=0, device=GPU)


def _figures(space: Space, data: Data, seconds: float) -> Iterator[dict[str, Any]]:
    budget = flops(space.layers(space.channels(space.largest))) / 8
    scratch = ScratchTrainer(space, space.uniform(0.35), data, SCRATCH, 0, GPU)
    recorded = scratch._step

    def as_it_is() -> None:
        scratch._step = scratch._work

    def again() -> None:
        scratch._step = recorded

    yield {"name": "scratch_step_recorded", **_side_by_side(_step(scratch), again, as_it_is, seconds)}
    net = PruningNetTrainer(space, data, NET, 0, (0.6 * budget, 1.4 * budget), GPU)
    yield {"name": "pruning_net_step_without_plans", **_side_by_side(_step(net), _without, _with, seconds)}
    scorer = Scorer(net.network, data, recalibration_images=1000, classifier_images=5000, seed=0, device=GPU)
    structures = (net._structures.at(i) for i in range(10**6))
    yield {
        "name": "scoring_without_plans",
        **_side_by_side(lambda: scorer.score(next(structures)), _without, _with, seconds),
    }
    _without()


def _without() -> None:
    networks.SMALL_MAP = 32


def _with() -> None:
    networks.SMALL_MAP = 0


def _step(trainer: Trainer) -> Callable[[], None]:
    trainer.network.train()
    batch = trainer.settings.batch_size

    def step() -> None:
        images, labels = trainer.batches.training(batch, 0, trainer.done, GPU)
        trainer._update(images, labels, 0.1, trainer.done % trainer.steps)
        trainer.done += 1

    return step


def _side_by_side(
    work: Callable[[], object], ours: Callable[[], None], plain: Callable[[], None], seconds: float
) -> dict[str, Any]:
    """Median milliseconds of both ways of the same work, in blocks that take turns."""
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for choose in (ours, plain):
        choose()
        for _ in range(WARM_UP):
            work()
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end or len(times["plain"]) < 2:
        for name, choose in (("ours", ours), ("plain", plain)):
            choose()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(BLOCK):
                work()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begun) / BLOCK * 1000)
    medians = {name: round(float(np.median(found)), 2) for name, found in times.items()}
    return {**medians, "ratio": round(medians["plain"] / medians["ours"], 2), "blocks": len(times["ours"])}


if __name__ == "__main__":
    main()
