"""The best under a budget and the fronts are those of a full scan, found without one."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, insert, text, update

from latency_profiler.spaces.registry import get_space
from service.settings import get_settings
from service.specs import JobRequest
from service.store import candidates, datasets, devices, jobs, measurements, results, structures
from service.store.blobs import blob_path, register
from service.store.candidates import Judged, record_generation
from service.store.models import (
    Candidate,
    LookupTable,
    Measurement,
    Result,
    Role,
    Structure,
    StructureLatency,
    WorkKind,
)
from service.store.session import get_engine, snapshot, transaction
from service.store.structures import Budget, Hit

SPACES = [get_space("resnet20", size, 1.0, 10, True) for size in (8, 16)]
KEYS = [space.key for space in SPACES]
BENCH = {"space": "resnet20", "dataset": "digits"}


def fill(rows: int, seed: int = 0) -> tuple[str, list[dict[str, Any]]]:
    """Random candidates of four jobs in two spaces, many of them equal; returns the dataset's id."""
    draw = random.Random(seed)
    with transaction() as session:
        device, _ = devices.register(session, "bench")
        dataset = datasets.find(session, "digits") or datasets.add(
            session, "digits", "digits", None, classes=10, image_size=8, train_images=9, test_images=9
        )
        request = JobRequest(space="resnet20", dataset="digits", constraints=[{"metric": "flops", "max": 10**9}])
        made = [
            jobs.submit(session, request, space_key=KEYS[i % 2], dataset_id=dataset.id, created_by=None).id
            for i in range(4)
        ]
        kinds = [
            {
                "id": f"{i % 2}{i:031x}",
                "space_key": KEYS[i % 2],
                "flops": draw.randrange(1000),
                "parameters": draw.randrange(1000),
            }
            for i in range(rows // 2)
        ]
        spaces = [candidates.space_arguments(space) for space in SPACES]
        session.execute(
            insert(Structure), [kind | {"space": spaces[i % 2], "channels": [1]} for i, kind in enumerate(kinds)]
        )
        latencies = [
            {
                "structure_id": kind["id"],
                "device_id": device.id,
                "prices": "now",
                "seconds": draw.randrange(1, 1000) / 1000,
                "p90": draw.randrange(1, 1000) / 1000,
            }
            for kind in kinds[: rows // 3]
        ]
        session.execute(insert(StructureLatency), latencies)
        priced = {row["structure_id"]: row for row in latencies}
        found = []
        for n in range(rows):
            i = draw.randrange(len(kinds))
            found.append(
                {
                    "id": n + 1, "job_id": made[i % 2 + 2 * draw.randrange(2)], "structure_id": kinds[i]["id"],
                    "space_key": KEYS[i % 2], "dataset_id": dataset.id, "generation": 0, "position": n, "encoding": [],
                    "encoding_key": str(n), "flops": kinds[i]["flops"], "parameters": kinds[i]["parameters"],
                    "latencies": {}, "proxy_accuracy": draw.randrange(40) / 40, "proxy_loss": 1.0, "birth": "random",
                    "parents": [],
                }
            )  # fmt: skip
        session.execute(insert(Candidate), found)
    none = {"seconds": None, "p90": None}
    return dataset.id, [
        row | {name: priced.get(row["structure_id"], none)[name] for name in none} for row in found
    ]  # fmt: skip


def scan(rows: list[dict[str, Any]], keys: list[str], budget: Budget, limit: int) -> list[Hit]:
    """The same answer by looking at every row."""
    allowed = [
        Hit(row["proxy_accuracy"], row["flops"], row["id"], row["structure_id"])
        for row in rows
        if row["space_key"] in keys
        and (budget.flops is None or row["flops"] <= budget.flops)
        and (budget.parameters is None or row["parameters"] <= budget.parameters)
        and all(
            (value := row["p90" if name.endswith(":p90") else "seconds"]) is not None and value <= most
            for name, most in budget.latencies.items()
        )
    ]
    allowed.sort(key=lambda hit: (-hit.accuracy, hit.flops, hit.found))
    best: dict[str, Hit] = {}
    for hit in allowed:
        best.setdefault(hit.structure_id, hit)
    return list(best.values())[:limit]


def test_best_is_that_of_a_full_scan(database: str) -> None:
    dataset_id, rows = fill(3000)
    draw = random.Random(1)
    with snapshot() as session:
        device_id = structures.device_ids(session, ["bench"])["bench"]
        for _ in range(40):
            keys = draw.choice([KEYS, KEYS[:1], []])
            budget = Budget(
                draw.choice([None, 0, 5, 50, 500]), draw.choice([None, 20, 500]),
                draw.choice([{}, {device_id: 0.02}, {device_id: 0.5}, {f"{device_id}:p90": 0.3}]),
            )  # fmt: skip
            limit = draw.choice([1, 10, 200])
            found = structures.best_candidates(session, keys, dataset_id, budget, limit)
            assert found == scan(rows, keys, budget, limit), (keys, budget, limit)


@pytest.mark.parametrize("cost", ["flops", "parameters", "seconds", "p90"])
def test_fronts_are_those_of_a_full_scan(database: str, cost: str) -> None:
    dataset_id, rows = fill(2000)
    priced = sorted((row for row in rows if row[cost] is not None), key=lambda row: (row[cost], -row["proxy_accuracy"]))
    expected: list[tuple[float, float]] = []
    for row in priced:
        if not expected or row["proxy_accuracy"] > expected[-1][0]:
            expected.append((row["proxy_accuracy"], row[cost]))
    with snapshot() as session:
        device_id = structures.device_ids(session, ["bench"])["bench"]
        name = {"seconds": device_id, "p90": f"{device_id}:p90"}.get(cost, cost)
        points = structures.front(session, KEYS, dataset_id, name)
    assert [(point.accuracy, point.cost) for point in points] == expected


def test_neither_reads_the_table_of_candidates(database: str) -> None:
    dataset_id, _ = fill(5000)
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(get_engine(), "before_cursor_execute", note)
    with snapshot() as session:
        structures.best_candidates(session, KEYS, dataset_id, Budget(flops=500), 10)
        structures.front(session, KEYS, dataset_id, "flops")
    event.remove(get_engine(), "before_cursor_execute", note)
    with get_engine().begin() as connection:
        connection.execute(text("ANALYZE"))
        explain = "EXPLAIN QUERY PLAN " if database.startswith("sqlite") else "EXPLAIN "
        queries = [one for one in statements if "FROM candidates" in one[0].replace("\n", " ")]
        assert len(queries) > 4
        for statement, parameters in queries:
            plan = "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
            assert "SCAN candidates" not in plan, plan
            assert "Seq Scan" not in plan, plan
            assert "ix_candidates" in plan, plan


def test_where_a_structure_was_met_is_told_from_the_best_down(database: str) -> None:
    _, rows = fill(12)
    met = [row for row in rows if row["structure_id"] == rows[0]["structure_id"]]
    met.sort(key=lambda row: (-row["proxy_accuracy"], row["id"]))
    assert len({row["proxy_accuracy"] for row in met}) > 1
    with snapshot() as session:
        found = structures.sightings(session, rows[0]["structure_id"])
        [best] = structures.sightings(session, rows[0]["structure_id"], 1)
    assert [(one.id, name) for one, name in found] == [(row["id"], "digits") for row in met]
    assert best[0].id == met[0]["id"]


def search(client: TestClient) -> tuple[dict[str, Any], list[Judged]]:
    """One job with a generation of candidates."""
    job = client.post(
        "/v1/jobs",
        json={
            "space": "resnet20", "image_size": 8, "dataset": "digits", "effort": "smoke",
            "constraints": [{"metric": "flops", "max": 10**7}],
        },
    ).json()  # fmt: skip
    space = SPACES[0]
    judged = [
        Judged(
            (i,) * len(space.genes),
            "random",
            (),
            1000 + i,
            50 - i,
            {"bench": 0.001 * (i + 1), "bench:p90": 0.002 * (i + 1)},
            i / 10,
            1.0,
        )
        for i in range(10)
    ]
    with transaction() as session:
        device, _ = devices.register(session, "bench")
        row = jobs.get(session, job["id"])
        record_generation(session, row, space, 2, judged, {"bench": device.id})
    return job, judged


def test_best_over_http(client: TestClient) -> None:
    job, judged = search(client)
    query: dict[str, Any] = {**BENCH, "device": ["bench"], "max_latency_ms": [5.0], "limit": 2}
    items = client.get("/v1/structures/best", params=query).json()["items"]
    expected = [list(SPACES[0].channels(judged[i].encoding)) for i in (4, 3)]
    assert [item["channels"] for item in items] == expected
    assert [list(SPACES[0].channels(item["encoding"])) for item in items] == expected
    assert items[0]["predicted_ms"] == {"bench": pytest.approx(5.0), "bench:p90": pytest.approx(10.0)}
    tail = client.get("/v1/structures/best", params=query | {"statistic": "p90"}).json()["items"]
    assert [item["channels"] for item in tail] == [list(SPACES[0].channels(judged[i].encoding)) for i in (1, 0)]
    assert (items[0]["job_id"], items[0]["generation"], items[0]["test_accuracy"]) == (job["id"], 2, None)
    for more, count in (
        ({"space": job["space_key"]}, 10), ({"image_size": 8}, 10), ({"image_size": 16}, 0), ({"width": 1.0}, 10),
        ({"width": 0.5}, 0), ({"max_flops": 1003}, 4), ({"max_parameters": 41}, 1), ({"accuracy": "test"}, 0),
    ):  # fmt: skip
        found = client.get("/v1/structures/best", params={**BENCH, "limit": 50, **more}).json()["items"]
        assert len(found) == count, more
    assert client.get("/v1/structures/best", params={**BENCH, "device": ["bench"]}).status_code == 422
    assert client.get("/v1/structures/best", params={**BENCH, "space": "nothing"}).status_code == 404
    assert client.get("/v1/structures/best", params={**BENCH, "dataset": "nothing"}).status_code == 404
    unknown = {**BENCH, "device": ["nothing"], "max_latency_ms": [1]}
    assert "bench" in client.get("/v1/structures/best", params=unknown).json()["detail"]


def test_what_was_measured_above_a_bound_is_not_the_answer(client: TestClient) -> None:
    job, judged = search(client)
    channels = [list(SPACES[0].channels(one.encoding)) for one in judged]
    space, bound = SPACES[0], {"device": ["bench"], "max_latency_ms": [5.0]}
    with transaction() as session:
        device = devices.get(session, "bench")
        table = session.get_one(LookupTable, measurements.open_table(session, device, {}))
        measurements.switch(session, device, table.id)
        for i, seconds in ((4, 0.0051), (6, 0.0049)):
            session.add(
                Measurement(
                    table_id=table.id, fingerprint_id=table.fingerprint_id, kind=WorkKind.NETWORK, payload={},
                    key=f"{space.key}|{space.digest(channels[i])}|verify", seconds=seconds, iqr=0.0, steady=True,
                    values=[], conditions={}, upload_id="0",
                )
            )  # fmt: skip
            results.record(
                session, jobs.get(session, job["id"]), space, channels[i], Role.WINNER,
                test_accuracy=0.7, test_loss=1.0, settings={}, measured={"bench": 0.001},
            )  # fmt: skip
    items = client.get("/v1/structures/best", params={**BENCH, **bound}).json()["items"]
    assert [item["channels"] for item in items] == [channels[i] for i in (6, 3, 2, 1, 0)]
    assert (items[0]["measured_ms"], items[0]["predicted_ms"]["bench"]) == (pytest.approx({"bench": 4.9}), 7.0)
    tested = client.get("/v1/structures/best", params={**BENCH, **bound, "accuracy": "test"}).json()["items"]
    assert [item["channels"] for item in tested] == [channels[6]]


def test_fronts_over_http(client: TestClient) -> None:
    search(client)
    front = client.get("/v1/structures/pareto", params={**BENCH, "device": "bench"}).json()
    assert (front["metric"], front["device"]) == ("latency", "bench")
    assert [item["proxy_accuracy"] for item in front["items"]] == [i / 10 for i in range(10)]
    front = client.get("/v1/structures/pareto", params={**BENCH, "metric": "parameters"}).json()
    assert [item["proxy_accuracy"] for item in front["items"]] == [0.9]
    both = client.get("/v1/structures/pareto", params={**BENCH, "metric": "flops", "device": "bench"})
    assert both.status_code == 422


def test_a_front_is_of_the_statistic_that_is_asked_for(client: TestClient) -> None:
    search(client)
    with transaction() as session:
        session.execute(update(StructureLatency).values(p90=None))
    for statistic, count in (("p50", 10), ("p90", 0)):
        asked = {**BENCH, "device": "bench", "statistic": statistic}
        assert len(client.get("/v1/structures/pareto", params=asked).json()["items"]) == count


def test_a_training_on_another_dataset_is_not_shown(client: TestClient) -> None:
    job, judged = search(client)
    best = SPACES[0].channels(judged[9].encoding)
    with transaction() as session:
        facts = {"classes": 10, "image_size": 8, "train_images": 9, "test_images": 9}
        other = datasets.add(session, "other", "digits", None, **facts)
        about = {"job_id": job["id"], "structure_id": SPACES[0].digest(best), "dataset_id": other.id}
        session.add(Result(**about, role=Role.WINNER, test_accuracy=0.9, test_loss=1.0, settings={}))
    [item] = client.get("/v1/structures/best", params={**BENCH, "limit": 1}).json()["items"]
    assert (item["channels"], item["test_accuracy"]) == (list(best), None)


def test_a_trained_structure_and_its_files(client: TestClient) -> None:
    job, judged = search(client)
    content = b"weights of the network"
    path = keep_file(content)
    sha256 = path.name
    assert path.is_relative_to(get_settings().blobs)
    space = SPACES[0]
    with transaction() as session:
        register(session, sha256)
        results.record(
            session, jobs.get(session, job["id"]), space, space.channels(judged[2].encoding), Role.WINNER,
            proxy_accuracy=0.2, test_accuracy=0.75, test_loss=1.0, settings={}, weights=sha256,
            measured={"bench": 0.002},
        )  # fmt: skip
    [item] = client.get("/v1/structures/best", params={**BENCH, "accuracy": "test"}).json()["items"]
    assert (item["test_accuracy"], item["role"], item["measured_ms"]) == (0.75, "winner", {"bench": 2.0})
    structure = client.get(f"/v1/structures/{item['structure_id']}").json()
    assert structure["sightings"] == [
        {"job_id": job["id"], "dataset": "digits", "generation": 2, "proxy_accuracy": 0.2}
    ]
    assert structure["results"][0]["artifacts"] == ["weights.safetensors"]
    assert set(structure["artifacts"]) == {"structure.json", "weights.safetensors"}
    where = structure["artifacts"]["weights.safetensors"]
    answer = client.get(where)
    assert answer.content == content
    assert hashlib.sha256(answer.content).hexdigest() in answer.headers["ETag"]
    assert client.get(where, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert client.get(where, params={"job": "0"}).status_code == 404
    assert client.get(where.replace("weights.safetensors", "model.onnx")).status_code == 404
    described = client.get(structure["artifacts"]["structure.json"]).json()
    assert described["channels"] == list(space.channels(judged[2].encoding))
    assert client.get("/v1/structures/0").status_code == 404
    path.unlink()
    assert client.get(where).status_code == 404


def keep_file(content: bytes) -> Path:
    path = blob_path(hashlib.sha256(content).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_file_is_that_of_the_method_that_is_asked_for_or_of_the_best(client: TestClient) -> None:
    job, judged = search(client)
    channels = SPACES[0].channels(judged[2].encoding)
    with transaction() as session:
        for method, accuracy in (("metapruning", 0.7), ("magnitude", 0.8)):
            register(session, weights := keep_file(method.encode()).name)
            results.record(
                session, jobs.get(session, job["id"]), SPACES[0], channels, Role.WINNER, method=method,
                test_accuracy=accuracy, test_loss=1.0, settings={}, weights=weights,
            )  # fmt: skip
    where = f"/v1/structures/{SPACES[0].digest(channels)}/artifacts/weights.safetensors"
    asked: list[dict[str, str]] = [{"method": "metapruning"}, {"method": "magnitude"}, {}]
    assert [client.get(where, params=one).text for one in asked] == ["metapruning", "magnitude", "magnitude"]
    assert client.get(where, params={"method": "interspace"}).status_code == 404


def test_winners_of_several_methods_stand_side_by_side(client: TestClient) -> None:
    job, judged = search(client)
    space, channels = SPACES[0], SPACES[0].channels(judged[2].encoding)
    masked = {"kept": 30, "sparse_flops": 100}
    rows: list[tuple[str, float, dict[str, int] | None]] = [
        ("metapruning", 0.7, None), ("magnitude", 0.8, masked), ("interspace", 0.6, {"kept": 31, "sparse_flops": 99}),
    ]  # fmt: skip
    with transaction() as session:
        for method, accuracy, pruned in rows:
            results.record(
                session, jobs.get(session, job["id"]), space, channels, Role.WINNER, method=method, pruned=pruned,
                test_accuracy=accuracy, test_loss=1.0, settings={},
            )  # fmt: skip

    def methods(**bounds: Any) -> list[str]:
        answer = client.get("/v1/structures/best", params={**BENCH, "accuracy": "test", **bounds})
        return [item["method"] for item in answer.json()["items"]]

    assert methods() == ["magnitude", "metapruning", "interspace"]
    assert methods(method=["metapruning", "interspace"]) == ["metapruning", "interspace"]
    assert methods(max_sparse_flops=100) == ["magnitude", "interspace"]
    assert methods(max_kept=30) == ["magnitude"]
    assert methods(max_kept=10**9) == methods(max_sparse_flops=10**9) == methods(), "what is dense keeps everything"
    [best, *_] = client.get("/v1/structures/best", params={**BENCH, "accuracy": "test"}).json()["items"]
    assert best["pruned"] == masked
    shown = client.get(f"/v1/structures/{best['structure_id']}").json()
    assert [one["test_accuracy"] for one in shown["results"]] == [0.8, 0.7, 0.6]
    assert client.get("/v1/structures/best", params={**BENCH, "max_kept": 30}).status_code == 422
