"""What every test of the service stands on: a migrated, empty database of each kind, and a client with a key."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Settings are read while modules are imported (the broker's), so no test may find the user's own folder.
os.environ["SECATEURS_HOME"] = tempfile.mkdtemp(prefix="secateurs-tests-")
for name in ("SECATEURS_DATABASE_URL", "SECATEURS_BROKER_URL", "SECATEURS_DATA_ROOT"):
    os.environ.pop(name, None)

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
"""The same examples in every run; `--hypothesis-profile=default` draws others."""

from fastapi.testclient import TestClient
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from service import admin
from service.app import create_app
from service.settings import get_settings
from service.store import keys
from service.store.models import Base
from service.store.session import get_engine, transaction

POSTGRES = os.environ.get("SECATEURS_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432")
REQUIRED = os.environ.get("SECATEURS_TEST_REQUIRE_SERVERS") == "1"


SLOWEST = ("test_supervisor", "test_job_", "test_up", "test_hostile", "test_scoring", "test_percentile_jobs")
"""Files that take minutes: begun last, one of them would keep one process busy while the others have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first."""
    items.sort(key=lambda item: not item.path.name.startswith(SLOWEST))


def forget() -> None:
    """Close the engine and forget the settings of the test before."""
    if get_engine.cache_info().currsize:
        get_engine().dispose()
    get_engine.cache_clear()
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite database; each test gets a copy."""
    path = tmp_path_factory.mktemp("template") / "secateurs.db"
    admin.migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A migrated PostgreSQL database of this test session."""
    server = create_engine(make_url(POSTGRES).set(database="postgres"), isolation_level="AUTOCOMMIT")
    name = f"secateurs_test_{os.getpid()}"
    try:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {name}"))
            connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    except OperationalError as error:
        if REQUIRED:
            pytest.fail(f"PostgreSQL is required and does not answer at {POSTGRES}: {error}")
        pytest.skip("no PostgreSQL server")
    url = make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    admin.migrate(url)
    yield url
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh home folder, with settings that point there."""
    monkeypatch.setenv("SECATEURS_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a migrated, empty database, which is the one of the settings; of both kinds, unless a file names one."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), home / "secateurs.db")
        return get_settings().database
    url: str = request.getfixturevalue("postgres_url")
    monkeypatch.setenv("SECATEURS_DATABASE_URL", url)
    forget()
    # Deleting a few rows is much faster than TRUNCATE, which makes new files for every table and index.
    with get_engine().begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
    return url


@pytest.fixture
def make_key(database: str) -> Callable[..., str]:
    """Issues API keys."""

    def issue(*scopes: str) -> str:
        with transaction() as session:
            return keys.create_key(session, "test", scopes or ("admin",))[1]

    return issue


@pytest.fixture
def client(make_key: Callable[..., str]) -> Iterator[TestClient]:
    """A client of a running app, with an admin key; `client.headers` may be changed or left out per request."""
    with TestClient(create_app(), headers={"Authorization": f"Bearer {make_key()}"}) as running:
        yield running
