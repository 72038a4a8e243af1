"""How many evaluations evolution needs to reach the best of random search's thousand, on one PruningNet.

    secateurs datasets add cifar10 cifar10_images.tar.xz
    python benchmarks/efficiency.py --dataset cifar10 --max-flops 1500000

One job of random search and some of evolution, with the service's own operators and with the published ones, through
a running service; all share the PruningNet of the first. Run again, the script finds its jobs and goes on waiting.
"""

import argparse
import json
from statistics import mean
from typing import Any

import jobs

RANDOM = {"strategy": "random", "generations": 20, "population": 50}
OPERATORS: dict[str, dict[str, Any]] = {
    "screened": {},
    "published": {"repair": False, "screening": 1, "mutation_probability": 0.1},
}
SHORT = {"retraining": {"epochs": 1, "finalists": 1}, "baselines": False}


def main() -> None:
    """Submit, wait, count, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobilenet_v1")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--max-flops", type=int, default=1_500_000)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--seed", type=int, default=0, help="of the PruningNet and of random search")
    parser.add_argument("--searches", type=int, default=3, help="of each kind, with different seeds")
    parser.add_argument("--generations", type=int, default=10)
    options = parser.parse_args()
    request = {
        "space": options.space, "width": options.width, "image_size": options.image_size, "dataset": options.dataset,
        "constraints": [{"metric": "flops", "max": options.max_flops}], "effort": options.effort, "seed": options.seed,
        **SHORT,
    }  # fmt: skip
    seeds = [options.seed + 1 + i for i in range(options.searches)]
    evolutions = [
        (name, {"generations": options.generations, "seed": seed, **operators})
        for name, operators in OPERATORS.items()
        for seed in seeds
    ]
    searches = [RANDOM | {"seed": options.seed}, *(search for _, search in evolutions)]
    with jobs.service() as client:
        ended = jobs.run(client, [request | {"search": search} for search in searches])
        losses = [_losses(client, job["id"]) for job in ended]
    goal = min(losses[0])
    needed: dict[str, list[int | None]] = {name: [] for name in OPERATORS}
    best: dict[str, list[float]] = {name: [] for name in OPERATORS}
    for (name, _), found in zip(evolutions, losses[1:], strict=True):
        needed[name].append(next((i for i, loss in enumerate(found, 1) if loss <= goal), None))
        best[name].append(min(found))
    summary = {
        "random_evaluations": len(losses[0]), "random_best_loss": goal, "evaluations": len(losses[1]),
        "needed": needed, "mean_needed": {name: _mean(counts) for name, counts in needed.items()}, "best_loss": best,
        "jobs": [jobs.kept(job) for job in ended],
    }  # fmt: skip
    jobs.write(f"efficiency_{options.space}_{options.dataset}_{options.max_flops}_seed{options.seed}", summary)
    print(json.dumps({name: value for name, value in summary.items() if name != "jobs"}, indent=1))


def _losses(client: Any, job_id: str) -> list[float]:
    """Proxy losses in the order of the search."""
    candidates = sorted(client.all_candidates(job_id), key=lambda one: (one["generation"], one["position"]))
    return [one["proxy_loss"] for one in candidates]


def _mean(counts: list[int | None]) -> float | None:
    """None where a search has not reached the goal."""
    return None if None in counts else mean(count for count in counts if count is not None)


if __name__ == "__main__":
    main()
