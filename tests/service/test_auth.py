"""Every route under /v1 refuses whoever may not use it."""

from collections.abc import Callable, Iterator

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from service.app import create_app
from service.store import devices, keys
from service.store.session import transaction

OPEN = {"/", "/healthz", "/readyz", "/metrics", "/openapi.json"}


def operations() -> Iterator[tuple[str, str]]:
    for path, methods in create_app().openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path


def fill(path: str) -> str:
    values = {"device": "bench", "space": "vgg16", "dataset": "digits", "artifact": "model.onnx"}
    for name in path.split("{")[1:]:
        parameter = name.partition("}")[0]
        path = path.replace("{" + parameter + "}", values.get(parameter, "0"))
    return path


def statuses(client: TestClient, key: str | None) -> dict[tuple[str, str], int]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    client.headers.pop("Authorization", None)
    return {
        (method, path): client.request(method, fill(path), headers=headers).status_code
        for method, path in operations()
        if path not in OPEN
    }


@pytest.mark.parametrize("kind", ["none", "garbage", "wrong", "revoked"])
def test_without_a_valid_key_nothing_answers(client: TestClient, make_key: Callable[..., str], kind: str) -> None:
    valid = make_key("admin")
    if kind == "revoked":
        with transaction() as session:
            keys.revoke_key(session, valid.split("_")[1])
    key = {"none": None, "garbage": "x", "wrong": valid[:-1] + ("0" if valid[-1] != "0" else "1"), "revoked": valid}
    found = statuses(client, key[kind])
    assert len(found) >= 15
    assert set(found.values()) == {401}


def test_every_route_is_described(client: TestClient) -> None:
    hidden = [route.path for route in client.app.routes if isinstance(route, APIRoute) and not route.include_in_schema]
    assert hidden == []


def test_a_device_token_reaches_its_own_device_only(client: TestClient) -> None:
    with transaction() as session:
        _, token = devices.register(session, "bench")
        _, other = devices.register(session, "other")
    allowed = {operation for operation, status in statuses(client, token).items() if status not in (401, 403)}
    assert allowed == {("POST", "/v1/devices/{device}/leases"), ("POST", "/v1/devices/{device}/measurements")}
    assert set(statuses(client, other).values()) == {403}


def test_scopes(client: TestClient, make_key: Callable[..., str]) -> None:
    reading = statuses(client, make_key("read"))
    changing = {one for one in reading if one[0] != "GET" and "price" not in one[1]}
    assert {operation for operation, status in reading.items() if status == 403} == changing
    agent = {("POST", "/v1/devices/{device}/leases"), ("POST", "/v1/devices/{device}/measurements")}
    refused = {operation for operation, status in statuses(client, make_key("admin")).items() if status == 403}
    assert refused == agent & set(reading)


def test_secrets_are_long_and_not_stored(make_key: Callable[..., str]) -> None:
    first, second = make_key("read"), make_key("read")
    assert first.startswith("sct_")
    assert len(first.split("_")[2]) == 64
    assert first != second
    with transaction() as session:
        stored = keys.find_user(session, first)
        assert stored is not None
        assert first.split("_")[2] not in repr(vars(stored))
        assert keys.find_user(session, "scd" + first[3:]) is None
        assert keys.find_device(session, first) is None


def test_401_says_how(client: TestClient) -> None:
    del client.headers["Authorization"]
    answer = client.get("/v1/jobs")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.headers["Content-Type"] == "application/problem+json"
