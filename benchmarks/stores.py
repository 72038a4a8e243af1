"""Databases that the benchmarks of the store fill: SQLite, and PostgreSQL where SECATEURS_TEST_POSTGRES names a server.

A server is named like in the tests, e.g. postgresql://postgres@127.0.0.1:5432; its databases are made and dropped here.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from sqlalchemy import create_engine, make_url, text

from latency_profiler.cost import CostModel, Ints
from latency_profiler.spaces.space import Space
from service import admin
from service.settings import get_settings
from service.store.bulk import insert_missing
from service.store.candidates import space_arguments
from service.store.models import Structure
from service.store.session import get_engine, transaction

ROWS = 20_000
"""Structures that are written per transaction."""


def kinds() -> list[str]:
    """Of the databases that can be had."""
    return ["sqlite", "postgresql"] if os.environ.get("SECATEURS_TEST_POSTGRES") else ["sqlite"]


@contextmanager
def store(kind: str) -> Iterator[None]:
    """A migrated, empty database, which is that of the settings."""
    with tempfile.TemporaryDirectory(prefix="secateurs-bench-") as home:
        os.environ["SECATEURS_HOME"] = home
        name = f"secateurs_bench_{os.getpid()}"
        if kind == "postgresql":
            _administer(f"CREATE DATABASE {name}")
            url = make_url(os.environ["SECATEURS_TEST_POSTGRES"]).set(database=name)
            os.environ["SECATEURS_DATABASE_URL"] = url.render_as_string(hide_password=False)
        _forget()
        try:
            admin.migrate()
            yield
        finally:
            get_engine().dispose()
            if os.environ.pop("SECATEURS_DATABASE_URL", None):
                _administer(f"DROP DATABASE {name} WITH (FORCE)")
            _forget()


def random_channels(space: Space, count: int, seed: int = 0) -> Ints:
    """Channels (n, s) of structures of all sizes: genes around a mean that is another one for each."""
    rng = np.random.default_rng(seed)
    genes = rng.uniform(0, 30, (count, 1)) + rng.uniform(-8, 8, (count, len(space.genes)))
    chosen = np.array(space.choices)[np.arange(len(space.genes)), np.rint(genes).clip(0, 30).astype(np.int64)]
    fixed = np.array([slot.base for slot in space.fixed], dtype=np.int64)
    return np.concatenate([chosen, np.broadcast_to(fixed, (count, len(fixed)))], axis=1)


def add_structures(space: Space, channels: Ints) -> tuple[list[str], Ints, Ints]:
    """Store structures; their ids, multiply-adds (n,) and parameters (n,)."""
    costs = CostModel(space)
    flops, parameters = costs.flops(channels), costs.parameters(channels)
    ids = [space.digest(row) for row in channels.tolist()]
    common = {"space_key": space.key, "space": space_arguments(space)}
    for start in range(0, len(ids), ROWS):
        part = range(start, min(start + ROWS, len(ids)))
        rows = [
            {"id": ids[i], "channels": channels[i].tolist(), "flops": int(flops[i]), "parameters": int(parameters[i])}
            for i in part
        ]  # fmt: skip
        with transaction() as session:
            insert_missing(session, Structure, [row | common for row in rows])
    return ids, flops, parameters


def _administer(statement: str) -> None:
    server = make_url(os.environ["SECATEURS_TEST_POSTGRES"]).set(database="postgres")
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _forget() -> None:
    get_settings.cache_clear()
    get_engine.cache_clear()
