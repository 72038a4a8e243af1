"""PruningNets over HTTP, and what a job may ask of them."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import broker
from service.store import datasets, pruning_nets
from service.store.models import PruningNet
from service.store.session import transaction

KEYS = [f"{i:064x}" for i in range(5)]
FIDELITY = {
    "job_id": "j", "weights": "generated", "recalibrated": True, "rank_by": "loss", "tau": 0.5, "p_value": 0.01,
    "structures": 24, "epochs": 5,
}  # fmt: skip
REQUEST: dict[str, Any] = {
    "space": "mobilenet_v1", "image_size": 8, "width": 0.25, "dataset": "digits", "effort": "smoke",
    "constraints": [{"metric": "flops", "max": 200_000}],
}  # fmt: skip


@pytest.fixture
def nets(client: TestClient) -> TestClient:
    """Five nets, of which the second half knows another space."""
    with transaction() as session:
        dataset = datasets.get(session, "digits")
        for i, key in enumerate(KEYS):
            session.add(
                PruningNet(
                    key=key, family="f", space_key=f"resnet20@{8 if i < 3 else 16}x1/10", dataset_id=dataset.id,
                    settings={"epochs": 3, "band": [0.6, 1.4] if i else None, "weights": "generated"}, band_low=6.0,
                    band_high=14.0, created_at=float(i), trainer_job_id="j",
                )
            )  # fmt: skip
    return client


def test_a_net_shows_how_far_it_is_and_how_well_it_ranks(nets: TestClient) -> None:
    assert nets.get(f"/v1/pruning-nets/{KEYS[1]}").json() == {
        "key": KEYS[1], "space_key": "resnet20@8x1/10", "dataset": "digits", "band": [6.0, 14.0], "ready": False,
        "settings": {"epochs": 3, "band": [0.6, 1.4], "weights": "generated"}, "trainer_job_id": "j", "epochs": 0,
        "history": [], "fidelity": [], "created_at": 1.0,
    }  # fmt: skip
    assert nets.get(f"/v1/pruning-nets/{KEYS[0]}").json()["band"] is None
    history = [{"epoch": 0, "loss": 2.0, "accuracy": 0.25, "rate": 0.1}]
    with transaction() as session:
        progress = {"counters": {"done": 9, "history": history}}
        session.get_one(PruningNet, KEYS[1]).progress = progress
        pruning_nets.judge(session, KEYS[1], [FIDELITY, FIDELITY | {"tau": None, "p_value": None}])
    net = nets.get(f"/v1/pruning-nets/{KEYS[1]}").json()
    assert (net["epochs"], net["history"]) == (1, history)
    assert net["fidelity"] == [FIDELITY, FIDELITY | {"tau": None, "p_value": None}]


def test_pages_hold_every_net_once_the_newest_first_and_filters_choose(nets: TestClient) -> None:
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(3):
        page = nets.get("/v1/pruning-nets", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [net["key"] for net in page["items"]]
        cursor = page["next"]
    assert cursor is None
    assert seen == KEYS[::-1]
    for query, count in (
        ({"space": "resnet20"}, 5), ({"space": "resnet20@16x1/10"}, 2), ({"space": "resnet2"}, 0),
        ({"dataset": "digits"}, 5),
    ):  # fmt: skip
        assert len(nets.get("/v1/pruning-nets", params=query).json()["items"]) == count, query


def test_what_is_not_there_or_no_key_is_refused(nets: TestClient) -> None:
    answer = nets.get("/v1/pruning-nets/abc")
    assert (answer.status_code, answer.json()["detail"]) == (404, "no PruningNet 'abc'")
    assert nets.get("/v1/pruning-nets/A-B").status_code == 422
    assert nets.get("/v1/pruning-nets", params={"dataset": "nothing"}).status_code == 404
    assert nets.get("/v1/pruning-nets", params={"cursor": "x"}).status_code == 422
    assert nets.get("/v1/pruning-nets", headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_job_asks_for_fidelity_and_the_ablations(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "ring", lambda: True)

    def spec(**changes: Any) -> Any:
        answer = client.post("/v1/jobs", json=REQUEST | changes)
        assert answer.status_code == 202, answer.text
        return answer.json()["spec"]

    plain = spec()
    assert (plain["fidelity"], plain["training"]["weights"]) == ({"structures": 0, "epochs": 1}, "generated")
    assert spec(fidelity={"structures": 24})["fidelity"] == {"structures": 24, "epochs": 1}
    asked = spec(
        fidelity={"structures": 4, "epochs": 7}, retraining={"epochs": 3}, training={"weights": "shared"},
        search={"recalibration_images": 0},
    )  # fmt: skip
    assert asked["fidelity"] == {"structures": 4, "epochs": 7}
    assert asked["training"]["weights"] == "shared"
    assert asked["search"]["recalibration_images"] == 0
    fitted = [spec(effort=effort)["search"]["classifier_images"] for effort in ("smoke", "standard", "paper")]
    assert fitted == [0, 5000, 0]
    trained = [spec(effort=effort)["retraining"] for effort in ("smoke", "standard", "paper")]
    assert [(one["finalists"], one["trial_epochs"]) for one in trained] == [(1, 1), (8, 3), (1, 96)]
    for wrong in (
        {"fidelity": {"structures": 3}}, {"fidelity": {"structures": 201}}, {"fidelity": {"epochs": 0}},
        {"search": {"recalibration_images": 5}}, {"training": {"weights": "none"}}, {"fidelity": 24},
        {"search": {"classifier_images": 5}},
    ):  # fmt: skip
        assert client.post("/v1/jobs", json=REQUEST | wrong).status_code == 422, wrong
