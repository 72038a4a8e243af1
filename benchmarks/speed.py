"""How fast a PruningNet is trained and candidates are scored, beside the plain method; one JSON line a figure.

    python benchmarks/speed.py [--rounds 12]

Ours runs as in production, in the environment of a runner; `reference.py` in a process of its own, in the environment
that Python finds. They take turns in every round, on the same structures and images; a ratio is the median over rounds.
Times are processor seconds of one thread, which other work on the machine disturbs least.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch

from latency_profiler.cost import Constraint, Metric
from latency_profiler.device import cpu
from latency_profiler.lookup_table import Entry, LatencyModel, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from latency_profiler.spaces.registry import get_space
from workers import evolution
from workers.budget import Budget
from workers.datasets import Data, prepare
from workers.evaluation import BATCH, Scorer
from workers.supervisor import RUNNER_ENVIRONMENT
from workers.training import PruningNetTrainer, ScratchTrainer, Structures, TrainingSettings

HERE = Path(__file__).parent
SPACE = get_space("mobilenet_v1", 32, 0.5, 10, True)
CPU = torch.device("cpu")
BUDGET = 1_500_000
BANDS: dict[str, tuple[float, float] | None] = {"": (0.9 * BUDGET, 1.1 * BUDGET), "_whole_space": None}
SETTINGS = TrainingSettings(epochs=12, batch_size=128, learning_rate=0.1, clip_norm=10.0, normalise=True)
RECALIBRATION, CLASSIFIER = 1000, 5000
PUBLISHED_BATCH = 1000
"""Images of a batch while the published method scores; the plain method is also measured with ours, which it likes."""
BLOCK = 4
"""Steps that each contender takes in its turn, as in training: one alone would begin with the other's caches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.reference:
        _serve()
        return
    if any(os.environ.get(name) != value for name, value in RUNNER_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RUNNER_ENVIRONMENT})
    found = [*_training(options.rounds), *_scoring(max(3, options.rounds // 3))]
    found += [*_search(found[-1]["ours"]), *_two_workers()]
    about = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "machine": cpu(), "threads": 1, "space": SPACE.key, "flops": BUDGET, "batch": SETTINGS.batch_size,
        "rounds": options.rounds, "environment": RUNNER_ENVIRONMENT,
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "speed.json").write_text(json.dumps({"about": about, "figures": found}, indent=1) + "\n")
    for one in found:
        print(json.dumps(one))


def _two_workers() -> list[dict[str, Any]]:
    """The figure of `two_workers.py`; none, with a word about it, where that ends with an error."""
    done = subprocess.run([sys.executable, str(HERE / "two_workers.py")], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"two_workers.py ended with {done.returncode}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def _data() -> Data:
    """Noise in the size of CIFAR-10: no image is seen twice, so that nothing is learnt by heart."""
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 50_000)
    return prepare((pixels, labels), (pixels[:10], labels[:10]), 10, flip=True, validation=5000, seed=0)


def _trainer(data: Data, band: tuple[float, float] | None) -> PruningNetTrainer:
    trainer = PruningNetTrainer(SPACE, data, SETTINGS, 0, band, CPU)
    trainer.network.train()
    return trainer


def _serve() -> None:
    """The process of the reference: one line of seconds for each line that asks for a step or a score."""
    data = _data()
    network = reference.Reference(_trainer(data, None).network)
    optimiser = network.optimiser(SETTINGS.learning_rate, SETTINGS.momentum, SETTINGS.weight_decay)
    images_of = {f"score{batch}": _score_images(data, batch) for batch in (BATCH, PUBLISHED_BATCH)}
    for line in sys.stdin:
        kind, iteration, encoding = json.loads(line)
        if kind == "step":
            images, labels = data.sub_training.training(SETTINGS.batch_size, 0, iteration, CPU)
            seconds = _timed(lambda: reference.train(network, optimiser, images, labels, encoding, 0.1))  # noqa: B023
        else:
            seconds = _timed(lambda: reference.score(network, encoding, *images_of[kind]))  # noqa: B023
        print(seconds, flush=True)


def _score_images(data: Data, batch: int) -> tuple[list[Any], list[Any]]:
    recalibration = data.sub_training.sample(RECALIBRATION, 0)
    return list(recalibration.plain(batch, CPU)), list(data.sub_validation.plain(batch, CPU))


class Other:
    """The reference in its process."""

    def __init__(self) -> None:
        env = {name: value for name, value in os.environ.items() if name not in RUNNER_ENVIRONMENT}
        command = [sys.executable, __file__, "--reference"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def seconds(self, kind: str, iteration: int, encoding: tuple[int, ...]) -> float:
        """Of one step or one candidate's score."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, iteration, encoding]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """It ends with its input."""
        self._process.communicate()


def _timed(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _figure(name: str, ours: list[float], theirs: list[float], unit: str, faster: bool) -> dict[str, Any]:
    ratio = statistics.median((b / a if faster else a / b) for a, b in zip(ours, theirs, strict=True))
    return {
        "name": name, "ours": round(statistics.median(ours), 4), "reference": round(statistics.median(theirs), 4),
        "ratio": round(ratio, 3), "unit": unit,
    }  # fmt: skip


def _training(rounds: int) -> list[dict[str, Any]]:
    found, data, other = [], _data(), Other()
    for suffix, band in BANDS.items():
        trainer, ours, theirs, plain, inputs = _trainer(data, band), [], [], [], []
        structures = Structures(SPACE, band, 0)
        for turn in range(rounds + 1):  # the first one warms up
            block = range(BLOCK * turn, BLOCK * (turn + 1))
            encodings = {i: structures.at(i) for i in block}
            steps = [_step(trainer, data, i) for i in block]
            others = [other.seconds("step", i, encodings[i]) for i in block]
            plains = [_plain(data, encodings[i]) for i in block]
            reading = [_timed(lambda: data.sub_training.training(SETTINGS.batch_size, 0, i, CPU)) for i in block]  # noqa: B023
            if turn:
                ours += steps
                theirs += others
                plain += plains
                inputs += reading
        found += [
            _figure("pruning_net_step_vs_reference" + suffix, ours, theirs, "s per step", True),
            _figure("pruning_net_step_vs_plain" + suffix, ours, plain, "s per step", False),
        ]
        if not suffix:
            found.append(
                _figure("input_share", inputs, [a + b for a, b in zip(ours, inputs, strict=True)], "s per step", False)
            )
    other.close()
    return found


def _step(trainer: PruningNetTrainer, data: Data, iteration: int) -> float:
    """Seconds of a step; reading its images is not part of anybody's."""
    images, labels = data.sub_training.training(SETTINGS.batch_size, 0, iteration, CPU)
    trainer.done = iteration
    return _timed(lambda: trainer._update(images, labels, SETTINGS.learning_rate, iteration))


def _plain(data: Data, encoding: tuple[int, ...]) -> float:
    """Seconds of a step of the plain network, once its kernels are there."""
    trainer = ScratchTrainer(SPACE, SPACE.channels(encoding), data, SETTINGS, 0, CPU)
    trainer.network.train()
    images, labels = data.sub_training.training(SETTINGS.batch_size, 0, 0, CPU)
    steps = [_timed(lambda: trainer._update(images, labels, SETTINGS.learning_rate, 0)) for _ in range(4)]
    return statistics.median(steps[1:])


def _scoring(rounds: int) -> list[dict[str, Any]]:
    data, other = _data(), Other()
    ours, fitted, theirs, published, bare, bare_fitted = (list[float]() for _ in range(6))
    network = _trainer(data, None).network
    scorer, fitting = (
        Scorer(network, data, recalibration_images=RECALIBRATION, classifier_images=images, seed=0, device=CPU)
        for images in (0, CLASSIFIER)
    )
    images = [batch for part in _score_images(data, BATCH) for batch, _ in part]
    more = [batch for batch, _ in data.sub_training.sample(CLASSIFIER, 0).plain(BATCH, CPU)]
    structures = Structures(SPACE, BANDS[""], 0)
    for i in range(-1, rounds):
        encoding = structures.at(i + 1)
        own, fit = (_timed(lambda: one.score(encoding)) for one in (scorer, fitting))  # noqa: B023
        times = [other.seconds(f"score{batch}", i, encoding) for batch in (BATCH, PUBLISHED_BATCH)]
        plain = network.crop(encoding)
        with torch.inference_mode():
            forward, on_more = (_timed(lambda: [plain(batch) for batch in part]) for part in (images, more))  # noqa: B023
        if i >= 0:
            ours.append(own), theirs.append(times[0]), published.append(times[1]), bare.append(forward)
            fitted.append(fit), bare_fitted.append(forward + on_more)
    other.close()
    return [
        _figure("scoring_vs_reference", ours, published, "s per candidate", True),
        _figure("scoring_vs_reference_in_our_batches", ours, theirs, "s per candidate", True),
        _figure("scoring_and_fitting_vs_reference", fitted, published, "s per candidate", True),
        _figure("scoring_and_fitting_vs_forward", fitted, bare_fitted, "s per 11,000 images", True),
        _figure("scoring_vs_forward", ours, bare, "s per 6,000 images", True),
    ]  # fmt: skip


def _search(scoring: float) -> list[dict[str, Any]]:
    """The share of a search that is not spent on scoring, at these seconds each, and candidates priced per second."""
    device = Simulated(Settings())
    entries = [Entry(layer, device.load_layer(layer).seconds(1)) for layer in plan_layers(SPACE)]
    table = LatencyTable("simulated", "", {entry.layer.key: entry for entry in entries})
    model, random = LatencyModel(table, SPACE), np.random.default_rng(0)
    genes = random.integers(0, 31, (50_000, len(SPACE.genes)))
    widths = np.array(SPACE.choices)[np.arange(len(SPACE.genes)), genes]
    fixed = np.broadcast_to([slot.base for slot in SPACE.fixed], (len(genes), len(SPACE.fixed)))
    channels = np.concatenate([widths, fixed], axis=1).astype(np.int64)
    rate = len(genes) / statistics.median(_timed(lambda: model.seconds(channels)) for _ in range(5))
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, BUDGET)], {"simulated": table}, {}, 0.97)
    settings = evolution.Settings(40, 8, rank_by="loss", repair=True, screening=4)
    search, count = evolution.Evolution(settings, 0, budget), 0
    begun = time.process_time()
    while proposals := search.propose():
        count += len(proposals)
        search.tell([evolution.Score(0.5, float(random.random())) for _ in proposals])
    own = (time.process_time() - begun) / count
    return [
        {"name": "pricing_per_second", "ours": round(rate), "reference": 50_000, "ratio": round(rate / 50_000, 2),
         "unit": "candidates per s"},
        {"name": "evolution_share", "ours": round(own, 6), "reference": round(own + scoring, 4),
         "ratio": round(own / (own + scoring), 5), "unit": "s per candidate"},
    ]  # fmt: skip


if __name__ == "__main__":
    main()
