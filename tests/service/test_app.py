"""Health, metrics, logs, and what the service must not load."""

import json
import logging
import subprocess
import sys
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from service.api import health
from service.store import devices
from service.store.session import get_engine, takes_writes, transaction


def test_health_needs_no_key(client: TestClient) -> None:
    del client.headers["Authorization"]
    root = client.get("/").json()
    assert all(client.get(root[name]).status_code == 200 for name in ("contract", "health"))
    assert "README" in root["how"]
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "database": "ok", "broker": "not asked yet"}


def test_a_database_that_takes_no_writes_is_not_ready(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes_writes()
    monkeypatch.setattr(health, "takes_writes", lambda: False)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_postgresql_that_stands_by_is_answered_by_503(client: TestClient) -> None:
    def stand_by(connection: Any, _record: object) -> None:
        connection.execute("SET default_transaction_read_only = on")
        connection.commit()

    event.listen(get_engine(), "connect", stand_by)
    get_engine().dispose()
    assert not takes_writes()
    for answer in (client.post("/v1/devices", json={"name": "d"}), client.get("/readyz")):
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:secateurs:database-unavailable")
    assert client.get("/v1/devices").json()["items"] == []


def test_metrics_count_what_is_stored_and_asked(client: TestClient) -> None:
    with transaction() as session:
        device, _ = devices.register(session, "bench")
        devices.register(session, "away")
        devices.beat(session, device)
    client.get("/v1/jobs/0")
    del client.headers["Authorization"]
    text = client.get("/metrics").text
    for line in (
        'secateurs_jobs{state="queued"} 0.0',
        'secateurs_devices{agent="fresh"} 1.0',
        'secateurs_devices{agent="never"} 1.0',
        "secateurs_candidates 0.0",
        "secateurs_oldest_claimable_seconds 0.0",
        'secateurs_requests_total{method="GET",route="/v1/jobs/{job}",status="404"}',
    ):
        assert line in text, line
    assert "bench" not in text


def test_every_request_leaves_one_line_of_json_without_its_secrets(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "secateurs.access"):
        answer = client.get("/v1/jobs/0%0A1", headers={"X-Request-ID": "mine"})
    [record] = [record for record in caplog.records if record.name == "secateurs.access"]
    facts = json.loads(record.getMessage())
    assert "\n" not in record.getMessage()
    assert facts["route"] == "/v1/jobs/{job}"
    assert (facts["request"], facts["status"], facts["method"]) == ("mine", answer.status_code, "GET")
    assert client.headers["Authorization"].split("_")[2] not in caplog.text


def test_no_torch() -> None:
    code = "import sys, service.app; service.app.create_app(); print('torch' in sys.modules, 'sklearn' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
