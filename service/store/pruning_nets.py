"""Trained PruningNets, shared by all jobs that would train the same one."""

from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.models import TERMINAL, Job, PruningNet


def find(session: Session, family: str, flops: float, job_id: str) -> PruningNet | None:
    """A net of a family whose band holds a budget's FLOPs: trained, or being trained by another live job."""
    query = select(PruningNet).where(
        PruningNet.family == family, PruningNet.band_low <= flops, PruningNet.band_high >= flops
    )
    nets = session.scalars(query.order_by(PruningNet.ready.desc(), PruningNet.created_at, PruningNet.key))
    return next((net for net in nets if net.ready or _trained_elsewhere(session, net, job_id)), None)


def _trained_elsewhere(session: Session, net: PruningNet, job_id: str) -> bool:
    trainer = session.get(Job, net.trainer_job_id) if net.trainer_job_id != job_id else None
    return trainer is not None and trainer.state not in TERMINAL


def join(session: Session, key: str, job_id: str, **values: Any) -> PruningNet | None:
    """The net for this job to train, new or half trained; None while another live job trains it."""
    net = session.scalar(select(PruningNet).where(PruningNet.key == key).with_for_update())
    if net is None:
        net = PruningNet(key=key, trainer_job_id=job_id, ready=False, progress={}, **values)
        session.add(net)
        session.flush()
    if _trained_elsewhere(session, net, job_id):
        return None
    net.trainer_job_id = job_id
    return net


def save(session: Session, key: str, *, checkpoint: str, progress: dict[str, Any], ready: bool) -> None:
    """Store how far a net is trained; call it in the transaction of the step, which guards it by the job's fence."""
    values = {"checkpoint": checkpoint, "progress": progress, "ready": ready}
    session.execute(update(PruningNet).where(PruningNet.key == key).values(**values))


def get(session: Session, key: str) -> PruningNet:
    """A net that is known to exist."""
    return session.get_one(PruningNet, key)
