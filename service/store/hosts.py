"""Hosts: the machines on which agents run. One device of a host measures at a time, or each would measure the other.

A device holds its host like a lease: it expires, is renewed while the agent measures, and given back with the results.
"""

from sqlalchemy import and_, case, null, or_, update
from sqlalchemy.orm import Session

from service.store.bulk import insert_missing
from service.store.models import Device, Host, now

TURN_SECONDS = 10.0
"""How long a device that was sent away is waited for: some of its polls."""


def take(session: Session, host: str, device: Device, seconds: float) -> bool:
    """Whether the device may measure on its host now; if not, its turn is next."""
    row = {"id": host, "device_id": None, "lease_until": 0.0, "wanted_by": None, "wanted_until": 0.0}
    insert_missing(session, Host, [row])
    mine, free = Host.device_id == device.id, or_(Host.device_id.is_(None), Host.lease_until < now())
    turn = or_(Host.wanted_by.is_(None), Host.wanted_by == device.id, Host.wanted_until < now())
    taken = session.execute(
        update(Host)
        .where(Host.id == host, or_(and_(free, turn), and_(mine, Host.lease_until >= now())))
        .values(
            device_id=device.id, lease_until=now() + seconds,
            wanted_by=case((Host.wanted_by == device.id, null()), else_=Host.wanted_by),
        )
        .returning(Host.id),
        execution_options={"synchronize_session": False},
    ).all()  # fmt: skip
    if not taken:
        session.execute(
            update(Host).where(Host.id == host, turn).values(wanted_by=device.id, wanted_until=now() + TURN_SECONDS),
            execution_options={"synchronize_session": False},
        )
    return bool(taken)


def renew(session: Session, device: Device, seconds: float) -> None:
    """Keep the hosts that a device holds for some more seconds."""
    session.execute(
        update(Host).where(Host.device_id == device.id, Host.lease_until >= now()).values(lease_until=now() + seconds),
        execution_options={"synchronize_session": False},
    )


def release(session: Session, device: Device) -> None:
    """Give back what a device holds."""
    session.execute(
        update(Host).where(Host.device_id == device.id).values(device_id=None, lease_until=0.0),
        execution_options={"synchronize_session": False},
    )
