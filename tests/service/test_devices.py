"""Devices over HTTP: registration, tokens, profiles, leases, uploads, tables."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from latency_profiler.calibration import NETWORKS
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, Fit, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from service import broker
from service.store import devices, jobs
from service.store.measurements import canonical_sha
from service.store.models import Base, Dataset, Job, JobState, Work
from service.store.session import get_engine, transaction

FACTS = {"cpu": "test", "threads": 1}
PROFILE = {"space": "vgg16", "image_size": 8, "width": 0.25, "classes": 10, "points": 3}
SPACE = get_space("vgg16", 8, 0.25, 10, free_last=True)


@pytest.fixture(autouse=True)
def rings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The doorbell's rings, none of which reaches a broker."""
    heard: list[bool] = []
    monkeypatch.setattr(broker, "ring", lambda: heard.append(True))
    return heard


def register(client: TestClient, name: str = "bench") -> dict[str, str]:
    """Headers of the agent of a new device."""
    answer = client.post("/v1/devices", json={"name": name, "description": "on the desk"})
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['token']}"}


def lease(client: TestClient, agent: dict[str, str], facts: dict[str, Any] = FACTS, limit: int = 500) -> Any:
    body = {"fingerprint": facts, "agent": "0.1", "limit": limit}
    return client.post("/v1/devices/bench/leases", json=body, headers=agent)


def result(item: dict[str, Any]) -> dict[str, Any]:
    nodes = item["payload"].get("nodes") or [item["payload"]]
    layers = [Layer.from_json(node["layer"]) for node in nodes]
    seconds = sum(1e-6 * (1 + layer.c_out) for layer in layers)
    return {
        "work_id": item["work_id"], "kind": item["kind"], "key": item["key"], "seconds": seconds, "iqr": 0.0,
        "steady": True, "values": [seconds], "conditions": {"loops": 3},
    }  # fmt: skip


def upload(client: TestClient, agent: dict[str, str], results: list[Any], upload_id: str = "u1", **changes: Any) -> Any:
    body = {"upload_id": upload_id, "lease_id": "l", "fingerprint": canonical_sha(FACTS), "results": results}
    return client.post("/v1/devices/bench/measurements", json=body | changes, headers=agent)


def waiting_job(state: JobState) -> str:
    """A job that waits for a device named bench, far into the future."""
    with transaction() as session:
        dataset = session.scalars(select(Dataset)).first()
        assert dataset is not None
        spec = {"constraints": [{"metric": "latency", "device": "bench", "max_ms": 1.0}], "measure_on": []}
        job = Job(spec=spec, space_key=SPACE.key, dataset_id=dataset.id, seed=0, state=state, run_after=4e9)
        session.add(job)
        session.flush()
        return job.id


def test_a_device_from_registration_to_its_table(client: TestClient, rings: list[bool]) -> None:
    agent = register(client)
    before = client.get("/v1/devices/bench").json()
    assert (before["alive"], before["fingerprint"], before["table"]) == (False, None, None)
    planned = client.post("/v1/devices/bench/profiles", json=PROFILE)
    assert planned.status_code == 202
    layers, networks = len(plan_layers(SPACE, 3)), sum(NETWORKS.values())
    count = layers + networks
    assert (planned.json()["planned"], planned.json()["waiting"], planned.json()["fit"]) == (count, count, None)
    job_id = waiting_job(JobState.PROFILING)
    leased = lease(client, agent).json()
    assert (len(leased["items"]), leased["poll_seconds"], leased["lease_seconds"]) == (count, 1.0, 60.0)
    assert rings == [True], "a new table"
    rings.clear()
    middle = client.get("/v1/devices/bench/profiles").json()["items"][0]
    assert (middle["done"], middle["waiting"], middle["seconds_left"]) == (0, count, None)
    results = [result(item) for item in leased["items"]]
    assert upload(client, agent, results[:1], "u0").json()["stored"] == 1
    assert upload(client, agent, results[1:-1]).json() == {
        "stored": count - 2, "repeated": 0, "failed": 0, "ignored": 0,
    }  # fmt: skip
    assert rings == []
    assert client.get("/v1/devices/bench/profiles").json()["items"][0]["seconds_left"] > 0
    with transaction() as session:
        session.execute(text("UPDATE jobs SET run_after = 4e9"))
    assert upload(client, agent, results[-1:], "u2").json()["stored"] == 1
    with transaction() as session:
        assert jobs.get(session, job_id).run_after == 0
    assert rings == [True], "the profile is complete"
    after = client.get("/v1/devices/bench").json()
    assert after["alive"]
    assert after["fingerprint"] == {"sha256": canonical_sha(FACTS), "facts": FACTS}
    assert (after["measured"], after["waiting"], after["leased"], after["failed"]) == (count, 8, 0, 0)
    table = after["table"]
    assert (table["entries"], table["networks"]) == (layers, networks)
    every = len(plan_layers(SPACE))
    assert table["spaces"] == [
        {"space_key": SPACE.key, "layers": every, "measured": layers, "interpolated": every - layers}
    ]
    assert table["fits"][0]["slope"] == pytest.approx(1, rel=1e-6)
    assert table["fits"][0]["held_out"] == 8
    done = client.get("/v1/devices/bench/profiles").json()["items"][0]
    assert (done["done"], done["waiting"], done["fit"]["space_key"]) == (count, 0, SPACE.key)
    assert (done["fit"]["trust"], done["fit"]["reason"], done["fit"]["noise_floor"]) == ("trusted", None, None)
    again = [result(item) for item in lease(client, agent).json()["items"]]
    assert {item["key"].rpartition("|")[2] for item in again} == {"repeated"}, "what only tells the noise comes last"
    assert upload(client, agent, again, "u3").json()["stored"] == 8
    fit = client.get("/v1/devices/bench").json()["table"]["fits"][0]
    assert {name: fit[name] for name in ("within_5", "within_10", "spearman", "noise_floor")} == pytest.approx(
        {"within_5": 1, "within_10": 1, "spearman": 1, "noise_floor": 0}
    )
    assert lease(client, agent).json()["items"] == []


def test_nothing_is_interpolated_while_a_profile_sleeps(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE | {"mode": "on-demand"})
    lease(client, agent)
    [space] = client.get("/v1/devices/bench").json()["table"]["spaces"]
    assert (space["measured"], space["interpolated"]) == (0, None)


def test_milliseconds_per_multiply_add_are_those_of_one_image(client: TestClient) -> None:
    seen = []
    for batch in (1, 8):
        agent, facts = register(client, f"b{batch}"), FACTS | {"batch": batch}
        client.post(f"/v1/devices/b{batch}/profiles", json=PROFILE)
        body = {"fingerprint": facts, "agent": "0.1", "limit": 500}
        items = client.post(f"/v1/devices/b{batch}/leases", json=body, headers=agent).json()["items"]
        results = [result(item) for item in items]
        batch_of = {"upload_id": "u", "lease_id": "l", "fingerprint": canonical_sha(facts), "results": results}
        assert client.post(f"/v1/devices/b{batch}/measurements", json=batch_of, headers=agent).status_code == 200
        seen.append(client.get(f"/v1/devices/b{batch}/lookup-table/survey").json()["operators"])
    for one, eight in zip(*seen, strict=True):
        of_one = one["ms_per_multiply_add"]
        assert eight["ms_per_multiply_add"] == (None if of_one is None else pytest.approx(of_one / 8))


def stepped(item: dict[str, Any]) -> dict[str, Any]:
    """A result of a device whose layers take twice as long from 40 outputs up."""
    answer = result(item)
    if "layer" in item["payload"] and Layer.from_json(item["payload"]["layer"]).c_out >= 40:
        answer |= {"seconds": 2 * answer["seconds"], "values": [2 * answer["seconds"]]}
    return answer


def test_a_profile_is_refined_before_it_is_fitted(client: TestClient) -> None:
    agent = register(client)
    profile = {**PROFILE, "points": 4}
    assert client.post("/v1/devices/bench/profiles", json=profile).json()["refined"] == 0
    first, rounds = len(plan_layers(SPACE, 4)), 0
    while (items := lease(client, agent).json()["items"]) and "|repeated" not in items[0]["key"]:
        before = client.get("/v1/devices/bench/profiles").json()["items"][0]
        assert before["fit"] is None
        assert upload(client, agent, [stepped(item) for item in items], f"u{rounds}").status_code == 200
        rounds += 1
    shown = client.get("/v1/devices/bench/profiles").json()["items"][0]
    networks = sum(NETWORKS.values())
    assert 2 <= rounds <= 5
    assert 0 < shown["refined"] <= first
    assert (shown["planned"], shown["waiting"]) == (first + shown["refined"] + networks, 0)
    assert shown["done"] == shown["planned"]
    assert shown["fit"]["fitted_on"] == NETWORKS["fit"]
    table = client.get("/v1/devices/bench").json()["table"]
    assert table["entries"] == first + shown["refined"]
    assert client.post("/v1/devices/bench/profiles", json=profile).json() == shown, "asking again changes nothing"


def test_a_table_that_comes_back_goes_on_with_its_refinement(client: TestClient) -> None:
    """And the one between is refined where the first was, too."""
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json={**PROFILE, "points": 4})
    items = lease(client, agent).json()["items"]
    upload(client, agent, [stepped(item) for item in items])
    [before] = client.get("/v1/devices/bench/profiles").json()["items"]
    assert before["refined"] > 0
    other = lease(client, agent, {"cpu": "other", "threads": 1}).json()["items"]
    assert sum(item["kind"] == "layer" for item in other) == len(plan_layers(SPACE, 4)) + before["refined"]
    rounds = 0
    while (items := lease(client, agent).json()["items"]) and "|repeated" not in items[0]["key"]:
        upload(client, agent, [stepped(item) for item in items], f"back{rounds}")
        rounds += 1
    [after] = client.get("/v1/devices/bench/profiles").json()["items"]
    assert after["refined"] >= before["refined"]
    assert after["fit"] is not None
    assert client.get("/v1/devices/bench").json()["table"]["entries"] == len(plan_layers(SPACE, 4)) + after["refined"]


@pytest.mark.parametrize("how", [{"refine": False}, {"mode": "full"}])
def test_a_grid_stays_as_it_is_where_that_is_asked_for(client: TestClient, how: dict[str, Any]) -> None:
    agent = register(client)
    assert client.post("/v1/devices/bench/profiles", json=PROFILE | how).json()["refined"] is None
    rounds = 0
    while (items := lease(client, agent).json()["items"]) and "|repeated" not in items[0]["key"]:
        upload(client, agent, [stepped(item) for item in items], f"u{rounds}")
        rounds += 1
    shown = client.get("/v1/devices/bench/profiles").json()["items"][0]
    points = 31 if "mode" in how else 3
    assert (shown["refined"], shown["fit"] is None) == (None, False)
    assert shown["planned"] == len(plan_layers(SPACE, points)) + sum(NETWORKS.values())


def test_failed_layers_do_not_keep_a_profile_from_its_fit(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE | {"points": 4})
    rounds = 0
    while (items := lease(client, agent).json()["items"]) and "|repeated" not in items[0]["key"]:
        results = [stepped(item) for item in items]
        if rounds:  # all that refines
            about = [{name: one[name] for name in ("work_id", "kind", "key")} for one in results]
            results = [
                one | {"error": "no"} if item["kind"] == "layer" else full
                for one, item, full in zip(about, items, results, strict=True)
            ]
        upload(client, agent, results, f"u{rounds}")
        rounds += 1
    shown = client.get("/v1/devices/bench/profiles").json()["items"][0]
    assert shown["refined"] == shown["failed"] > 0
    assert shown["fit"] is not None


def test_an_agents_connection_has_the_table_checked(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE)
    upload(client, agent, [result(item) for item in lease(client, agent).json()["items"]])
    body = {"fingerprint": FACTS, "agent": "0.1", "limit": 7, "connection": "b", "host": "h"}
    items = client.post("/v1/devices/bench/leases", json=body, headers=agent).json()
    assert [item["kind"] for item in items["items"]] == ["canary"] * 7
    beat = body | {"limit": 0, "renew": items["lease_id"]}
    assert client.post("/v1/devices/bench/leases", json=beat, headers=agent).json()["items"] == []
    assert upload(client, agent, [result(item) for item in items["items"]], "u2").json()["stored"] == 7
    table = client.get("/v1/devices/bench").json()["table"]
    assert (table["drift"], table["stale"], table["version"]) == (0, None, 1)
    assert table["checked_at"] is not None
    assert client.post("/v1/devices/bench/profiles", json=PROFILE | {"again": True}).json()["done"] == 0
    assert client.get("/v1/devices/bench").json()["table"]["version"] == 2


def test_a_lease_that_is_renewed_in_time_is_given_to_nobody_else(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE)
    held = lease(client, agent).json()
    with transaction() as session:
        session.execute(update(Work).values(lease_until=1.0))
    beat = {"fingerprint": FACTS, "agent": "0.1", "limit": 0, "renew": held["lease_id"]}
    assert client.post("/v1/devices/bench/leases", json=beat, headers=agent).json()["items"] == []
    assert lease(client, agent).json()["items"] == []


def test_a_failed_layer_is_shown_and_tried_again_when_a_user_asks(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE)
    item = lease(client, agent, limit=1).json()["items"][0]
    failure = {"work_id": item["work_id"], "kind": item["kind"], "key": item["key"], "error": "no memory"}
    assert upload(client, agent, [failure]).json()["failed"] == 1
    assert client.get("/v1/devices/bench").json()["failed"] == 1
    again = client.post("/v1/devices/bench/profiles", json=PROFILE).json()
    assert again["failed"] == 0
    assert len(client.get("/v1/devices/bench/profiles").json()["items"]) == 1
    assert lease(client, agent, limit=1).json()["items"][0]["work_id"] == item["work_id"]


def test_only_the_devices_own_agent_may_lease_and_hand_in(client: TestClient, make_key: Callable[..., str]) -> None:
    agent, other = register(client), register(client, "other")
    admin = dict(client.headers)
    wrong = {"Authorization": agent["Authorization"][:-1] + ("0" if agent["Authorization"][-1] != "0" else "1")}
    for headers, status in ((agent, 200), (other, 403), (admin, 403), (wrong, 401)):
        assert lease(client, headers).status_code == status
    for headers in (other, admin):
        assert upload(client, headers, [{"work_id": 1, "kind": "layer", "key": "k", "error": "e"}]).status_code == 403
    for call in ("/v1/devices", "/v1/devices/bench", "/v1/devices/bench/profiles", "/v1/devices/bench/lookup-table"):
        assert client.get(call, headers=agent).status_code == 403
    reader = {"Authorization": f"Bearer {make_key('read')}"}
    assert client.get("/v1/devices", headers=reader).status_code == 200
    assert client.post("/v1/devices", json={"name": "x"}, headers=reader).status_code == 403
    assert client.delete("/v1/devices/bench", headers=reader).status_code == 403


def test_no_secret_is_stored(client: TestClient) -> None:
    token = register(client)["Authorization"].split()[1]
    key = client.headers["Authorization"].split()[1]
    with get_engine().connect() as connection:
        dump = " ".join(str(row) for table in Base.metadata.sorted_tables for row in connection.execute(table.select()))
    for secret in (token, key):
        assert secret not in dump
        assert secret.rsplit("_", 1)[1] not in dump
    assert token not in client.get("/v1/devices/bench").text


def test_names_are_unique_and_missing_ones_are_said(client: TestClient) -> None:
    register(client)
    twice = client.post("/v1/devices", json={"name": "bench"})
    assert (twice.status_code, twice.json()["type"]) == (409, "urn:secateurs:already-exists")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/profiles"), ("GET", "/lookup-table")):
        assert client.request(method, f"/v1/devices/nobody{path}").status_code == 404
    assert client.post("/v1/devices/nobody/profiles", json=PROFILE).status_code == 404
    unknown = client.post("/v1/devices/bench/profiles", json=PROFILE | {"space": "alexnet"})
    assert (unknown.status_code, unknown.json()["type"]) == (422, "urn:secateurs:unknown-space")


def test_a_device_that_a_job_needs_stays(client: TestClient) -> None:
    register(client)
    job_id = waiting_job(JobState.VERIFYING)
    refused = client.delete("/v1/devices/bench")
    assert (refused.status_code, refused.json()["job_ids"]) == (409, [job_id])
    with transaction() as session:
        jobs.request_cancel(session, job_id)
    assert client.delete("/v1/devices/bench").status_code == 204
    assert client.get("/v1/devices").json() == {"items": []}


@pytest.mark.parametrize("asked", ["profile", "lease", "upload"])
def test_a_device_that_is_deleted_meanwhile_is_not_there_any_more(client: TestClient, asked: str) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE)
    results = [result(item) for item in lease(client, agent).json()["items"]]
    ask = {
        "profile": lambda: client.post("/v1/devices/bench/profiles", json=PROFILE | {"points": 4}),
        "lease": lambda: lease(client, agent),
        "upload": lambda: upload(client, agent, results),
    }[asked]
    with ThreadPoolExecutor(1) as pool:
        with transaction() as session:
            devices.lock(session, devices.get(session, "bench"))
            answer = pool.submit(ask)
            with pytest.raises(TimeoutError):
                answer.result(0.5)  # it takes its turn
            devices.delete(session, "bench")
        assert answer.result(10).status_code in (401, 404)
    assert client.get("/v1/devices").json() == {"items": []}


def test_a_deleted_device_takes_all_of_its_rows_along(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE)
    upload(client, agent, [result(item) for item in lease(client, agent).json()["items"]])
    assert client.delete("/v1/devices/bench").status_code == 204
    with get_engine().connect() as connection:
        for table in (
            "devices",
            "fingerprints",
            "lookup_tables",
            "table_fits",
            "profiles",
            "work",
            "measurements",
            "uploads",
        ):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 0, table
    assert lease(client, agent).status_code == 401


def test_conflicting_uploads_are_refused(client: TestClient) -> None:
    agent = register(client)
    client.post("/v1/devices/bench/profiles", json=PROFILE)
    results = [result(item) for item in lease(client, agent, limit=3).json()["items"]]
    assert upload(client, agent, results).json()["stored"] == 3
    assert upload(client, agent, results).json()["stored"] == 3
    assert upload(client, agent, results[:2]).json()["type"] == "urn:secateurs:upload-conflict"
    stale = upload(client, agent, results, "u2", fingerprint="0" * 64)
    assert (stale.status_code, stale.json()["current"]) == (409, canonical_sha(FACTS))


BAD_RESULTS: list[dict[str, Any]] = [
    {"seconds": 0}, {"seconds": -1}, {"seconds": 1000}, {"seconds": float("nan")}, {"seconds": float("inf")},
    {"seconds": None}, {"seconds": "1e400"}, {"values": [0.0]}, {"values": []}, {"values": [1.0] * 1001},
    {"iqr": -1}, {"work_id": 2**63}, {"work_id": -1}, {"key": "a\0b"}, {"key": "\ud800"}, {"key": "k" * 201},
    {"kind": "block"}, {"error": "both"}, {"more": 1}, {"conditions": {"a": float("nan")}},
    {"conditions": {"a": "x" * 66_000}}, {"conditions": {"a": "\0"}}, {"conditions": {"a": "\udc00"}},
]  # fmt: skip
BAD_FACTS: list[Any] = [
    {}, {"a": "\0"}, {"a": float("inf")}, {"a": "\ud800"}, {"a": "x" * 66_000}, {"a": [0] * 30_000}, [], "cpu",
]  # fmt: skip


def test_bad_results_are_refused(client: TestClient) -> None:
    agent = register(client) | {"Content-Type": "application/json"}
    for change in BAD_RESULTS:
        item = {"work_id": 1, "kind": "layer", "key": "k", "seconds": 1.0, "values": [1.0]} | change
        content = json.dumps({"upload_id": "u", "lease_id": "l", "fingerprint": "0" * 64, "results": [item]})
        answer = client.post("/v1/devices/bench/measurements", content=content, headers=agent)
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json"), change


def test_bad_facts_are_refused(client: TestClient) -> None:
    agent = register(client) | {"Content-Type": "application/json"}
    for facts in BAD_FACTS:
        content = json.dumps({"fingerprint": facts, "agent": "0.1"})
        assert client.post("/v1/devices/bench/leases", content=content, headers=agent).status_code == 422, facts


def test_tables_move_between_devices(client: TestClient, rings: list[bool]) -> None:
    register(client)
    layers = plan_layers(get_space("mobilenet_v2", 32, 1.0, 10), 6)
    entries = {layer.key: Entry(layer, 1e-6 * (at + 1), 1e-8, 5, at % 2 == 0) for at, layer in enumerate(layers)}
    table = LatencyTable("elsewhere", "f" * 64, entries, {SPACE.key: Fit(1e-5, 1.1, 8, 8, 0.01, 0.02)})
    waiting_job(JobState.PROFILING)
    answer = client.put("/v1/devices/bench/lookup-table", json=table.to_json())
    assert answer.json() == {"stored": len(entries), "current": True}
    assert rings == [True]
    exported = client.get("/v1/devices/bench/lookup-table").json()
    found = LatencyTable.from_json(exported)
    assert (found.entries, found.fits, found.device) == (table.entries, table.fits, "bench")
    lines = client.get("/v1/devices/bench/lookup-table", headers={"Accept": "text/csv"}).text.splitlines()
    assert len(lines) == len(entries) + 1
    assert client.get("/v1/devices/bench/lookup-table?format=csv").text.splitlines() == lines
    broken = table.to_json()
    broken["entries"][0]["seconds"] = 0
    assert client.put("/v1/devices/bench/lookup-table", json=broken).status_code == 422


def test_a_table_may_be_larger_than_other_requests(client: TestClient) -> None:
    register(client)
    layers = plan_layers(get_space("vgg16", 32, 1.0, 10))[:5000]
    table = LatencyTable("elsewhere", "f", {layer.key: Entry(layer, 1e-6) for layer in layers})
    assert len(json.dumps(table.to_json())) > 1 << 20
    assert client.put("/v1/devices/bench/lookup-table", json=table.to_json()).json()["stored"] == len(layers)
    large = {"fingerprint": {"a": "x" * (1 << 20)}, "agent": "0.1"}
    assert client.post("/v1/devices/bench/profiles", json=large).status_code == 413


def test_a_table_of_another_project_is_taken_as_far_as_it_goes(client: TestClient, rings: list[bool]) -> None:
    register(client)
    waiting_job(JobState.PROFILING)
    stem, block = (
        "Conv-input:32x32x3-output:16x16x8",
        "expanded_conv-input:8x8x4-output:8x8x4-expand:6-kernel:3-stride:1-idskip:1",
    )
    body = {"source": "phones", "table": {stem: {"mean": 2.0, "count": 3}, block: {"mean": 1.0, "count": 3}}}
    address = "/v1/devices/bench/lookup-table/proxylessnas"
    answer = client.put(address, json=body).json()
    assert (answer["stored"], answer["current"], list(answer["skipped"]), rings) == (1, True, [block], [True])
    assert client.put(address, json=body).json()["stored"] == 0
    [entry] = client.get("/v1/devices/bench/lookup-table").json()["entries"]
    assert (entry["seconds"], entry["count"], entry["layer"]["c_out"]) == (0.002, 3, 8)
    seen = client.get("/v1/devices/bench/lookup-table/survey").json()
    assert seen["slowest"] == [{"key": "conv-k3s2p1-32x32-bn-relu6:3>8", "ms": 2.0}]
    assert seen["operators"] == [{"op": "conv", "layers": 1, "ms_per_multiply_add": 2.0 / (8 * 256 * 27)}]
    assert seen["coverage"][0]["c_in"] == [3, 3]
    for wrong in ({"source": "x", "table": {block: {"mean": 1.0}}}, {"source": "x", "table": {}}, {"table": {}}):
        assert client.put(address, json=wrong).status_code == 422
    assert client.put("/v1/devices/none/lookup-table/proxylessnas", json=body).status_code == 404
    assert client.get("/v1/devices/none/lookup-table/survey").status_code == 404
