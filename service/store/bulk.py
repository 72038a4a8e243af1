"""Rows in bulk, on either database."""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from sqlalchemy import ARRAY, Table, cast, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.store.models import Base


def insert_missing(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that all have the same columns; one whose key exists is left as it is."""
    if rows:
        session.execute(_insert(session, model).on_conflict_do_nothing(), rows)


def upsert(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that all have the same columns; one whose primary key exists takes the given values."""
    if rows:
        session.execute(_taking(_insert(session, model), model, list(rows[0])), rows)


def upsert_columns(
    session: Session, model: type[Base], columns: Mapping[str, Sequence[Any]], common: Mapping[str, Any]
) -> None:
    """`upsert` of thousands of rows, given by columns of one length and the values that all of them have.

    A driver's own way to take them is faster than rows are.
    """
    names, statement, connection = [*common, *columns], _insert(session, model), session.connection()
    if connection.dialect.name == "sqlite":
        sql = _taking(statement, model, names).compile(connection.engine, column_keys=names)
        count = len(next(iter(columns.values())))
        whole = {name: repeat(value, count) for name, value in common.items()} | dict(columns)
        connection.exec_driver_sql(str(sql), list(zip(*(whole[name] for name in sql.positiontup or ()), strict=True)))
        return
    types = {name: model.__table__.c[name].type for name in names}
    given = [cast(value, types[name]) for name, value in common.items()]
    arrays = [func.unnest(cast(list(values), ARRAY(types[name]))) for name, values in columns.items()]
    session.execute(_taking(statement.from_select(names, select(*given, *arrays)), model, names))


def _taking(
    statement: sqlite.Insert | postgresql.Insert, model: type[Base], names: Sequence[str]
) -> sqlite.Insert | postgresql.Insert:
    """The insertion that takes the given values where its primary key exists."""
    keys = [column.name for column in model.__table__.primary_key]
    given = {name: statement.excluded[name] for name in names if name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=given)


def _insert(session: Session, model: type[Base]) -> sqlite.Insert | postgresql.Insert:
    table = model.__table__
    assert isinstance(table, Table)
    return sqlite.insert(table) if session.get_bind().dialect.name == "sqlite" else postgresql.insert(table)
