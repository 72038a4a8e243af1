"""Jobs over HTTP: what is refused, what is accepted once, and how it is followed."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from sqlalchemy.exc import InvalidRequestError

from latency_profiler.cost import flops
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from service import broker
from service.api.jobs import _news
from service.store import datasets, devices, exchange, jobs, keys, structures
from service.store.candidates import Judged, record_generation
from service.store.models import Job, JobState
from service.store.session import snapshot, transaction
from service.submission import FEWEST

REQUEST: dict[str, Any] = {
    "space": "mobilenet_v1", "image_size": 8, "width": 0.25, "dataset": "digits", "effort": "smoke",
    "constraints": [{"metric": "flops", "max": 200_000}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def bells(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    rung: list[bool] = []
    monkeypatch.setattr(broker, "ring", lambda: bool(rung.append(True)))
    return rung


def count_jobs() -> int:
    with snapshot() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def submit(client: TestClient, key: str | None = None, **changes: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post("/v1/jobs", json=REQUEST | changes, headers=headers)


def test_a_job_is_accepted_even_though_the_broker_is_dead(client: TestClient, bells: list[bool]) -> None:
    answer = submit(client)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert job["state"] == "queued"
    assert job["spec"]["search"] == {
        "strategy": "evolution", "seed": 0, "generations": 2, "population": 8, "parents": 4,
        "mutation_probability": 0.2, "recalibration_images": 128, "classifier_images": 0, "rank_by": "loss",
        "repair": True, "screening": 4, "least_budget_share": 0.9,
    }  # fmt: skip
    assert bells == [True]
    assert client.get("/readyz").json()["broker"] == "silent"
    again = client.get(f"/v1/jobs/{job['id']}").json()
    assert again | {"seconds": {}} == job


def test_the_papers_effort_searches_as_published(client: TestClient) -> None:
    search = submit(client, effort="paper").json()["spec"]["search"]
    published = {"repair": False, "screening": 1, "mutation_probability": 0.1, "rank_by": "accuracy", "population": 50,
                 "generations": 20, "parents": 10, "least_budget_share": 0.0, "strategy": "evolution"}  # fmt: skip
    assert search | published == search


@pytest.mark.parametrize(
    ("effort", "share", "classifier_images"),
    [("smoke", 0.9, 0), ("quick", 0.95, 0), ("standard", 0.97, 5000), ("paper", 0.0, 0)],
)
def test_each_effort_uses_its_share_of_the_budget(
    client: TestClient, effort: str, share: float, classifier_images: int
) -> None:
    search = submit(client, effort=effort).json()["spec"]["search"]
    assert (search["least_budget_share"], search["classifier_images"]) == (share, classifier_images)


def test_a_front_has_one_cost_and_a_lower_bound_of_its_own(client: TestClient) -> None:
    spec = submit(client, objective="front").json()["spec"]
    assert (spec["search"]["least_budget_share"], spec["retraining"]["top"]) == (0.0, 3)
    assert submit(client, objective="front", retraining={"top": 5}).json()["spec"]["retraining"]["top"] == 5
    assert submit(client, objective="front", effort="standard").json()["spec"]["retraining"]["finalists"] == 1
    two = [*REQUEST["constraints"], {"metric": "parameters", "max": 100_000}]
    for changes, reason in (
        ({"constraints": two}, "one constraint"),
        ({"search": {"least_budget_share": 0.9}}, "least_budget_share"),
    ):
        refused = submit(client, objective="front", **changes)
        assert refused.status_code == 422
        assert reason in refused.text
    assert submit(client, search={"strategy": "luck"}).status_code == 422


def test_layers_that_an_imported_table_lacks_are_not_waited_for(client: TestClient) -> None:
    space = get_space("mobilenet_v1", 8, 0.25, 10, free_last=True)
    layers = plan_layers(space)
    with transaction() as session:
        device, _ = devices.register(session, "foreign")
        few = LatencyTable("foreign", "elsewhere", {one.key: Entry(one, 1e-5) for one in layers[:3]})
        exchange.take(session, device, few.to_json())
    bound = {"metric": "latency", "device": "foreign", "max_ms": 1.0}
    answer = submit(client, constraints=[bound])
    assert (answer.status_code, count_jobs()) == (422, 0)
    assert "was imported and lacks" in answer.json()["detail"]
    with transaction() as session:
        whole = LatencyTable("foreign", "elsewhere too", {one.key: Entry(one, 1e-5) for one in layers})
        assert exchange.take(session, devices.get(session, "foreign"), whole.to_json())[1]
    assert submit(client, constraints=[bound]).status_code == 202


def test_a_revoked_key_hears_no_more_of_a_job(client: TestClient) -> None:
    job_id = submit(client).json()["id"]
    with transaction() as session:
        key, secret = keys.create_key(session, "reader", ["read"])
        prefix = key.prefix
    assert _news(job_id, 0, f"Bearer {secret}")[0]
    with transaction() as session:
        keys.revoke_key(session, prefix)
    assert _news(job_id, 0, f"Bearer {secret}") == ([], True)


def test_too_few_images_are_refused_before_a_worker_begins(client: TestClient) -> None:
    with transaction() as session:
        datasets.add(
            session, "few", "folder", None, classes=2, image_size=8, train_images=FEWEST - 1, test_images=1
        )  # fmt: skip
    answer = submit(client, dataset="few")
    assert (answer.status_code, count_jobs()) == (422, 0)
    assert "'few' has 9 training images; at least 10 are needed" in answer.json()["detail"]


def test_what_users_read_of_a_job_leaves_out_what_grows_with_every_candidate(client: TestClient) -> None:
    job_id = submit(client).json()["id"]
    with snapshot() as session:
        for job in (jobs.get(session, job_id, memory=False), *jobs.newest(session, limit=1)):
            assert job.id == job_id
            with pytest.raises(InvalidRequestError, match="raiseload"):
                _ = job.memory
    with snapshot() as session:
        assert jobs.get(session, job_id).memory == {}


def test_weight_decay_that_makes_weights_oscillate_is_refused(client: TestClient) -> None:
    answer = submit(client, training={"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.02})
    assert answer.status_code == 422
    assert "at most 0.013 is possible" in answer.json()["detail"]
    assert count_jobs() == 0
    assert submit(client, training={"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.013}).status_code == 202


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "magnitude", "constraints": [{"metric": "latency", "device": "d", "max_ms": 1}]}, "no latency"),
        ({"method": "interspace", "constraints": [{"metric": "flops", "max": 9**6, "min": 5}]}, "one upper bound"),
        ({"method": "magnitude", "compare_with": ["magnitude"]}, "named once"),
        ({"method": "collaborative", "objective": "front"}, "metapruning"),
        ({"method": "collaborative", "compare_with": ["metapruning"], "objective": "front"}, "make that the method"),
        ({"method": "collaborative", "collaborative": {"ranking": "l1", "allocation": "global"}}, "layerwise"),
        ({"method": "magnitude", "magnitude": {"scan": True, "qualities": {"block1": 1.0}}}, "not both"),
        ({"method": "interspace", "constraints": [{"metric": "parameters", "max": 3}]}, "parameters"),
        ({"method": "interspace", "constraints": [{"metric": "parameters", "max": 2560}],
          "interspace": {"pruning": "magnitude"}}, "lottery_keeps_classifier"),
        ({"method": "collaborative", "start": "nowhere"}, "nowhere"),
        ({"method": "magnitude", "start": "0" * 32, "magnitude": {"tolerance": 0.1}}, "leave it out"),
        ({"method": "magnitude", "start": "0" * 32, "magnitude": {"scan": True}}, "leave it out"),
        ({"method": "collaborative", "collaborative": {"recalibration_images": 1}}, "recalibration_images"),
        ({"method": "collaborative", "collaborative": {"ratios": [0.5, 0.5]}}, "genes"),
        ({"method": "magnitude", "magnitude": {"qualities": {"nowhere": 1.0}}}, "nowhere"),
        ({"method": "luck"}, "metapruning"),
        ({"start": "0" * 32}, "name a pruning method"),
        ({"training": {"band": [1.0, 1.0]}}, "too narrow"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do_is_refused(client: TestClient, changes: dict[str, Any], said: str) -> None:
    refused = submit(client, **changes)
    assert refused.status_code == 422
    assert said in json.dumps(refused.json())
    assert count_jobs() == 0


def test_a_classifier_that_is_kept_leaves_other_layers_a_weight_each(client: TestClient) -> None:
    least = 256 * 10 + 27  # of mobilenet_v1 at a quarter
    for most, changes, status in (
        (least - 1, {}, 422), (least, {}, 202), (least - 1, {"lottery_keeps_classifier": False}, 202),
    ):  # fmt: skip
        bound = {"metric": "parameters", "max": most}
        asked = {"pruning": "magnitude", **changes}
        assert submit(client, method="interspace", constraints=[bound], interspace=asked).status_code == status


def test_trainings_of_pruning_methods_are_filled_in(client: TestClient) -> None:
    spec = submit(client, method="collaborative", dense={"epochs": 7}).json()["spec"]
    assert spec["dense"] == {name: spec["retraining"][name] for name in spec["dense"]} | {"epochs": 7}
    assert spec["collaborative"]["fine_tuning"]["epochs"] == 7
    assert spec["collaborative"]["fine_tuning"]["learning_rate"] == spec["dense"]["learning_rate"] / 10


def test_lotteries_rewind_unless_they_begin_with_trained_weights(client: TestClient) -> None:
    for asked, rewinds in (
        ({}, True), ({"from_dense": True}, False), ({"from_dense": True, "lottery_rewinds": True}, True),
    ):  # fmt: skip
        spec = submit(client, method="interspace", interspace={"pruning": "magnitude", **asked}).json()["spec"]
        assert spec["interspace"]["lottery_rewinds"] is rewinds


def test_a_space_without_batch_norm_has_no_pruning_net(client: TestClient) -> None:
    refused = submit(client, space="lenet_5")
    assert refused.status_code == 422
    assert "lenet_5 has layers without batch norm" in refused.json()["detail"]
    assert count_jobs() == 0


@pytest.mark.parametrize("metric", ["flops", "parameters"])
def test_a_budget_below_the_smallest_structure_is_refused_with_the_range(client: TestClient, metric: str) -> None:
    space = get_space("mobilenet_v1", 8, 0.25, 10, True)
    problem = submit(client, constraints=[{"metric": metric, "max": 10}]).json()
    assert problem["status"] == 422
    assert problem["type"] == "urn:secateurs:infeasible-constraint"
    assert (problem["metric"], problem["asked"]) == (metric, 10)
    if metric == "flops":
        assert problem["smallest"] == flops(space.layers(space.channels(space.smallest)))
        assert problem["largest"] == flops(space.layers(space.channels(space.largest)))
    exactly = {"metric": metric, "max": problem["smallest"]}
    assert count_jobs() == 0
    assert submit(client, constraints=[exactly]).status_code == 202
    beyond = {"metric": metric, "max": 10**12, "min": problem["largest"] + 1}
    assert submit(client, constraints=[beyond]).json()["asked"] == problem["largest"] + 1


def test_a_latency_budget_waits_for_the_table_or_is_compared_with_it(client: TestClient) -> None:
    with transaction() as session:
        devices.register(session, "bench")
    asked = [{"metric": "latency", "device": "bench", "max_ms": 0.5}]
    assert submit(client, constraints=asked).status_code == 202
    space = get_space("mobilenet_v1", 8, 0.25, 10, True)
    entries = {layer.key: Entry(layer, 1e-3) for layer in plan_layers(space, 2)}
    with transaction() as session:
        exchange.take(session, devices.get(session, "bench"), LatencyTable("bench", "f" * 64, entries).to_json())
    problem = submit(client, constraints=asked).json()
    assert problem["type"] == "urn:secateurs:infeasible-constraint"
    assert problem["smallest"] == pytest.approx(len(space.units) * 1.0)
    assert (problem["metric"], problem["device"], problem["asked"]) == ("latency_ms", "bench", 0.5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dataset": "nothing"}, "digits"),
        ({"space": "nothing"}, "mobilenet_v1"),
        ({"measure_on": ["nothing"]}, "no device 'nothing'"),
        ({"constraints": [{"metric": "latency", "device": "nothing", "max_ms": 1}]}, "no device 'nothing'"),
    ],
)
def test_unknown_names_are_refused(client: TestClient, changes: dict[str, Any], named: str) -> None:
    answer = submit(client, **changes)
    assert answer.status_code == 422
    assert named in answer.json()["detail"]
    assert count_jobs() == 0


def test_the_same_key_is_one_job(client: TestClient, make_key: Callable[..., str]) -> None:
    first = submit(client, "once")
    assert submit(client, "once").json() == first.json()
    assert submit(client, "once").status_code == 202
    assert count_jobs() == 1
    other_body = submit(client, "once", seed=1)
    assert (other_body.status_code, other_body.json()["type"]) == (422, "urn:secateurs:idempotency-key-reused")
    client.headers["Authorization"] = f"Bearer {make_key('submit')}"
    assert submit(client, "once").json()["id"] != first.json()["id"]
    assert count_jobs() == 2


def test_the_same_key_at_once_is_one_job(client: TestClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: submit(client, "at-once"), range(8)))
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1
    assert count_jobs() == 1


def test_a_refused_request_leaves_its_key_free(client: TestClient) -> None:
    assert submit(client, "once", dataset="nothing").status_code == 422
    assert submit(client, "once").status_code == 202


def test_pages_hold_every_job_once_the_newest_first(client: TestClient) -> None:
    made = [submit(client, seed=seed).json()["id"] for seed in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(4):
        page = client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next"]
    assert cursor is None
    assert seen == made[::-1]


def test_filters(client: TestClient) -> None:
    job = submit(client).json()
    for query, count in (
        ({"space": "mobilenet_v1"}, 1), ({"space": job["space_key"]}, 1), ({"space": "mobilenet_v"}, 0),
        ({"state": "queued"}, 1), ({"state": "failed"}, 0), ({"dataset": "digits"}, 1),
    ):  # fmt: skip
        assert len(client.get("/v1/jobs", params=query).json()["items"]) == count, query
    assert client.get("/v1/jobs", params={"dataset": "nothing"}).status_code == 404


def test_cancelling(client: TestClient) -> None:
    where = submit(client).json()["links"]["cancel"]
    assert client.post(where).json()["state"] == "cancelled"
    assert client.post(where).json()["state"] == "cancelled"
    other = submit(client).json()
    with transaction() as session:
        claim = jobs.claim(session, "worker", 30, 3)
        assert claim is not None
    held = client.post(other["links"]["cancel"]).json()
    assert (held["state"], held["cancel_requested"]) == ("queued", True)
    third = submit(client).json()
    with transaction() as session:
        claim = jobs.claim(session, "worker", 30, 3)
        assert claim is not None
        jobs.finish(session, claim, JobState.SUCCEEDED)
    answer = client.post(third["links"]["cancel"])
    assert (answer.status_code, answer.json()["state"]) == (409, "succeeded")


def events(client: TestClient, where: str, after: int | None = None) -> list[dict[str, str]]:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    text = client.get(where, headers=headers).text
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]


def test_events_are_complete_resumable_and_end(client: TestClient) -> None:
    job = submit(client).json()
    with transaction() as session:
        for done in range(300):
            jobs.add_event(session, job["id"], "progress", {"done": done})
    client.post(job["links"]["cancel"])
    found = events(client, job["links"]["events"])
    assert [event["event"] for event in found] == ["state"] + ["progress"] * 300 + ["state"]
    assert [json.loads(event["data"])["done"] for event in found[1:-1]] == list(range(300))
    assert json.loads(found[-1]["data"])["state"] == "cancelled"
    middle = int(found[150]["id"])
    assert events(client, job["links"]["events"], middle) == found[151:]
    assert events(client, job["links"]["events"], 2**62) == []
    assert client.get("/v1/jobs/0/events").status_code == 404


def test_candidates_are_sorted_and_paged(client: TestClient) -> None:
    job = submit(client).json()
    space = get_space("mobilenet_v1", 8, 0.25, 10, True)
    judged = [
        Judged((i,) * 14, "mutation", (((i + 1),) * 14, (0,) * 14), 100 - i, 5, {"bench": 0.001}, (i * 7 % 5) / 5, 1.0)
        for i in range(12)
    ]
    with transaction() as session:
        record_generation(session, jobs.get(session, job["id"]), space, 3, judged, {})
    for sort, order, key in (
        ("proxy_accuracy", None, lambda one: (-one["proxy_accuracy"], -one["id"])),
        ("flops", None, lambda one: (one["flops"], one["id"])),
        ("parameters", "descending", lambda one: (-one["parameters"], -one["id"])),
        ("generation", "ascending", lambda one: (one["generation"], one["id"])),
    ):
        seen: list[dict[str, Any]] = []
        query: dict[str, Any] = {"limit": 5, "sort": sort} | ({"order": order} if order else {})
        for _ in range(3):
            page = client.get(job["links"]["candidates"], params=query).json()
            seen += page["items"]
            query["cursor"] = page["next"]
        assert page["next"] is None
        assert len({one["id"] for one in seen}) == 12
        assert seen == sorted(seen, key=key), sort
    first = client.get(job["links"]["candidates"], params={"limit": 5, "sort": "flops"}).json()
    for other in ({"sort": "parameters"}, {"sort": "flops", "order": "descending"}):
        answer = client.get(job["links"]["candidates"], params={"cursor": first["next"], **other})
        assert answer.status_code == 422, "a cursor of another order is none of this list"
    one = seen[0]
    assert one["channels"] == list(space.channels(one["encoding"]))
    assert one["predicted_ms"] == {"bench": 1.0}
    assert one["parents"] == [[1] * 14, [0] * 14]
    with snapshot() as session:
        assert structures.get(session, one["structure_id"]).channels == one["channels"]
