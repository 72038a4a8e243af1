"""One search through a running service, and what came of it as JSON: winner against the uniform network.

    secateurs datasets add cifar10 cifar10_images.tar.xz
    python benchmarks/search.py --dataset cifar10 --max-flops 1500000 --seed 0

The job's Idempotency-Key is made from its request: run again, the script finds its job and goes on waiting. Server and
key are those of `secateurs up` (SECATEURS_HOME), or SECATEURS_SERVER and SECATEURS_KEY.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from latency_profiler.client import Client
from service.commands.login import connect

ENDED = ("succeeded", "failed", "cancelled", "unverified")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Submit, wait, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobilenet_v1")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--max-flops", type=int, required=True)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    request = {
        "space": options.space, "width": options.width, "image_size": options.image_size, "dataset": options.dataset,
        "constraints": [{"metric": "flops", "max": options.max_flops}], "effort": options.effort, "seed": options.seed,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    with connect(os.environ.get("SECATEURS_SERVER"), os.environ.get("SECATEURS_KEY")) as client:
        job = _ended(client, client.submit(request, idempotency_key=key)["id"])
    name = f"search_{options.space}_{options.dataset}_{options.max_flops}_seed{options.seed}.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(_summary(job), indent=1) + "\n")
    print(json.dumps(_summary(job)["result"], indent=1))


def _ended(client: Client, job_id: str) -> dict[str, Any]:
    while (job := client.job(job_id))["state"] not in ENDED:
        time.sleep(5)
    return job


def _summary(job: dict[str, Any]) -> dict[str, Any]:
    kept = ("state", "space_key", "spec", "seconds", "result", "warnings", "error", "reproducible")
    return {name: job[name] for name in kept} | {"machine": platform.machine(), "python": platform.python_version()}


if __name__ == "__main__":
    main()
