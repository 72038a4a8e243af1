"""Rows in bulk, on either database."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.store.models import Base


def insert_missing(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that all have the same columns; one whose key exists is left as it is."""
    if rows:
        session.execute(_insert(session, model).on_conflict_do_nothing(), rows)


def upsert(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that all have the same columns; one whose primary key exists takes the given values."""
    if not rows:
        return
    statement, keys = _insert(session, model), [column.name for column in model.__table__.primary_key]
    given = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    session.execute(statement.on_conflict_do_update(index_elements=keys, set_=given), rows)


def _insert(session: Session, model: type[Base]) -> sqlite.Insert | postgresql.Insert:
    table = model.__table__
    assert isinstance(table, Table)
    return sqlite.insert(table) if session.get_bind().dialect.name == "sqlite" else postgresql.insert(table)
