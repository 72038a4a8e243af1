"""All that decides what a training from scratch gives, as one digest: equal recipes give equal bits."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import latency_profiler
import workers
from workers.training import TrainingSettings

if TYPE_CHECKING:
    from workers.steps.context import Context

DECIDING = {
    workers: ("*.py", "steps/training.py", "steps/trainers.py", "steps/fidelity.py"),
    latency_profiler: ("spaces/*.py", "layers.py", "cost.py", "graphs.py"),
}
"""Files of the algorithms and of the networks: other versions of them give other bits."""


def _code() -> str:
    """Digest of those files, so that no other version's results are taken for ours."""
    folders = {Path(package.__path__[0]): patterns for package, patterns in DECIDING.items()}
    files = [file for folder, patterns in folders.items() for one in patterns for file in sorted(folder.glob(one))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


CODE = _code()
"""As this process has imported it."""


def recipe(context: "Context", channels: Sequence[int], settings: TrainingSettings) -> str:
    """Digest of environment, structure, images, settings and seed of a training on the whole training set."""
    parts = [
        context.environment, context.space.digest(channels), context.seen, asdict(settings),
        context.spec.seed,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
