"""The migrated schema is the models' schema, on both databases, and a wrong schema is refused."""

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, inspect, select, text

from service import admin
from service.app import create_app
from service.store import devices, keys
from service.store.models import Base, Measurement, TableFit
from service.store.session import get_engine, transaction

OLD_ROWS = (
    "INSERT INTO devices VALUES ('d', 'bench', '', 'p', 'x', 't', 0, NULL, NULL)",
    "INSERT INTO fingerprints VALUES ('f', 'd', 'sha', '{}', 0)",
    "INSERT INTO lookup_tables (id, device_id, fingerprint_id, created_at) VALUES ('t', 'd', 'f', 0)",
    "INSERT INTO table_fits (table_id, space_key, overhead, slope, fitted_on, held_out, mean_error, max_error, "
    "created_at) VALUES ('t', 's', 1, 2, 8, 8, 0, 0, 0)",
    *(
        'INSERT INTO measurements (table_id, fingerprint_id, kind, key, payload, seconds, iqr, steady, "values", '
        f"conditions, upload_id, created_at) VALUES ('t', 'f', 'layer', '{key}', '{{}}', 2.5, 0, true, '{values}', "
        "'{}', 'u', 0)"
        for key, values in (("layer", "[1, 2, 3, 4, 5]"), ("imported", "[]"))
    ),
)
"""As they are at revision 0003."""


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


def test_what_was_measured_before_has_its_percentile_from_its_values(home: object) -> None:
    admin.migrate(revision="0003")
    with get_engine().begin() as connection:
        for statement in OLD_ROWS:
            connection.execute(text(statement))
    admin.migrate()
    with transaction() as session:
        found = dict(session.execute(select(Measurement.key, Measurement.p90)).all())
        assert session.scalars(select(TableFit.statistic)).one() == "p50"
    assert found == {"layer": pytest.approx(4.6 - 0.5), "imported": None}
    command.downgrade(admin.alembic_config(), "0003")
    with get_engine().connect() as connection:
        assert connection.scalar(text("SELECT slope FROM table_fits")) == 2.0


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
    with transaction() as session:
        _, first = devices.register(session, "d")
    assert admin.main(["new-token", "d"]) == 0
    second = capsys.readouterr().out.strip()
    with transaction() as session:
        assert keys.find_device(session, first) is None
        assert keys.find_device(session, second) is not None
    assert admin.main(["new-token", "nobody"]) == 1
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
