"""Files that are there completely or not at all, also after a power failure."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

STALE_SECONDS = 86_400
"""Age of what nobody writes any more."""


def save(target: Path, content: bytes) -> None:
    """Write a file; whatever interrupts this, the old content or the new one is there afterwards."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def place(folder: Path, sha256: str) -> Path:
    """Where the file of this content lies below a folder of files that are named by their content."""
    return folder / sha256[:2] / sha256


def sweep(folder: Path, pattern: str, fresh: Path) -> None:
    """Remove what killed processes left behind more than a day before a file or folder that has just been made."""
    now = fresh.stat().st_mtime
    for left in folder.glob(pattern):
        with suppress(OSError):  # somebody has just finished it
            if now - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
