"""The service over HTTP, one method per call: used by the agent, the command line and user scripts.

Answers are plain dicts as the service's OpenAPI document describes them. Submitting a job and handing in measurements
carry an id of their own, so that they may be repeated like calls that only read.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from latency_profiler.durable import save
from latency_profiler.errors import InvalidInput, ServiceUnreachable
from latency_profiler.wire import GATEWAY, Json, Sleep, Wire, describe, pause, refuse

Latencies = Mapping[str, float]
"""Device → most milliseconds."""
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "unverified"})
"""States that a job does not leave."""
LARGEST_PAGE = 200
LOOKING_SECONDS = 3600.0
"""In which the service looks at the images of a dataset: minutes for large archives."""
SILENCE = 60.0
"""Seconds without a byte after which a stream of events counts as broken (the service sends comments in between)."""


class Client:
    """The calls of `/v1`. Every one raises `ServiceError`, or `ServiceUnreachable` where nothing answers.

    Args:
        url: address of the service, e.g. `http://127.0.0.1:8740`.
        token: a user's API key or a device's token.
        timeout: seconds that one answer may take.
        transport: instead of the network, for tests.
        sleep: waits between attempts.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._wire = Wire(url, token, timeout, transport, sleep)
        self.url = self._wire.url

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._wire.http.close()

    def ready(self) -> Json:
        """Whether the service can work; asked once, since a service that is not ready answers 503."""
        return self._wire.json("GET", "/readyz", attempts=1)

    # Spaces and prices

    def spaces(self) -> Json:
        """What can be searched."""
        return self._wire.json("GET", "/v1/spaces")

    def space(self, name: str, **options: Any) -> Json:
        """One space; `options` are `image_size`, `width`, `classes` and `last_layer`."""
        return self._wire.json("GET", path("spaces", name), params=given(options))

    def price(self, space: str, request: Json) -> Json:
        """Cost of a structure, given by `channels` or `encoding` in the request, on each of its `devices`."""
        return self._wire.json("POST", path("spaces", space, "price"), json=request)

    # Devices

    def add_device(self, name: str, description: str = "") -> Json:
        """Register a device; the answer holds its agent's token, which is shown only now."""
        body = {"name": name, "description": description}
        return self._wire.json("POST", "/v1/devices", json=body, repeatable=False)

    def devices(self) -> Json:
        """All devices."""
        return self._wire.json("GET", "/v1/devices")

    def device(self, name: str) -> Json:
        """One device: fingerprint, coverage, last beat, quality of its table."""
        return self._wire.json("GET", path("devices", name))

    def delete_device(self, name: str) -> None:
        """Forget a device and its tables."""
        self._wire.send("DELETE", path("devices", name), repeatable=False)

    def profile(self, device: str, request: Json) -> Json:
        """Plan the layers of a space to be measured."""
        return self._wire.json("POST", path("devices", device, "profiles"), json=request)

    def profiles(self, device: str) -> Json:
        """Progress and held-out error of a device's profiles."""
        return self._wire.json("GET", path("devices", device, "profiles"))

    def lease(self, device: str, fingerprint: Json, agent: str, limit: int = 32, **more: str) -> Json:
        """Take work to measure; also the agent's beat. `more` are `connection`, `host`, and a lease to `renew`."""
        body = {"fingerprint": fingerprint, "agent": agent, "limit": limit, **more}
        return self._wire.json("POST", path("devices", device, "leases"), json=body)

    def measurements(self, device: str, upload: Json) -> Json:
        """Hand in what was measured; the same `upload_id` again changes nothing."""
        return self._wire.json("POST", path("devices", device, "measurements"), json=upload)

    def lookup_table(self, device: str) -> Json:
        """A device's table."""
        return self._wire.json("GET", path("devices", device, "lookup-table"))

    def lookup_table_csv(self, device: str) -> str:
        """A device's table for spreadsheets."""
        return self._wire.send("GET", path("devices", device, "lookup-table"), params={"format": "csv"}).text

    def put_lookup_table(self, device: str, table: Json) -> Json:
        """Import a table."""
        return self._wire.json("PUT", path("devices", device, "lookup-table"), json=table)

    def put_foreign_table(self, device: str, source: str, table: Json) -> Json:
        """Import a table in the format of ProxylessNAS."""
        body = {"source": source, "table": table}
        return self._wire.json("PUT", path("devices", device, "lookup-table", "proxylessnas"), json=body)

    def table_survey(self, device: str) -> Json:
        """The slowest layers of a table, the cost of a multiply-add by operator, and the widths that it covers."""
        return self._wire.json("GET", path("devices", device, "lookup-table", "survey"))

    # Datasets

    def datasets(self, limit: int = 200, cursor: str | None = None) -> Json:
        """One page of what can be trained on."""
        return self._wire.json("GET", "/v1/datasets", params=given({"limit": limit, "cursor": cursor}))

    def dataset(self, name: str) -> Json:
        """One dataset."""
        return self._wire.json("GET", path("datasets", name))

    def add_dataset(self, request: Json) -> Json:
        """Register images below the service's data root; all of them are looked at before the answer comes."""
        return self._wire.json("POST", "/v1/datasets", json=request, repeatable=False, timeout=LOOKING_SECONDS)

    # Jobs

    def submit(self, job: Json, idempotency_key: str | None = None) -> Json:
        """Submit a job; the same key again gives the same job. Without a key a new one protects the retries."""
        if not (idempotency_key or "").isascii():
            raise InvalidInput(f"{idempotency_key!r} is no Idempotency-Key: letters, digits and signs of ASCII only")
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._wire.json("POST", "/v1/jobs", json=job, headers=headers)

    def jobs(self, limit: int = 50, cursor: str | None = None, **options: Any) -> Json:
        """One page of jobs, the newest first, and `next`, the cursor of the following page.

        `options` are `state`, `space` and `dataset`.
        """
        return self._wire.json("GET", "/v1/jobs", params=given({"limit": limit, "cursor": cursor, **options}))

    def job(self, job_id: str) -> Json:
        """One job."""
        return self._wire.json("GET", path("jobs", job_id))

    def cancel(self, job_id: str) -> Json:
        """Ask a job to stop."""
        return self._wire.json("POST", path("jobs", job_id, "cancel"))

    def candidates(self, job_id: str, limit: int = 100, cursor: str | None = None, **options: Any) -> Json:
        """One page of a job's candidates; `options` are `sort` and `order`."""
        query = given({"limit": limit, "cursor": cursor, **options})
        return self._wire.json("GET", path("jobs", job_id, "candidates"), params=query)

    def all_candidates(self, job_id: str, **options: Any) -> Iterator[Json]:
        """Every candidate of a job, page after page."""
        cursor: str | None = None
        while page := self.candidates(job_id, LARGEST_PAGE, cursor, **options):
            yield from page["items"]
            if not (cursor := page["next"]):
                return

    def events(self, job_id: str, last_event_id: str | None = None, attempts: int = 10) -> Iterator[Json]:
        """What happens in a job as `{"id", "event", "data"}`, until it ends; goes on where a connection broke.

        Args:
            job_id: the job.
            last_event_id: begin after this event; None is from the beginning.
            attempts: connections in a row without a new event, after which it gives up.

        Raises:
            ServiceUnreachable: it gave up.
        """
        failures, reason = 0, "the stream ended"
        while failures < attempts:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            try:
                for event in self._stream(path("jobs", job_id, "events"), headers):
                    failures, last_event_id = 0, event["id"] or last_event_id
                    yield event
                    if event["event"] == "state" and event["data"].get("state") in TERMINAL:
                        return
                if self.job(job_id)["state"] in TERMINAL:
                    return
            except (httpx2.TransportError, ServiceUnreachable) as error:
                reason = describe(error)
            failures += 1
            self._wire.sleep(pause(failures))
        raise ServiceUnreachable(self.url, reason)

    # Results

    def pruning_net(self, key: str) -> Json:
        """One PruningNet: what it was trained for, and how well it ranks."""
        return self._wire.json("GET", path("pruning-nets", key))

    def best(
        self, space: str, dataset: str, *, max_flops: int | None = None,
        max_parameters: int | None = None, max_latency_ms: Latencies | None = None, limit: int = 10, **options: Any,
    ) -> Json:  # fmt: skip
        """Best structures within bounds, across all jobs.

        `options` are `statistic` (of the latencies), `image_size`, `width` and `accuracy`.
        """
        query: Json = {"space": space, "dataset": dataset, "max_flops": max_flops, "max_parameters": max_parameters}
        pairs = (max_latency_ms or {}).items()
        bounds = {"device": [device for device, _ in pairs], "max_latency_ms": [most for _, most in pairs]}
        return self._wire.json(
            "GET", "/v1/structures/best", params=given({**query, **bounds, **options, "limit": limit})
        )

    def pareto(self, space: str, dataset: str, device: str | None = None, **options: Any) -> Json:
        """The front of accuracy against latency on a device, or against FLOPs; `options` as of `best`, and `metric`."""
        query = {"space": space, "dataset": dataset, "device": device, **options}
        return self._wire.json("GET", "/v1/structures/pareto", params=given(query))

    def structure(self, structure_id: str) -> Json:
        """One structure."""
        return self._wire.json("GET", path("structures", structure_id))

    def download(self, structure_id: str, artifact: str, target: Path, job_id: str | None = None) -> Path:
        """Save an artifact, e.g. `model.onnx` (as a job trained it); the file appears when it is complete."""
        where = path("structures", structure_id, "artifacts", artifact)
        response = self._wire.send("GET", where, params=given({"job": job_id}))
        save(target, response.content)
        return target

    def _stream(self, where: str, headers: Mapping[str, str]) -> Iterator[Json]:
        with self._wire.http.stream("GET", where, headers=dict(headers), timeout=SILENCE) as response:
            if response.status_code in GATEWAY:
                return
            if not response.is_success:
                response.read()
                refuse(response)
            for event in httpx2.EventSource(response):
                if event.data:
                    yield {"id": event.id, "event": event.event, "data": json.loads(event.data)}


def path(*parts: str) -> str:
    """A path below /v1; names that hold a slash stay one part.

    Raises:
        InvalidInput: a part is empty, or leads elsewhere.
    """
    if wrong := [part for part in parts if part in ("", ".", "..")]:
        raise InvalidInput(f"{wrong[0]!r} is no name")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def given(query: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a query that were given."""
    return {name: value for name, value in query.items() if value is not None and value != []}
