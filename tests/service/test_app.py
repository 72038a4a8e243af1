from fastapi.testclient import TestClient


def test_health_needs_no_key(client: TestClient) -> None:
    del client.headers["Authorization"]
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "database": "ok", "broker": "not asked yet"}
    text = client.get("/metrics").text
    assert 'secateurs_jobs{state="queued"} 0.0' in text
    assert 'secateurs_requests_total{method="GET",route="/healthz",status="200"}' in text
