"""Files by their content: checkpoints and artifacts. The row says which files count."""

from contextlib import suppress
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from latency_profiler.durable import STALE_SECONDS, place
from service.settings import get_settings
from service.store.bulk import insert_missing
from service.store.models import Blob, clock


def blob_path(sha256: str) -> Path:
    """Where the file of this content lies."""
    return place(get_settings().blobs, sha256)


def register(session: Session, sha256: str) -> None:
    """Make a file that lies at its place count."""
    insert_missing(session, Blob, [{"sha256": sha256, "bytes": blob_path(sha256).stat().st_size}])


def sweep(session: Session) -> int:
    """Remove files that nobody has registered for a day, since their writer was killed before; returns how many.

    What another user owns, or somebody else takes away meanwhile, is left alone.
    """
    removed, long_ago = 0, clock(session) - STALE_SECONDS
    for folder in get_settings().blobs.glob("*"):
        old = {path.name: path for path in folder.glob("*") if _is_older(path, long_ago)}
        for name in old.keys() - set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_(old)))):
            with suppress(OSError):
                old[name].unlink()
                removed += 1
    return removed


def _is_older(path: Path, moment: float) -> bool:
    """Whether it is a file that was written before a moment; one that has gone is not."""
    with suppress(OSError):
        return path.is_file() and path.stat().st_mtime < moment
    return False


def discard(session: Session, sha256: str | None) -> str | None:
    """Forget a blob unless a row still refers to it; returns whose file to `remove` after the commit."""
    if sha256 is None or session.scalar(select(Blob.sha256).where(Blob.sha256 == sha256)) is None:
        return None
    try:
        with session.begin_nested():
            session.execute(delete(Blob).where(Blob.sha256 == sha256))
    except IntegrityError:
        return None
    return sha256


def remove(sha256: str | None) -> None:
    """Take away the file of a blob that no longer counts."""
    if sha256 is not None:
        blob_path(sha256).unlink(missing_ok=True)
