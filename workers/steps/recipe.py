"""All that decides what a training from scratch gives, as one digest: equal recipes give equal bits."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import service.images
import workers
from workers.steps.context import Context
from workers.training import TrainingSettings


def _code() -> str:
    """Digest of the algorithms and of what decodes images, so that no other version's results are taken for ours."""
    files = [*sorted(Path(workers.__file__).parent.glob("*.py")), Path(service.images.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


CODE = _code()
"""As this process has imported it."""


def recipe(context: Context, channels: Sequence[int], settings: TrainingSettings) -> str:
    """Digest of code, machine, structure, dataset, settings and seed of a training on the whole training set."""
    parts = [
        CODE, context.environment, context.space.digest(channels), context.dataset.id, asdict(settings),
        context.spec.seed,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
