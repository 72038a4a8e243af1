"""Devices, and what they shall measure."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Self

from fastapi import APIRouter, Path
from pydantic import AfterValidator, BaseModel, Field
from sqlalchemy.orm import Session

from latency_profiler.calibration import Trust, Verdict, judge
from latency_profiler.cost import Statistic
from latency_profiler.lookup_table import Fit
from latency_profiler.spaces.registry import CLASSES, IMAGE_SIZES, WIDTHS
from service.api.auth import Reader, Submitter
from service.api.problems import responses
from service.choices import LastLayer
from service.fields import Model, Name, Text
from service.store import devices, measurements, progress, repricing, work
from service.store.models import Device, LookupTable, WorkState
from service.store.progress import Progress
from service.store.session import snapshot, transaction

router = APIRouter(prefix="/devices", tags=["devices"])
DevicePath = Annotated[Name, Path()]
LARGEST_FACTS = 64 << 10
DEEPEST_FACTS = 32


def _storable_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts that every database can store and that have one canonical form."""
    try:
        text = json.dumps(facts, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (ValueError, RecursionError) as error:
        raise ValueError("must be JSON with finite numbers and valid Unicode") from error
    if size > LARGEST_FACTS:
        raise ValueError(f"must be at most {LARGEST_FACTS} bytes of JSON, not {size}")
    if "\\u0000" in text:
        raise ValueError("must not contain the character NUL")
    level: list[Any] = [facts]
    for _ in range(DEEPEST_FACTS):
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise ValueError(f"must be nested at most {DEEPEST_FACTS} deep")
    return facts


def _inside(value: Any) -> list[Any]:
    """The objects and lists in an object or list."""
    values = value.values() if isinstance(value, dict) else value
    return [one for one in values if isinstance(one, dict | list)]


Facts = Annotated[dict[str, Any], AfterValidator(_storable_facts)]
Seconds = Annotated[float, Field(ge=1e-12, lt=1000)]
Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0, lt=1000)]


class DeviceRequest(Model):
    """A device to be registered."""

    name: Name
    description: Annotated[Text, Field(max_length=1000)] = ""


class FitView(BaseModel):
    """How the sum of layers becomes a network's latency in a space; errors are shares of the measured time."""

    space_key: str
    statistic: Statistic = Field(description="of the networks' runs: the median, or what nine of ten take")
    overhead_ms: float
    slope: float
    fitted_on: int
    held_out: int
    mean_error: float
    max_error: float
    within_5: float | None = Field(description="share of the held-out networks that are off by at most 5 %")
    within_10: float | None
    spearman: float | None
    bias: float | None = Field(description="mean error with its sign, positive where prices are too high")
    noise_floor: float | None = Field(
        description="mean difference between two measurements of one network, as they ran"
    )
    terms: dict[str, float] = Field(
        description="weights of what layers cost in a network beyond the slope: bytes, and families of layers"
    )
    trust: Trust
    reason: str | None = Field(description="why it is not trusted")

    @classmethod
    def of(cls, space_key: str, statistic: Statistic, fit: Fit, verdict: Verdict) -> Self:
        """As it is shown."""
        facts = {**asdict(fit), "overhead_ms": 1000 * fit.overhead}
        return cls(space_key=space_key, statistic=statistic, trust=verdict.trust, reason=verdict.reason, **facts)


class SpaceUse(BaseModel):
    """How many of a space's layers are measured themselves, and how many are interpolated (null until all is done)."""

    space_key: str
    layers: int
    measured: int
    interpolated: int | None


class TableView(BaseModel):
    """The current lookup table of a device."""

    id: str
    version: int
    entries: int
    networks: int
    unsteady: int = Field(description="layers and networks whose median stayed uncertain")
    stale: str | None = Field(description="why its numbers no longer hold")
    drift: float | None = Field(description="by what share its canary layers took longer when measured again")
    checked_at: float | None = Field(description="when that was")
    spaces: list[SpaceUse]
    fits: list[FitView]


class PricingView(BaseModel):
    """How many structures of a space were found, and how many have their latency from the device's current table."""

    space_key: str
    structures: int
    priced: int


class DeviceView(BaseModel):
    """A device; `fingerprint` and `table` are null until its agent has come."""

    name: str
    description: str
    created_at: float
    beat_at: float | None
    alive: bool = Field(description="whether the agent was heard in the last minute")
    fingerprint: dict[str, Any] | None = Field(description="what the agent runs on: `sha256` and `facts`")
    measured: int = Field(description="layers and networks in the current table")
    waiting: int
    leased: int
    failed: int
    table: TableView | None
    pricing: list[PricingView]


class DeviceList(BaseModel):
    """All devices by name."""

    items: list[DeviceView]


class NewDevice(BaseModel):
    """A device that was just registered; the token is shown only this once."""

    name: str
    description: str
    created_at: float
    token: str


class ProfileRequest(Model):
    """A space whose layers shall be measured."""

    space: Name
    image_size: Annotated[int, Field(ge=IMAGE_SIZES[0], le=IMAGE_SIZES[1])] = 224
    width: Annotated[float, Field(ge=WIDTHS[0], le=WIDTHS[1])] = 1.0
    classes: Annotated[int, Field(ge=CLASSES[0], le=CLASSES[1])] = 1000
    last_layer: LastLayer = "free"
    mode: measurements.Mode = "sampled"
    """`on-demand` measures nothing before a job needs the space, and then so many points."""
    points: Annotated[int, Field(ge=3, le=31)] = measurements.SAMPLED
    """Widths per slot of a sampled profile; the rest is interpolated."""
    refine: bool = True
    """Measure more widths where those between measured ones are priced badly; what was asked first stands."""
    again: bool = False
    """Measure all of the device's profiles anew, for the next version of its table."""

    def space_arguments(self) -> dict[str, Any]:
        """Arguments of `get_space`."""
        return {
            "name": self.space, "image_size": self.image_size, "width": self.width, "classes": self.classes,
            "free_last": self.last_layer == "free",
        }  # fmt: skip


class ProfileView(BaseModel):
    """How far a profile is; `fit` is null until all of it is measured."""

    id: str
    space: str
    space_key: str
    mode: str
    points: int
    refined: int | None = Field(description="layers that were added where interpolation failed; null: none are")
    planned: int
    done: int
    failed: int
    waiting: int
    seconds_left: float | None = Field(
        description="from the rate since the first upload of the last half hour; null before the second"
    )
    fit: FitView | None

    @classmethod
    def of(cls, one: Progress, fit: FitView | None) -> Self:
        """As it is shown."""
        row = one.profile
        return cls(
            id=row.id, space=row.space["name"], space_key=row.space_key, mode=row.mode, points=row.points,
            refined=None if row.refined is None else len(row.refined),
            planned=one.planned, done=one.done, failed=one.failed, waiting=one.waiting,
            seconds_left=one.seconds_left, fit=fit,
        )  # fmt: skip


class ProfileList(BaseModel):
    """A device's profiles, oldest first."""

    items: list[ProfileView]


@router.post("", status_code=201, responses=responses(409))
def register(request: DeviceRequest, _caller: Submitter) -> NewDevice:
    """Register a device; its agent's token is in this answer and nowhere else."""
    with transaction() as session:
        device, token = devices.register(session, request.name, request.description)
        session.refresh(device)
        return NewDevice(
            name=device.name, description=device.description, created_at=device.created_at, token=token
        )  # fmt: skip


@router.get("")
def list_devices(_caller: Reader) -> DeviceList:
    """All devices."""
    with snapshot() as session:
        return DeviceList(items=[_show(session, device) for device in devices.list_all(session)])


@router.get("/{device}", responses=responses(404))
def read(device: DevicePath, _caller: Reader) -> DeviceView:
    """One device: fingerprint, last beat, quality of its table, open work."""
    with snapshot() as session:
        return _show(session, devices.get(session, device))


@router.delete("/{device}", status_code=204, responses=responses(404, 409))
def delete(device: DevicePath, _caller: Submitter) -> None:
    """Forget a device with its tables and its token; refused while an unfinished job names it."""
    with transaction() as session:
        devices.delete(session, device)


@router.post("/{device}/profiles", status_code=202, responses=responses(404))
def profile(device: DevicePath, request: ProfileRequest, _caller: Submitter) -> ProfileView:
    """Have the layers of a space measured; asking again gives what failed another chance."""
    with transaction() as session:
        row = devices.get(session, device)
        devices.lock(session, row)
        if request.again:
            measurements.measure_anew(session, row)
        wanted = measurements.request_profile(
            session, row, request.space_arguments(), request.mode, request.points, request.refine
        )  # fmt: skip
        work.retry_failed(session, wanted)
        session.flush()
        return next(view for view in _profiles(session, row) if view.id == wanted.id)


@router.get("/{device}/profiles", responses=responses(404))
def list_profiles(device: DevicePath, _caller: Reader) -> ProfileList:
    """How far a device's profiles are."""
    with snapshot() as session:
        return ProfileList(items=_profiles(session, devices.get(session, device)))


def _show(session: Session, device: Device) -> DeviceView:
    counts = measurements.counts(session, device)
    fingerprint = measurements.current_fingerprint(session, device)
    current = measurements.current_table(session, device)
    table = _table(session, device, current) if current else None
    return DeviceView(
        name=device.name, description=device.description, created_at=device.created_at, beat_at=device.beat_at,
        alive=devices.alive(session, device),
        fingerprint={"sha256": fingerprint.sha256, "facts": fingerprint.facts} if fingerprint else None,
        measured=table.entries + table.networks if table else 0, waiting=counts[WorkState.WAITING],
        leased=counts[WorkState.LEASED], failed=counts[WorkState.FAILED], table=table,
        pricing=[PricingView(**asdict(one)) for one in repricing.progress(session, device)],
    )  # fmt: skip


def _table(session: Session, device: Device, table: LookupTable) -> TableView:
    entries, networks = measurements.size(session, table.id)
    spaces = {one.profile.space_key: _use(one) for one in progress.of_device(session, device)}
    return TableView(
        id=table.id, version=table.version, entries=entries, networks=networks,
        unsteady=measurements.unsteady(session, table.id), stale=table.stale, drift=table.drift,
        checked_at=table.checked_at, spaces=list(spaces.values()),
        fits=[fit for statistic in Statistic for fit in _fits(session, table, statistic).values()],
    )  # fmt: skip


def _fits(session: Session, table: LookupTable | None, statistic: Statistic = Statistic.P50) -> dict[str, FitView]:
    """Space key → fit of a table, by name."""
    if table is None:
        return {}
    found = sorted(measurements.fits(session, table.id, statistic).items())
    return {key: FitView.of(key, statistic, fit, judge(fit, table.stale, table.drift or 0.0)) for key, fit in found}


def _use(one: Progress) -> SpaceUse:
    rest = one.layers - one.measured
    return SpaceUse(
        space_key=one.profile.space_key, layers=one.layers, measured=one.measured,
        interpolated=rest if one.priced and one.waiting == 0 else None,
    )  # fmt: skip


def _profiles(session: Session, device: Device) -> list[ProfileView]:
    fits = _fits(session, measurements.current_table(session, device))
    return [ProfileView.of(one, fits.get(one.profile.space_key)) for one in progress.of_device(session, device)]
