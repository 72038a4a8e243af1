"""Datasets over HTTP."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.settings import get_settings


def write_npz(name: str, images: int = 40) -> Path:
    draw = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    for split in ("train", "test"):
        splits[f"{split}_images"] = draw.integers(0, 256, (images, 8, 8, 3)).astype(np.uint8)
        splits[f"{split}_labels"] = draw.permutation(np.arange(images) % 4)[:, None]
    path = get_settings().data / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **splits)
    return path


def test_digits_are_built_in(client: TestClient) -> None:
    digits = client.get("/v1/datasets/digits").json()
    assert digits["classes"] == 10
    assert digits["train_images"] + digits["test_images"] == 1797
    assert [item["name"] for item in client.get("/v1/datasets").json()["items"]] == ["digits"]


def test_own_images_are_inspected_and_named_once(client: TestClient) -> None:
    write_npz("mine.npz")
    body = {"name": "mine", "kind": "npz", "path": "mine.npz"}
    made = client.post("/v1/datasets", json=body)
    assert made.status_code == 201, made.text
    assert (made.json()["classes"], made.json()["train_images"], made.json()["image_size"]) == (4, 40, 8)
    assert client.get("/v1/datasets/mine").json() == made.json()
    again = client.post("/v1/datasets", json=body)
    assert (again.status_code, again.json()["type"]) == (409, "urn:secateurs:already-exists")
    pages = client.get("/v1/datasets", params={"limit": 1}).json()
    assert client.get("/v1/datasets", params={"cursor": pages["next"]}).json()["items"] == [made.json()]


@pytest.mark.parametrize("path", ["missing.npz", "../outside.npz", "/etc/passwd", ".", "a\nb", "x" * 400])
def test_what_cannot_be_read_is_refused(client: TestClient, path: str) -> None:
    answer = client.post("/v1/datasets", json={"name": "mine", "kind": "npz", "path": path})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/datasets/mine").status_code == 404
