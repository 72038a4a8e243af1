"""All that decides what a training from scratch gives, as one digest: equal recipes give equal bits."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import latency_profiler.layers
import latency_profiler.spaces
import workers
from workers.steps.context import Context
from workers.training import TrainingSettings


def _code() -> str:
    """Digest of the algorithms and of the networks, so that no other version's results are taken for ours."""
    files = [file for package in (workers, latency_profiler.spaces) for file in Path(package.__path__[0]).glob("*.py")]
    files.append(Path(latency_profiler.layers.__file__))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()


CODE = _code()
"""As this process has imported it."""


def recipe(context: Context, channels: Sequence[int], settings: TrainingSettings) -> str:
    """Digest of code, machine, structure, images, settings and seed of a training on the whole training set."""
    parts = [
        CODE, context.environment, context.space.digest(channels), context.loaded.digest, asdict(settings),
        context.spec.seed,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
