"""Tensors and bytes as files that are named by their content.

A file is written beside its place, flushed to disk and renamed, so that a name never stands for half a file; which
file counts is for a database row to say. Tensors are safetensors: no pickle, nothing that could run.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latency_profiler.durable import flush, place, sweep
from latency_profiler.errors import DamagedCheckpoint

WRITING = ".writing-"


def save(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors below `folder`; returns the SHA-256 that names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    try:
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(flat, temporary)
        return _keep(folder, temporary)
    finally:
        temporary.unlink(missing_ok=True)


def write_blob(folder: Path, content: bytes) -> str:
    """Write bytes below `folder`; returns the SHA-256 that names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    try:
        temporary.write_bytes(content)
        return _keep(folder, temporary)
    finally:
        temporary.unlink(missing_ok=True)


def intact(path: Path, sha256: str) -> bool:
    """Whether a file is there and what was saved."""
    return path.is_file() and _digest(path) == sha256


def load(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DamagedCheckpoint: the file is missing, or its content has another digest.
    """
    try:
        if (found := _digest(path)) != sha256:
            raise DamagedCheckpoint(f"checkpoint {path.name} has the digest {found}, not {sha256}; it was changed")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {path.name} cannot be read: {error}") from error


def _temporary(folder: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=WRITING, dir=folder)
    os.fchmod(handle, 0o644)  # the service may run as another user than the worker
    os.close(handle)
    sweep(folder, f"{WRITING}*", Path(name))
    return Path(name)


def _keep(folder: Path, temporary: Path) -> str:
    """Flush a finished file and move it to its place."""
    sha256 = _digest(temporary)
    target = place(folder, sha256)
    target.parent.mkdir(exist_ok=True)
    flush(temporary)
    temporary.replace(target)
    flush(target.parent)
    return sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
