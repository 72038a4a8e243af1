"""Hostile values in every field of every route, taken from the service's own description.

No answer is a 5xx, and every refusal is a problem document, on both databases.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from latency_profiler.spaces.registry import get_space
from service.api.problems import Problem
from service.app import create_app
from service.store import devices
from service.store.session import transaction

Schema = dict[str, Any]
TEXTS = [
    "",
    "\0",
    "a\0b",
    "\ud800",
    "a" * 3000,
    "é" * 300,
    "' OR 1=1 --",
    "../../etc/passwd",
    "%",
    "_",
    "null",
    "\r\nX: y",
    "🦎",
]
NUMBERS = [
    -1, 0, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 0.5,
    float("nan"), float("inf"), float("-inf"), True,
]  # fmt: skip
GOOD_COUNTS = {"max": 10**9, "min": 0, "image_size": 32}
GENES = len(get_space("resnet20", free_last=True).genes)
OWN: dict[str, Schema] = {
    "/v1/spaces/{space}/price": {"encoding": [3] * GENES, "channels": None, "devices": []},
    "/v1/devices/{device}/profiles": {"mode": "sampled", "points": 4},
    "/v1/devices/{device}/lookup-table/proxylessnas": {
        "table": {"Conv-input:224x224x3-output:112x112x32": {"mean": 1.0, "count": 10}}
    },
    "/v1/devices/{device}/lookup-table": {
        "networks": [
            {
                "key": "s|0|fit",
                "space_key": "s",
                "channels": [8],
                "purpose": "fit",
                "seconds": 1.0,
                "p90": 1.0,
                "iqr": 0.0,
                "steady": True,
                "values": [1.0],
                "conditions": {"loops": 1},
            }
        ]
    },
    "/v1/devices/{device}/leases": {"fingerprint": {"cpu": "fast"}},
    "/v1/devices/{device}/measurements": {"fingerprint": "0" * 64},
    "/v1/jobs": {
        "measure_on": [],
        "training": {"band": [0.5, 1.5], "weight_decay": 0.001},
        "search": {"recalibration_images": 100},
        "compare_with": [],
        "start": None,
        "collaborative": {"images": 100, "ratios": None},
        "magnitude": {"scan": False, "qualities": {}},
    },
}
"""Right values that the description cannot tell."""
DEEP = "[" * 30_000 + "]" * 30_000
NESTED: list[Any] = [json.loads('{"a": ' + "[" * depth + "]" * depth + "}") for depth in (32, 260, 700)]
SHAPES: list[Any] = [None, [], {}, [[]], {"a": 1}, [None] * 2000, "x", 1, *NESTED]
VALUES = {
    "path": ["%00", "%ed%a0%80", "a" * 3000, "..%2f..%2fx", "-1", "%20", quote("🦎"), "'", "nan", "9" * 400, "0"],
    "query": ["", "\0", "a" * 3000, "-1", "0", "9" * 30, "9" * 5000, "nan", "inf", "1e400", "'", "🦎", "[1]", "true"],
    "header": ["", "a" * 3000, "-1", "9" * 30, "é".encode(), b"\xff\xfe", "nan"],
}


@pytest.fixture
def agent(client: TestClient) -> str:
    """What the agent of `bench` sends for its identity."""
    with transaction() as session:
        return "Bearer " + devices.register(session, "bench")[1]


def check(answer: Any, sent: str) -> None:
    assert answer.status_code < 500, (answer.status_code, sent, answer.text[:300])
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json", sent
        assert Problem.model_validate(answer.json()).status == answer.status_code


def operations() -> Iterator[tuple[str, str, Schema]]:
    """Every operation but the endless stream of events, whose parameters are tried by hand."""
    for path, methods in create_app().openapi()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def good(name: str) -> str:
    values = {"space": "resnet20", "device": "bench", "dataset": "digits", "artifact": "structure.json"}
    return values.get(name, "0" * 32)


def fill(path: str, changed: str = "", value: str = "") -> str:
    for part in path.split("{")[1:]:
        name = part.partition("}")[0]
        path = path.replace("{" + name + "}", value if name == changed else good(name))
    return path


def test_parameters(client: TestClient, agent: str) -> None:
    tried = 0
    for method, path, operation in operations():
        required = {
            one["name"]: good(one["name"])
            for one in operation.get("parameters", [])
            if one["in"] == "query" and one.get("required")
        }
        for parameter in operation.get("parameters", []):
            name, place = parameter["name"], parameter["in"]
            for value in VALUES[place]:
                query = required | ({name: value} if place == "query" else {})
                headers = {name: value} if place == "header" else {}
                headers |= {"Authorization": agent} if "agents" in operation["tags"] else {}
                where = fill(path, name, str(value)) if place == "path" else fill(path)
                check(
                    client.request(method, where, params=query, headers=headers),
                    f"{method} {path} {name}={value!r:.50}",
                )
                tried += 1
    assert tried > 400


def resolve(schema: Schema, root: Schema) -> Schema:
    """The schema behind references and behind the first real alternative."""
    while True:
        if "$ref" in schema:
            schema = root["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        elif "anyOf" in schema or "oneOf" in schema:
            schema = next(one for one in schema.get("anyOf", schema.get("oneOf")) if one.get("type") != "null")
        else:
            return schema


def example(schema: Schema, root: Schema, name: str = "") -> Any:
    """A value that looks right."""
    schema = resolve(schema, root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            return {key: example(one, root, key) for key, one in schema.get("properties", {}).items()}
        case "array":
            items = schema.get("prefixItems") or [schema.get("items", {})]
            return [example(one, root, name) for one in items]
        case "integer":
            return min(GOOD_COUNTS.get(name, 10), schema.get("maximum", 10**9))
        case "number":
            return 0.5
        case "boolean":
            return True
        case _:
            return good(name)[: schema.get("maxLength", 32)]


def merge(body: Schema, own: Schema) -> None:
    for name, value in own.items():
        if isinstance(value, dict) and body[name]:
            merge(body[name], value)
        else:
            body[name] = value


def values(old: Any) -> list[Any]:
    """What is put in the place of a value: all that is hostile to its type, and one of each other."""
    own = {str: TEXTS, int: NUMBERS, float: NUMBERS}.get(type(old), SHAPES)
    return [*own, TEXTS[1], NUMBERS[6], *SHAPES[:2]]


def fields(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The places of all values in a body, and the values."""
    yield at, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from fields(child, (*at, key))


def replaced(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    body = copy.deepcopy(body)
    inner = body
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return body


def test_bodies(client: TestClient, agent: str) -> None:
    document = create_app().openapi()
    tried, baseline = 0, {}
    for method, path, operation in operations():
        if "requestBody" not in operation:
            continue
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": agent} if "agents" in operation["tags"] else {}
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        body = example(schema, document)
        merge(body, OWN.get(path, {}))
        baseline[path] = client.request(method, fill(path), json=body, headers=headers).status_code
        texts = [json.dumps(replaced(body, at, value)) for at, old in fields(body) for value in values(old)]
        texts += [json.dumps(body).replace("{", '{"\\u0000": 1, "\\ud800": 2, ', 1)]
        texts += [DEEP, "9" * 5000, "NaN", "\0", ""]
        for text in texts:
            check(client.request(method, fill(path), content=text, headers=headers), f"{method} {path} {text:.300}")
            tried += 1
            if method == "POST" and path.endswith("/leases"):
                assert client.get("/v1/devices").status_code == 200, f"what was taken can be shown: {text:.300}"
        check(client.request(method, fill(path), content=b'{"name": "\xff"}', headers=headers), path)
    assert tried > 400
    assert {path for path, status in baseline.items() if status >= 300} == {
        "/v1/datasets", "/v1/devices/{device}/measurements",
    }, baseline  # fmt: skip
