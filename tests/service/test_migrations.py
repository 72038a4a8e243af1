"""The migrated schema is the models' schema, on both databases, and a wrong schema is refused."""

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, inspect, text

from service import admin
from service.app import create_app
from service.store import keys
from service.store.models import Base
from service.store.session import get_engine, transaction


def test_models_and_migrations_agree(database: str) -> None:
    command.check(admin.alembic_config())
    assert set(inspect(get_engine()).get_table_names()) == {"alembic_version", *Base.metadata.tables}


def test_up_and_down_and_up(home: object) -> None:
    admin.migrate()
    with transaction() as session:
        keys.create_key(session, "kept", ["read"])
    command.downgrade(admin.alembic_config(), "base")
    assert inspect(get_engine()).get_table_names() == ["alembic_version"]
    admin.migrate()
    admin.check_schema()


def test_an_old_schema_is_refused(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    with get_engine().begin() as connection:
        head = connection.scalar(text("SELECT version_num FROM alembic_version"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    try:
        with pytest.raises(admin.SchemaMismatch, match="0000"), TestClient(create_app()):
            pass
        assert admin.main(["check"]) == 1
        assert "python -m service.admin migrate" in capsys.readouterr().err
        assert TestClient(create_app()).get("/readyz").status_code == 503
    finally:
        with get_engine().begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :head"), {"head": head})


def test_commands(home: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert admin.main(["check"]) == 1
    assert admin.main(["migrate"]) == 0
    assert admin.main(["check"]) == 0
    capsys.readouterr()
    assert admin.main(["create-key", "--name", "me", "--scope", "submit"]) == 0
    secret = capsys.readouterr().out.strip()
    with transaction() as session:
        found = keys.find_user(session, secret)
        assert found is not None
        assert found.digest not in secret
    assert admin.main(["revoke-key", secret.split("_")[1]]) == 0
    assert admin.main(["revoke-key", "nothing"]) == 1
    assert "no key 'nothing'" in capsys.readouterr().err
    with transaction() as session:
        assert keys.find_user(session, secret) is None


def test_a_dead_database_is_one_line(
    home: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "get_engine", lambda: create_engine("postgresql://nobody@127.0.0.1:1/none"))
    assert admin.main(["check"]) == 1
    assert capsys.readouterr().err.startswith("the database does not answer")
