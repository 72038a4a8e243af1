"""Files by their content: checkpoints and artifacts. The row says which files count."""

from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from latency_profiler.durable import place
from service.settings import get_settings
from service.store.models import Blob


def blob_path(sha256: str) -> Path:
    """Where the file of this content lies."""
    return place(get_settings().blobs, sha256)


def register(session: Session, sha256: str) -> None:
    """Make a file that lies at its place count."""
    if session.get(Blob, sha256) is None:
        session.add(Blob(sha256=sha256, bytes=blob_path(sha256).stat().st_size))
        session.flush()


def discard(session: Session, sha256: str | None) -> bool:
    """Forget a blob unless a row still refers to it; True when its file may be removed after the commit."""
    if sha256 is None or session.scalar(select(Blob.sha256).where(Blob.sha256 == sha256)) is None:
        return False
    try:
        with session.begin_nested():
            session.execute(delete(Blob).where(Blob.sha256 == sha256))
    except IntegrityError:
        return False
    return True
