"""Files that are there completely or not at all, also after a power failure."""

import os
import tempfile
from pathlib import Path


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


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
