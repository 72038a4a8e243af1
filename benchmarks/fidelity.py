"""How well PruningNets rank: Kendall's tau, with and without weight prediction, with and without recalibration.

    secateurs datasets add cifar10 cifar10_images.tar.xz
    python benchmarks/fidelity.py --dataset cifar10 --max-flops 1500000 --structures 24

Two jobs through a running service, alike but for `training.weights`; the second takes over the first one's trainings
from scratch. Their searches are as short as can be. Run again, the script goes on where it was (see jobs.py).
"""

import argparse
import json
from typing import Any

from jobs import kept, run, service, write

KINDS = ("generated", "shared")
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
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    request: dict[str, Any] = {
        "space": options.space, "width": options.width, "image_size": options.image_size, "dataset": options.dataset,
        "constraints": [{"metric": "flops", "max": options.max_flops}], "effort": options.effort, "search": SHORTEST,
        "fidelity": {"structures": options.structures, "epochs": options.epochs}, "baselines": False,
        "seed": options.seed, "retraining": {"finalists": 1},
    }  # fmt: skip
    if options.epochs:
        request["retraining"] |= {"epochs": options.epochs}  # of the search's winner, which nobody asked for
    requests = [request | {"training": {"weights": weights}} for weights in options.weights]
    with service() as client:
        jobs = run(client, requests)
        nets = [client.pruning_net(job["result"]["pruning_net"]) for job in jobs if job["result"]]
    name = f"fidelity_{options.space}_{options.dataset}_{options.max_flops}_seed{options.seed}"
    name += f"_epochs{options.epochs}" if options.epochs else ""
    write(name, {"jobs": [kept(job) for job in jobs], "pruning_nets": nets})
    print(json.dumps([variant for net in nets for variant in net["fidelity"]], indent=1))


if __name__ == "__main__":
    main()
