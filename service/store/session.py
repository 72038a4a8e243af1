"""The engine, and the only commit.

SQLite runs in WAL mode with `BEGIN IMMEDIATE` for every transaction: a transaction that reads first and writes later
would otherwise fail or lose updates when two processes do so at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from service.settings import get_settings

DATABASE_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeout)
"""What is raised while the database does not answer, or takes no writes (a PostgreSQL that stands by, or is full)."""
BYTES = {"bytes": True}
"""Execution options of a statement that reads many bytes."""


def make_engine(url: str) -> Engine:
    """An engine for SQLite or PostgreSQL with the settings that the design relies on."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(
            parsed, pool_size=20, max_overflow=20, pool_timeout=2, pool_pre_ping=True,
            connect_args={"connect_timeout": 2, "options": "-c idle_in_transaction_session_timeout=30000"},
        )  # fmt: skip
        event.listen(engine, "before_cursor_execute", _ask_for_bytes)
        return engine
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, pool_size=40, max_overflow=0, pool_timeout=2)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_immediate)
    return engine


@lru_cache
def get_engine() -> Engine:
    """The engine of this process."""
    return make_engine(get_settings().database)


@contextmanager
def transaction() -> Iterator[Session]:
    """A session whose changes are committed at the end, or rolled back if an error leaves the block."""
    with Session(get_engine(), expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def snapshot() -> Iterator[Session]:
    """A session that only reads; on SQLite it does not wait for writers."""
    engine = get_engine().execution_options(read_only=True)
    with Session(engine, expire_on_commit=False) as session:
        yield session


def takes_writes() -> bool:
    """Whether the database that answers can be written to; a PostgreSQL that stands by cannot."""
    with snapshot() as session:
        postgres = session.get_bind().dialect.name == "postgresql"
        return not postgres or session.scalar(text("SHOW transaction_read_only")) == "off"


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _ask_for_bytes(_connection: Any, cursor: Any, _statement: Any, _given: Any, context: Any, _many: bool) -> None:
    """PostgreSQL's answer in binary, where a statement has `BYTES`; as text a megabyte takes five times as long."""
    if context is not None and context.execution_options.get("bytes", False):
        cursor.format = context.dialect.dbapi.pq.Format.BINARY


def _begin_immediate(connection: Any) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
