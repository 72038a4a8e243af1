"""Requests that carried an `Idempotency-Key`: answered once, and from then on from here.

The row is written in the transaction that does the work. A second request with the same key waits for the first
one's commit at the unique constraint, and finds its answer; it sees no half-done work.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, insert, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from latency_profiler.errors import SecateursError
from service.store.models import Idempotency, now

LOCK_NOT_AVAILABLE = "55P03"


class KeyReused(SecateursError):
    """An idempotency key that belongs to another request."""

    def __init__(self) -> None:
        super().__init__("this Idempotency-Key was used for a request with another body; choose a new key")


class RequestInFlight(SecateursError):
    """The first request with this key is not answered yet."""

    def __init__(self) -> None:
        super().__init__("a request with this Idempotency-Key is being worked on; ask again in a moment")


def once(
    session: Session, caller: str, route: str, key: str, request_sha: str, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The answer of `work`, done now or earlier under this key.

    Raises:
        KeyReused: the key's request was another one.
        RequestInFlight: its transaction takes too long.
    """
    identity = {"caller": caller, "route": route, "key": key}
    if not _reserve(session, identity | {"request_sha": request_sha, "status": 0, "response": {}}):
        row = session.get_one(Idempotency, identity)
        if row.request_sha != request_sha:
            raise KeyReused
        return row.response
    response = work()
    row = session.get_one(Idempotency, identity)
    row.status, row.response = 202, response
    return response


def sweep(session: Session, older_than_seconds: float = 86_400.0) -> None:
    """Forget old keys."""
    session.execute(delete(Idempotency).where(Idempotency.created_at < now() - older_than_seconds))


def _reserve(session: Session, row: dict[str, Any]) -> bool:
    """Insert the row; False when its key is taken."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SET LOCAL lock_timeout = '2s'"))
    try:
        with session.begin_nested():
            session.execute(insert(Idempotency).values(**row))
    except IntegrityError:
        return False
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE:
            raise RequestInFlight from error
        raise
    return True
