"""Devices: machines that measure, and the tokens of their agents."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete as remove
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

from latency_profiler.cost import Statistic, latency_name
from latency_profiler.errors import AlreadyExists, NotFound, SecateursError
from service.store.keys import issue_secret
from service.store.models import TERMINAL, Device, Job, LookupTable, Pricing, Skyband, StructureLatency, clock, now

ALIVE_SECONDS = 60.0
"""A device whose agent has not been heard for so long is away."""


class DeviceInUse(SecateursError):
    """Jobs that have not ended name the device.

    Attributes:
        name, job_ids: the device and the jobs.
    """

    def __init__(self, name: str, job_ids: Sequence[str]) -> None:
        self.name, self.job_ids = name, tuple(job_ids)
        super().__init__(f"{len(job_ids)} unfinished jobs need {name!r} (first: {job_ids[0]}); cancel them first")


def register(session: Session, name: str, description: str = "") -> tuple[Device, str]:
    """A new device and its agent's token, which is not stored and cannot be shown again.

    Raises:
        AlreadyExists: the name is taken.
    """
    token = issue_secret("device")
    device = Device(name=name, description=description, token_prefix=token.prefix, token_digest=token.digest)
    session.add(device)
    try:
        session.flush()
    except IntegrityError as error:
        raise AlreadyExists("device", name) from error
    return device, token.text


def new_token(session: Session, name: str) -> str:
    """Another token for a device's agent; the one before is worthless from now on.

    Raises:
        NotFound: no device has this name.
    """
    device, token = get(session, name), issue_secret("device")
    device.token_prefix, device.token_digest = token.prefix, token.digest
    return token.text


def get(session: Session, name: str) -> Device:
    """One device.

    Raises:
        NotFound: no device has this name; says which there are.
    """
    device = session.scalar(select(Device).where(Device.name == name))
    if device is None:
        raise NotFound("device", name, known(session))
    return device


def known(session: Session) -> Sequence[str]:
    """The first names, for a message."""
    return session.scalars(select(Device.name).order_by(Device.name).limit(20)).all()


def list_all(session: Session) -> Sequence[Device]:
    """All devices by name."""
    return session.scalars(select(Device).order_by(Device.name)).all()


def delete(session: Session, name: str) -> None:
    """Forget a device, its tables and its token.

    Raises:
        NotFound: no device has this name.
        DeviceInUse: a job that has not ended names it.
    """
    device = get(session, name)
    running = session.execute(select(Job.id, Job.spec).where(Job.state.not_in(TERMINAL)).order_by(Job.created_at))
    if jobs := [job_id for job_id, spec in running if name in _named(spec)]:
        raise DeviceInUse(name, jobs)
    names = [latency_name(device.id, statistic) for statistic in Statistic]
    session.execute(remove(Skyband).where(Skyband.cost.in_(names)))
    session.delete(device)


def lock(session: Session, device: Device) -> None:
    """Lock a device until the commit and read it again: whoever changes its tables or work takes turns.

    Raises:
        NotFound: somebody has deleted it.
    """
    _refresh(session, device, with_for_update=True)


def beat(session: Session, device: Device) -> None:
    """Lock a device like `lock`, and note that its agent was heard."""
    session.execute(update(Device).where(Device.id == device.id).values(beat_at=now()))
    _refresh(session, device)


def _refresh(session: Session, device: Device, *, with_for_update: bool = False) -> None:
    name = device.name
    try:
        session.refresh(device, with_for_update=with_for_update)
    except InvalidRequestError as error:
        raise NotFound("device", name) from error


def forget_prices(session: Session, device: Device, table_id: str) -> None:
    """Where a table of another fingerprint becomes the current one: what structures take here is not known any more."""
    old, new = session.get_one(LookupTable, device.table_id), session.get_one(LookupTable, table_id)
    if old.fingerprint_id != new.fingerprint_id:
        for priced in (StructureLatency, Pricing):
            session.execute(remove(priced).where(priced.device_id == device.id))


def alive(session: Session, device: Device) -> bool:
    """Whether the agent was heard lately, by the database's clock."""
    return device.beat_at is not None and clock(session) - device.beat_at < ALIVE_SECONDS


def _named(spec: dict[str, Any]) -> set[str]:
    return {*spec["measure_on"], *(bound["device"] for bound in spec["constraints"] if bound.get("device"))}
