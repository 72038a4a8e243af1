"""Chunks: parts of a generation, published by the job's worker, scored by whichever worker is free.

Scores depend on a chunk's content alone, so it does not matter who gives them; a chunk is only there for speed. The
claim's fence keeps a worker that was thought dead from writing, and a chunk that has its scores never changes. Chunks
go when their generation is told, and with their job's end (`jobs._end`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, CursorResult, delete, func, or_, select, update
from sqlalchemy.orm import Session

from service.store.bulk import insert_missing
from service.store.models import Chunk, now

Encoding = Sequence[int]
Pair = tuple[float, float]
"""Accuracy and loss."""


@dataclass(frozen=True, slots=True)
class ChunkClaim:
    """The right to hand in one chunk's scores until its lease ends."""

    id: int
    owner: str
    fence: int
    encodings: list[tuple[int, ...]]


def publish(
    session: Session, job_id: str, batch: str, environment: str, parts: Sequence[Sequence[Encoding]]
) -> None:  # fmt: skip
    """Offer a generation in parts; one that was offered before keeps its parts and what is done of them.

    Call it where the job's fence is checked. What was offered of other batches is dropped: no generation needs it.
    """
    session.execute(delete(Chunk).where(Chunk.job_id == job_id, Chunk.batch != batch))
    if not published(session, job_id, batch):
        rows = [
            {"job_id": job_id, "batch": batch, "position": position, "environment": environment, "fence": 0,
             "encodings": [list(encoding) for encoding in part]}
            for position, part in enumerate(parts)
        ]  # fmt: skip
        insert_missing(session, Chunk, rows)


def published(session: Session, job_id: str, batch: str) -> bool:
    """Whether a generation was offered."""
    return session.scalar(select(Chunk.id).where(Chunk.job_id == job_id, Chunk.batch == batch).limit(1)) is not None


def undone(session: Session, job_id: str, batch: str) -> int:
    """How many of a generation's chunks have no scores yet."""
    query = select(func.count()).where(Chunk.job_id == job_id, Chunk.batch == batch, Chunk.scores.is_(None))
    return session.scalar(query) or 0


def waiting(session: Session) -> list[tuple[str, str]]:
    """Jobs with chunks that wait for a worker, each with its environment; the one that has waited longest first."""
    query = select(Chunk.job_id, Chunk.environment).where(_claimable()).group_by(Chunk.job_id, Chunk.environment)
    return [(row.job_id, row.environment) for row in session.execute(query.order_by(func.min(Chunk.id)))]


def claim(session: Session, job_id: str, environment: str, owner: str, lease_seconds: float) -> ChunkClaim | None:
    """Take a job's first chunk that waits for a worker with this environment; None when there is none."""
    query = select(Chunk.id).where(_claimable(), Chunk.job_id == job_id, Chunk.environment == environment)
    chunk_id = session.scalar(query.order_by(Chunk.id).limit(1).with_for_update(skip_locked=True))
    if chunk_id is None:
        return None
    values = {"owner": owner, "fence": Chunk.fence + 1, "lease_until": now() + lease_seconds}
    taken = update(Chunk).where(Chunk.id == chunk_id).values(**values).returning(Chunk.fence, Chunk.encodings)
    fence, encodings = session.execute(taken).one()
    return ChunkClaim(chunk_id, owner, fence, [tuple(encoding) for encoding in encodings])


def finish(session: Session, held: ChunkClaim, scores: Sequence[Pair]) -> bool:
    """Hand in a chunk's scores; False, and nothing is stored, when it is done, gone or somebody else's.

    Raises:
        ValueError: not one score for each encoding.
    """
    if len(scores) != len(held.encodings):
        raise ValueError(f"chunk {held.id} has {len(held.encodings)} encodings, got {len(scores)} scores")
    mine = (Chunk.id == held.id, Chunk.fence == held.fence, Chunk.owner == held.owner, Chunk.scores.is_(None))
    values = {"scores": [list(score) for score in scores], "owner": None, "lease_until": None}
    done = session.execute(update(Chunk).where(*mine).values(**values))
    assert isinstance(done, CursorResult)
    return done.rowcount == 1


def renew(session: Session, owner: str, lease_seconds: float) -> None:
    """Keep what an owner holds."""
    session.execute(update(Chunk).where(Chunk.owner == owner).values(lease_until=now() + lease_seconds))


def release(session: Session, owner: str) -> None:
    """Give back what an owner holds: its process is gone."""
    session.execute(update(Chunk).where(Chunk.owner == owner).values(owner=None, lease_until=None))


def scores(session: Session, job_id: str, batch: str) -> dict[tuple[int, ...], Pair]:
    """Encoding → score, as far as a generation's chunks are done."""
    query = select(Chunk.encodings, Chunk.scores).where(Chunk.job_id == job_id, Chunk.batch == batch)
    return {
        tuple(encoding): (accuracy, loss)
        for encodings, done in session.execute(query.where(Chunk.scores.is_not(None)))
        for encoding, (accuracy, loss) in zip(encodings, done, strict=True)
    }


def drop(session: Session, job_id: str) -> None:
    """Forget a job's chunks: their scores are told."""
    session.execute(delete(Chunk).where(Chunk.job_id == job_id))


def _claimable() -> ColumnElement[bool]:
    return Chunk.scores.is_(None) & or_(Chunk.owner.is_(None), Chunk.lease_until < now())
