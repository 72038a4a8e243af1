"""The HTTP client against a transport that answers, fails and breaks off as it is told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from latency_profiler.client import Client
from latency_profiler.errors import InvalidInput, ServiceError, ServiceUnreachable
from latency_profiler.wire import pause

Answer = httpx2.Response | Exception
PROBLEM = {"title": "Unprocessable", "status": 422, "detail": "the budget is below 10", "range": [10, 20]}


class Server:
    """Gives its answers in order and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.requests, self.pauses = list(answers), list[httpx2.Request](), list[float]()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def client(self) -> Client:
        return Client("http://service", "key", transport=httpx2.MockTransport(self), sleep=self.pauses.append)


def ok(**body: Any) -> httpx2.Response:
    return httpx2.Response(200, json=body)


def lost() -> Exception:
    return httpx2.ReadError("connection reset")


def refused() -> Exception:
    return httpx2.ConnectError("connection refused")


def test_every_request_carries_the_key() -> None:
    server = Server(ok(items=[]))
    assert server.client.devices() == {"items": []}
    assert server.requests[0].headers["authorization"] == "Bearer key"
    assert str(server.requests[0].url) == "http://service/v1/devices"


def test_a_refusal_is_an_error_with_its_problem_document() -> None:
    server = Server(httpx2.Response(422, json=PROBLEM))
    with pytest.raises(ServiceError, match="the budget is below 10") as caught:
        server.client.submit({})
    assert (caught.value.status, caught.value.problem) == (422, PROBLEM)
    assert len(server.requests) == 1, "a refusal is not asked for again"


def test_lost_connections_are_tried_again_with_growing_pauses() -> None:
    server = Server(refused(), lost(), httpx2.Response(503), ok(id="x"))
    assert server.client.job("x") == {"id": "x"}
    assert server.pauses == [0.25, 0.5, 1.0]
    assert [pause(n) for n in (1, 6, 7, 60, 10_000)] == [0.25, 8.0, 10.0, 10.0, 10.0]


def test_a_service_that_stays_away_is_unreachable() -> None:
    server = Server(*[refused()] * 4)
    with pytest.raises(ServiceUnreachable, match=r"no answer from http://service: connection refused"):
        server.client.spaces()
    assert len(server.requests) == 4


def test_a_job_keeps_its_key_through_retries() -> None:
    server = Server(lost(), ok(id="a"), ok(id="b"))
    client = server.client
    client.submit({"space": "vgg16"})
    client.submit({"space": "vgg16"}, "mine")
    keys = [request.headers["idempotency-key"] for request in server.requests]
    assert keys[0] == keys[1] != keys[2] == "mine"
    assert json.loads(server.requests[1].content) == {"space": "vgg16"}


def test_a_call_that_must_not_run_twice_is_repeated_only_if_it_did_not_arrive() -> None:
    server = Server(refused(), ok(token="t"))
    assert server.client.add_device("bench") == {"token": "t"}
    server = Server(lost(), ok(token="t"))
    with pytest.raises(ServiceUnreachable):
        server.client.add_device("bench")
    server = Server(httpx2.Response(503), ok(token="t"))
    with pytest.raises(ServiceError):
        server.client.add_device("bench")
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", [httpx2.Response(200, text="<html>"), httpx2.Response(200, json=[1])])
def test_what_is_not_the_service_is_told(answer: httpx2.Response) -> None:
    with pytest.raises(ServiceError, match="not JSON"):
        Server(answer).client.spaces()


def test_an_address_without_scheme_is_refused() -> None:
    with pytest.raises(InvalidInput, match="must begin with http"):
        Client("localhost:8740")


def test_names_are_one_part_of_the_path() -> None:
    server = Server(ok())
    server.client.device("a/../b?c")
    assert server.requests[0].url.raw_path == b"/v1/devices/a%2F..%2Fb%3Fc"


def test_bounds_of_several_devices_keep_their_order() -> None:
    server = Server(ok(items=[]))
    server.client.best("vgg16", "digits", max_flops=5, max_latency_ms={"a": 1.5, "b": 2.5}, accuracy="test")
    assert server.requests[0].url.params.multi_items() == [
        ("space", "vgg16"), ("dataset", "digits"), ("max_flops", "5"), ("device", "a"), ("device", "b"),
        ("max_latency_ms", "1.5"), ("max_latency_ms", "2.5"), ("accuracy", "test"), ("limit", "10"),
    ]  # fmt: skip


def test_candidates_come_page_after_page() -> None:
    server = Server(ok(items=[{"id": 1}], next="c"), ok(items=[{"id": 2}], next=None))
    assert [one["id"] for one in server.client.all_candidates("j", sort="flops")] == [1, 2]
    assert server.requests[1].url.params["cursor"] == "c"


def test_an_artifact_is_there_completely_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    server = Server(httpx2.Response(200, content=b"x" * 1000), httpx2.Response(404, json={"title": "gone"}))
    assert server.client.download("s", "model.onnx", target).read_bytes() == b"x" * 1000
    with pytest.raises(ServiceError, match="gone"):
        server.client.download("s", "other", tmp_path / "other")
    assert list(tmp_path.iterdir()) == [target]


def event(number: int, kind: str, **data: Any) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


class Broken(httpx2.SyncByteStream):
    """Bytes, and then a connection that breaks, unless `error` is None."""

    def __init__(self, *parts: bytes, error: Exception | None) -> None:
        self.parts, self.error = parts, error

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        if self.error:
            raise self.error


def stream(*parts: bytes, error: Exception | None = None) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Broken(*parts, error=error))


def test_events_go_on_where_the_connection_broke() -> None:
    server = Server(
        stream(event(1, "state", state="training"), b": ping\n\n", event(2, "progress", done=1), error=lost()),
        refused(),
        httpx2.Response(503),
        ok(state="training"),
        stream(event(3, "state", state="succeeded"), event(4, "progress", done=2)),
    )
    events = list(server.client.events("j"))
    assert [one["id"] for one in events] == ["1", "2", "3"]
    assert events[1] == {"id": "2", "event": "progress", "data": {"done": 1}}
    resumed = [request.headers.get("last-event-id") for request in server.requests if "events" in str(request.url)]
    assert resumed == [None, "2", "2", "2"]


def test_events_of_a_job_that_has_ended_end() -> None:
    server = Server(stream(), ok(state="cancelled"))
    assert list(server.client.events("j", "17")) == []


@pytest.mark.parametrize("failure", [refused, lambda: stream(error=lost())])
def test_events_give_up_after_a_number_of_attempts(failure: Callable[[], Answer]) -> None:
    server = Server(*[failure() for _ in range(3)])
    with pytest.raises(ServiceUnreachable):
        list(server.client.events("j", attempts=3))


def test_events_of_an_unknown_job_are_refused_at_once() -> None:
    server = Server(httpx2.Response(404, json={"detail": "no job 'j'"}))
    with pytest.raises(ServiceError, match="no job"):
        list(server.client.events("j"))


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_names_that_lead_elsewhere_are_not_sent(name: str) -> None:
    for ask in (Client("http://127.0.0.1:9").job, Client("http://127.0.0.1:9").device):
        with pytest.raises(InvalidInput, match="is no name"):
            ask(name)


def test_an_idempotency_key_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InvalidInput, match="is no Idempotency-Key"):
        Client("http://127.0.0.1:9").submit({}, idempotency_key="é")
