"""How well PruningNets rank: Kendall's tau, with and without weight prediction, with and without recalibration.

    secateurs datasets add cifar10 cifar10_images.tar.xz
    python benchmarks/fidelity.py --dataset cifar10 --max-flops 1500000 --structures 24

Two jobs through a running service, alike but for `training.weights`; the second takes over the first one's trainings
from scratch. Their searches are as short as can be. Run again, the script finds its jobs and goes on waiting. Server
and key are those of `secateurs up` (SECATEURS_HOME), or SECATEURS_SERVER and SECATEURS_KEY.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from latency_profiler.client import TERMINAL, Client
from service.commands.login import connect

RESULTS = Path(__file__).parent / "results"
SHORTEST = {"generations": 1, "population": 2, "parents": 1}


def main() -> None:
    """Submit, wait, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobilenet_v1")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--max-flops", type=int, default=1_500_000)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--structures", type=int, default=24)
    parser.add_argument("--epochs", type=int, help="of each training from scratch; as many as the effort has")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    request: dict[str, Any] = {
        "space": options.space, "width": options.width, "image_size": options.image_size, "dataset": options.dataset,
        "constraints": [{"metric": "flops", "max": options.max_flops}], "effort": options.effort, "search": SHORTEST,
        "fidelity": {"structures": options.structures, "epochs": options.epochs}, "baselines": False,
        "seed": options.seed,
    }  # fmt: skip
    requests = [request | {"training": {"weights": weights}} for weights in ("generated", "shared")]
    with connect(os.environ.get("SECATEURS_SERVER"), os.environ.get("SECATEURS_KEY")) as client:
        submitted = [client.submit(one, idempotency_key=_key(one))["id"] for one in requests]
        jobs = [_ended(client, job_id) for job_id in submitted]
        nets = [client.pruning_net(job["result"]["pruning_net"]) for job in jobs if job["result"]]
    summary = {
        "jobs": [_summary(job) for job in jobs], "pruning_nets": nets, "machine": platform.machine(),
        "python": platform.python_version(),
    }  # fmt: skip
    name = f"fidelity_{options.space}_{options.dataset}_{options.max_flops}_seed{options.seed}.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps([variant for net in nets for variant in net["fidelity"]], indent=1))


def _key(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _ended(client: Client, job_id: str) -> dict[str, Any]:
    while (job := client.job(job_id))["state"] not in TERMINAL:
        time.sleep(5)
    return job


def _summary(job: dict[str, Any]) -> dict[str, Any]:
    kept = ("state", "space_key", "spec", "seconds", "result", "warnings", "error", "reproducible", "created_at")
    return {name: job[name] for name in kept}


if __name__ == "__main__":
    main()
