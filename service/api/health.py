"""Is it alive, is it ready, what is it doing: open to everybody, and without a name of anything."""

from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from service import admin
from service.api.problems import RETRY_SECONDS, ProblemResponse, declared, problem
from service.store import statistics
from service.store.session import snapshot, takes_writes

router = APIRouter(tags=["health"])


class Root(BaseModel):
    """What answers here, for whoever opens the address."""

    service: Literal["secateurs"] = "secateurs"
    contract: Literal["/openapi.json"] = "/openapi.json"
    health: Literal["/healthz"] = "/healthz"
    how: str = "there are no web pages: README.md shows the command line and the calls of /v1"


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """It can do its work. A silent broker does not make it unready: jobs are accepted, and begin when it is back."""

    status: Literal["ready"] = "ready"
    database: Literal["ok"] = "ok"
    broker: Literal["ok", "silent", "not asked yet"]


@router.get("/")
def root() -> Root:
    """Where to go on."""
    return Root()


@router.get("/healthz")
def alive() -> Alive:
    """Whether the process answers."""
    return Alive()


@router.get("/readyz", response_model=Ready, responses={503: declared(503)})
def ready(request: Request) -> Ready | ProblemResponse:
    """Whether the database answers, takes writes and has this schema, and whether the broker took the last message."""
    try:
        admin.check_schema()
        writable = takes_writes()
    except admin.SchemaMismatch as error:
        return problem(503, "schema-mismatch", str(error))
    except SQLAlchemyError as error:
        detail = f"the database does not answer ({type(error).__name__})"
        return problem(503, "database-unavailable", detail, {"Retry-After": str(RETRY_SECONDS)})
    if not writable:
        retry = {"Retry-After": str(RETRY_SECONDS)}
        return problem(503, "database-unavailable", "the database takes no writes", retry)
    rang = getattr(request.app.state, "rang", None)
    return Ready(broker="not asked yet" if rang is None else "ok" if rang else "silent")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 503: declared(503)})
def metrics() -> Response:
    """Metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_StoreCollector())
    return Response(generate_latest(REGISTRY) + generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _StoreCollector(Collector):
    """Figures that are read from the database when they are asked for."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with snapshot() as session:
            figures = statistics.read(session)
        yield _gauge("secateurs_jobs", "Jobs by state", "state", figures.jobs)
        yield _gauge("secateurs_devices", "Devices by when their agent last beat", "agent", figures.devices)
        yield GaugeMetricFamily("secateurs_candidates", "Candidates stored", figures.candidates)
        yield GaugeMetricFamily("secateurs_claimable_jobs", "Jobs that wait for a worker", figures.claimable)
        yield GaugeMetricFamily(
            "secateurs_oldest_claimable_seconds", "How long the oldest of them has waited", figures.oldest
        )


def _gauge(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=[label])
    for value, count in sorted(values.items()):
        gauge.add_metric([value], count)
    return gauge
