"""How the quadratic problem of collaborative pruning is solved: one JSON line a figure, all in results/.

    python benchmarks/quadratic.py [--epochs 10]

The problems are those of a network that was trained on the digits that ship with scikit-learn, `mobilenet_v1` of half
width, whose slots have 16 to 512 channels: u and S (empirical Fisher matrix), half of the channels to keep. PIQP is
what the service uses; accelerated projected gradient and SciPy's SLSQP are written down here; OSQP, Clarabel and DAQP
are measured if they are installed. `gap` bounds how far the relaxation's optimum is missed, as a share of the largest
coefficient; `rounded` and `swapped` are what the found optimum leads to. `outer` are iterations of SQP: one, where the
problem is a quadratic programme itself, and as many as the linearised budget takes in the problem of all layers. Times
are processor milliseconds of one thread.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import minimize

from latency_profiler.cost import Constraint, Metric, flops
from latency_profiler.device import cpu
from latency_profiler.spaces.registry import get_space
from service import images
from workers.budget import Budget
from workers.datasets import prepare
from workers.pruners.channel_statistics import ChannelStatistics, Expansion
from workers.pruners.keep_counts import Widths, spread
from workers.pruners.quadratic import Floats, Quadratic, binarise, frank_wolfe_gap, relax, swap
from workers.supervisor import RUNNER_ENVIRONMENT
from workers.training import ScratchTrainer, TrainingSettings

SPACE = get_space("mobilenet_v1", 8, 0.5, 10, True)
CPU = torch.device("cpu")
REPEATS = 5
SLOWEST = 128
"""SLSQP is asked for problems up to this size: it takes seconds from there on."""
ACCURATE = 1e-9
STEPS = 20_000
Solved = tuple[Floats, int]
Solve = Callable[[Quadratic, int], Solved]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if any(os.environ.get(name) != value for name, value in RUNNER_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RUNNER_ENVIRONMENT})
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": cpu(),
        "threads": 1,
    }
    found = []
    for one in measured(problems(options.epochs)):
        print(json.dumps(one), flush=True)
        found.append(one)
    text = json.dumps({"about": about | {"epochs": options.epochs}, "figures": found}, indent=1)
    (Path(__file__).parent / "results" / "quadratic.json").write_text(text + "\n")


def measured(quadratics: dict[int, Quadratic]) -> Iterator[dict[str, Any]]:
    sizes = {len(one.u): one for one in quadratics.values()}  # the last of each
    for c, quadratic in sorted(sizes.items()):
        for name, solve in SOLVERS.items():
            if name != "slsqp" or c <= SLOWEST:
                yield {"name": "layer", "solver": name, "channels": c, **figures(solve, quadratic)}
    for share in (0.75, 0.5, 0.25):
        yield {"name": "all_layers", "solver": "piqp", **together(quadratics, share)}


def problems(epochs: int) -> dict[int, Quadratic]:
    """Of all slots of a network that was trained for so long."""
    with tempfile.TemporaryDirectory() as cache:
        digits = images.load("digits", None, Path(cache), SPACE.image_size, Path(cache))
    train, test = (digits.train_x, digits.train_y), (digits.test_x, digits.test_y)
    data = prepare(train, test, SPACE.classes, flip=False, validation=280, seed=0)
    settings = TrainingSettings(epochs, 64, 0.1, clip_norm=10.0)
    trainer = ScratchTrainer(SPACE, SPACE.uniform(1.0), data, settings, 0, CPU)
    trainer.advance(lambda: False)
    gathering = ChannelStatistics(
        trainer.network, data.sub_training, 128, range(len(SPACE.genes)), Expansion(), 0, CPU
    )  # fmt: skip
    gathering.advance(lambda: False)
    return gathering.quadratics()


def figures(solve: Solve, quadratic: Quadratic) -> dict[str, Any]:
    count, seconds = len(quadratic.u) // 2, []
    for _ in range(REPEATS):
        began = time.process_time()
        kept, iterations = solve(quadratic, count)
        seconds.append(time.process_time() - began)
    rounded, scale = binarise(kept, count), quadratic.scale
    swapped, swaps = swap(quadratic, rounded)
    gap = frank_wolfe_gap(quadratic.gradient(kept), kept, np.ones(len(kept)), count)
    return {
        "ms": round(1000 * statistics.median(seconds), 2), "outer": 1, "iterations": iterations, "gap": gap / scale,
        "infeasible": abs(float(kept.sum()) - count), "relaxed": quadratic.change(kept),
        "rounded": quadratic.change(rounded), "swapped": quadratic.change(swapped), "swaps": swaps,
    }  # fmt: skip


def together(quadratics: dict[int, Quadratic], share: float) -> dict[str, Any]:
    """The problem of all layers with a share of the multiply-adds."""
    whole = SPACE.uniform(1.0)
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, share * flops(SPACE.layers(whole)))], {}, {})
    widths = Widths(budget, whole, range(len(SPACE.genes)), 0.1, False)
    began = time.process_time()
    found = spread(quadratics, widths)
    seconds = time.process_time() - began
    counts = widths.within(found.widths)
    return {
        "channels": sum(whole), "share": share, "ms": round(1000 * seconds), "outer": found.rounds,
        "used": round(float(budget.shares(np.array([counts]))[0]), 4), "counts": counts,
    }  # fmt: skip


def piqp(quadratic: Quadratic, count: int) -> Solved:
    found = relax([quadratic], np.ones(len(quadratic.u)), count)
    return found.kept, found.iterations


def projected_gradient(quadratic: Quadratic, count: int) -> Solved:
    """Accelerated, restarted where momentum points uphill (O'Donoghue and Candès 2015)."""
    kept = ahead = np.full(len(quadratic.u), count / len(quadratic.u))
    smoothness, momentum, ones = float(np.linalg.eigvalsh(quadratic.s)[-1]), 1.0, np.ones(len(kept))
    for done in range(1, STEPS + 1):
        following = _projected(ahead - quadratic.gradient(ahead) / smoothness, count)
        uphill = (ahead - following) @ (following - kept) > 0
        grown = 1.0 if uphill else (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (0.0 if uphill else (momentum - 1) / grown) * (following - kept)
        kept, momentum = following, grown
        if done % 10 == 0 and frank_wolfe_gap(quadratic.gradient(kept), kept, ones, count) < ACCURATE * quadratic.scale:
            break
    return kept, done


def _projected(x: Floats, count: int) -> Floats:
    """The nearest point with 0 <= b <= 1 and sum b = count: clip(x - t), where t lies between two kinks of the sum."""
    kinks = np.concatenate([x - 1, x])
    order = np.argsort(kinks)
    at, slopes = kinks[order], np.cumsum(np.repeat([-1.0, 1.0], len(x))[order])
    sums = len(x) + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(at))])
    k = max(1, int(np.searchsorted(-sums, -count)))
    t = at[k - 1] + ((count - sums[k - 1]) / slopes[k - 1] if slopes[k - 1] else 0.0)
    projected: Floats = np.clip(x - t, 0.0, 1.0)
    return projected


def slsqp(quadratic: Quadratic, count: int) -> Solved:
    c, scale = len(quadratic.u), quadratic.scale
    found = minimize(
        lambda b: quadratic.change(b) / scale, np.full(c, count / c), jac=lambda b: quadratic.gradient(b) / scale,
        bounds=[(0.0, 1.0)] * c, method="SLSQP", options={"ftol": 1e-12, "maxiter": 1000},
        constraints={"type": "eq", "fun": lambda b: b.sum() - count, "jac": lambda b: np.ones(c)},
    )  # fmt: skip
    return np.clip(found.x, 0.0, 1.0), int(found.nit)


def osqp(quadratic: Quadratic, count: int) -> Solved:
    import osqp as package

    c, (s, linear) = len(quadratic.u), _scaled(quadratic)
    solver, limits = package.OSQP(), sparse.vstack([np.ones((1, c)), sparse.eye(c)], format="csc")
    low, high = np.r_[count, np.zeros(c)], np.r_[count, np.ones(c)]
    solver.setup(
        P=sparse.triu(s, format="csc"), q=linear, A=limits, l=low, u=high, verbose=False, eps_abs=ACCURATE,
        eps_rel=ACCURATE, max_iter=STEPS, polishing=True,
    )  # fmt: skip
    found = solver.solve()
    return np.clip(found.x, 0.0, 1.0), int(found.info.iter)


def clarabel(quadratic: Quadratic, count: int) -> Solved:
    import clarabel as package

    c, (s, linear) = len(quadratic.u), _scaled(quadratic)
    rows = sparse.vstack([np.ones((1, c)), sparse.eye(c), -sparse.eye(c)], format="csc")
    settings = package.DefaultSettings()
    settings.verbose = False
    cones = [package.ZeroConeT(1), package.NonnegativeConeT(2 * c)]
    right = np.r_[count, np.ones(c), np.zeros(c)]
    found = package.DefaultSolver(sparse.triu(s, format="csc"), linear, rows, right, cones, settings).solve()
    return np.clip(np.array(found.x), 0.0, 1.0), int(found.iterations)


def daqp(quadratic: Quadratic, count: int) -> Solved:
    import daqp as package

    c, (s, linear) = len(quadratic.u), _scaled(quadratic)
    definite = s + 1e-10 * np.trace(s) / c * np.eye(c)  # a dual active-set method needs that
    low, high, kinds = np.r_[np.zeros(c), count], np.r_[np.ones(c), count], np.r_[np.zeros(c), 5].astype(np.int32)
    kept, _, _, about = package.solve(definite, linear, np.ones((1, c)), high, low, kinds)
    return np.clip(kept, 0.0, 1.0), int(about["iterations"])


def _scaled(quadratic: Quadratic) -> tuple[Floats, Floats]:
    """S and the linear terms by b itself, of the problem as `relax` scales it."""
    s = quadratic.s / quadratic.scale
    return s, quadratic.u / quadratic.scale - s.sum(1)


def _installed(solvers: Sequence[Solve]) -> Iterator[tuple[str, Solve]]:
    for solve in solvers:
        if solve not in (osqp, clarabel, daqp) or importlib.util.find_spec(solve.__name__):
            yield solve.__name__, solve


SOLVERS = dict(_installed([piqp, projected_gradient, slsqp, osqp, clarabel, daqp]))


if __name__ == "__main__":
    main()
