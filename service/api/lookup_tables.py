"""Lookup tables as they come and go: export, import, and what one shows."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Header, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, field_validator

from latency_profiler.foreign_tables import read_foreign
from latency_profiler.layers import Activation, Op
from latency_profiler.spreadsheet import to_csv
from latency_profiler.survey import Survey, survey
from latency_profiler.terms import is_term
from service import broker
from service.api.auth import Reader, Submitter
from service.api.devices import DevicePath, Facts, Seconds, Share, Spread
from service.api.problems import responses
from service.fields import Model, Text
from service.store import devices, exchange, measurements
from service.store.session import snapshot, transaction

LARGEST_TABLE = 128 << 20
"""Bytes of an imported table: its most entries, with their values and conditions."""
router = APIRouter(prefix="/devices", tags=["devices"])
SpaceKey = Annotated[Text, Field(max_length=100)]
Size = Annotated[int, Field(ge=1, le=2**31)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class LayerBody(Model):
    """One layer, as in `latency_profiler.layers.Layer`."""

    op: Op
    c_in: Size
    c_out: Size
    size: Size
    kernel: Size = 1
    stride: Size = 1
    padding: Annotated[int, Field(ge=0, le=2**31)] = 0
    activation: Activation = Activation.NONE
    norm: bool = False
    residual: bool = False


class RawBody(Model):
    """What was measured: seconds, the raw values that they are from, and the conditions."""

    seconds: Seconds
    p90: Seconds | None = None
    iqr: Spread = 0.0
    steady: bool = True
    values: Annotated[list[Seconds], Field(max_length=1000, default_factory=list)]
    conditions: Annotated[Facts | None, Field(description="loops, load, frequency, time, versions, …")] = None


class EntryBody(RawBody):
    """One measured layer."""

    layer: LayerBody
    count: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """How many values there were, where they are not given."""


class NetworkBody(RawBody):
    """One measured network that a fit is from."""

    key: Annotated[Text, Field(min_length=1, max_length=200, pattern=r"\|(fit|held_out|repeated)$")]
    space_key: SpaceKey
    channels: Annotated[list[Size], Field(max_length=500)]
    purpose: Literal["fit", "held_out", "repeated"]


class FitBody(Model):
    """A fit, in seconds."""

    overhead: Annotated[float, Field(gt=-1000, lt=1000)]
    slope: Annotated[float, Field(gt=0, lt=1000)]
    fitted_on: Annotated[int, Field(ge=0, le=2**31)]
    held_out: Annotated[int, Field(ge=0, le=2**31)]
    mean_error: Annotated[float, Field(ge=0, le=1e6)]
    max_error: Annotated[float, Field(ge=0, le=1e6)]
    within_5: Share | None = None
    within_10: Share | None = None
    spearman: Annotated[float, Field(ge=-1.000001, le=1.000001)] | None = None
    bias: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    noise_floor: Annotated[float, Field(ge=0, le=1e6)] | None = None
    terms: Annotated[dict[Text, Weight], Field(max_length=100, default_factory=dict)]

    @field_validator("terms")
    @classmethod
    def _known(cls, terms: dict[str, float]) -> dict[str, float]:
        if unknown := [name for name in terms if not is_term(name)]:
            raise ValueError(f"unknown terms: {', '.join(sorted(unknown))}")
        return terms


class TableBody(Model):
    """A lookup table, as `secateurs devices export` writes it. All times are seconds."""

    device: Annotated[Text, Field(max_length=100)]
    fingerprint: Annotated[Text, Field(max_length=200)]
    facts: Annotated[Facts, Field(description="what the fingerprint is of", default_factory=dict)]
    entries: Annotated[list[EntryBody], Field(max_length=100_000)]
    networks: Annotated[list[NetworkBody], Field(max_length=10_000, default_factory=list)]
    fits: Annotated[dict[SpaceKey, FitBody], Field(max_length=1000, default_factory=dict)]
    p90_fits: Annotated[dict[SpaceKey, FitBody], Field(max_length=1000, default_factory=dict)]


class Imported(BaseModel):
    """What became of an imported table."""

    stored: int = Field(description="entries that were not imported from this source before")
    current: bool = Field(description="false where the device's own agent has opened a table: that one is used")


class ForeignBody(Model):
    """A table in the public format of ProxylessNAS and Once-for-all; all times are milliseconds."""

    source: Annotated[Text, Field(min_length=1, max_length=100)]
    """Where it is from: importing the same again changes nothing."""
    table: Annotated[dict[Text, Any], Field(max_length=100_000)]
    """Key → `{"mean", "count"}`."""


class ForeignImported(Imported):
    """What became of another project's table."""

    skipped: dict[str, str] = Field(description="key → why it is no layer here")


@router.get(
    "/{device}/lookup-table", response_model=TableBody,
    responses={**responses(404), 200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)  # fmt: skip
def export_table(
    device: DevicePath, _caller: Reader,
    format: Annotated[Literal["json", "csv"] | None, Query(description="instead of the header `Accept`")] = None,
    accept: Annotated[str, Header()] = "application/json",
) -> Response:  # fmt: skip
    """The device's current table with all raw values and conditions: JSON, or CSV of its entries."""
    with snapshot() as session:
        document = exchange.export(session, device)
    if format == "csv" or (format is None and accept.startswith("text/csv")):
        return Response(to_csv(document["entries"]), media_type="text/csv")
    return JSONResponse(document)


@router.put("/{device}/lookup-table", responses=responses(404, 413), max_body_size=LARGEST_TABLE)
def import_table(device: DevicePath, table: TableBody, _caller: Submitter, after: BackgroundTasks) -> Imported:
    """Import a table that was measured elsewhere; it is used where the device's own agent has not come."""
    with transaction() as session:
        stored, current = exchange.take(session, devices.get(session, device), table.model_dump(mode="json"))
    if current:
        after.add_task(broker.ring)
    return Imported(stored=stored, current=current)


@router.put("/{device}/lookup-table/proxylessnas", responses=responses(404, 413), max_body_size=LARGEST_TABLE)
def import_foreign_table(
    device: DevicePath, request: ForeignBody, _caller: Submitter, after: BackgroundTasks
) -> ForeignImported:
    """Import what is one layer here of a table in the format of ProxylessNAS; the rest is listed with the reason."""
    foreign = read_foreign(device, f"proxylessnas {request.source}", request.table)
    with transaction() as session:
        stored, current = exchange.take(session, devices.get(session, device), foreign.table.to_json())
    if current:
        after.add_task(broker.ring)
    return ForeignImported(stored=stored, current=current, skipped=foreign.skipped)


@router.get("/{device}/lookup-table/survey", responses=responses(404))
def read_survey(device: DevicePath, _caller: Reader) -> Survey:
    """What the current table shows: the slowest layers, the cost of a multiply-add by operator, covered widths."""
    with snapshot() as session:
        batch = exchange.batch(session, devices.get(session, device))
        return survey(measurements.load_table(session, device), batch)
