"""Trained PruningNets, shared by all jobs that would train the same one."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import or_, select, tuple_, update
from sqlalchemy.orm import Session

from latency_profiler.errors import NotFound
from service.store.blobs import blob_path
from service.store.models import TERMINAL, Dataset, Job, PruningNet

NAMED = select(PruningNet, Dataset.name).join(Dataset, Dataset.id == PruningNet.dataset_id)


def find(
    session: Session, family: str, least: float, most: float, job_id: str, key: str | None = None
) -> PruningNet | None:  # fmt: skip
    """A net of a family whose band holds these FLOPs of uniform networks, or that of a key, if it is not None.

    It is trained, or being trained by a live job.
    """
    band = (PruningNet.family == family, PruningNet.band_low <= least, PruningNet.band_high >= most)
    query = select(PruningNet).where(*band) if key is None else select(PruningNet).where(PruningNet.key == key)
    nets = session.scalars(query.order_by(PruningNet.ready.desc(), PruningNet.created_at, PruningNet.key))
    return next((net for net in nets if _usable(session, net, job_id)), None)


def _usable(session: Session, net: PruningNet, job_id: str) -> bool:
    """Whether it is trained, its weights being where they should be, or being trained."""
    if not net.ready:
        return _trained_elsewhere(session, net, job_id)
    return net.checkpoint is not None and blob_path(net.checkpoint).is_file()


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


def judge(session: Session, key: str, fidelity: list[dict[str, Any]]) -> None:
    """Store how well a net ranks structures; guarded as `save` is."""
    session.execute(update(PruningNet).where(PruningNet.key == key).values(fidelity=fidelity))


def get(session: Session, key: str) -> PruningNet:
    """A net that is known to exist."""
    return session.get_one(PruningNet, key)


def read(session: Session, key: str) -> tuple[PruningNet, str]:
    """One net and the name of its dataset.

    Raises:
        NotFound: no net has this key.
    """
    row = session.execute(NAMED.where(PruningNet.key == key)).one_or_none()
    if row is None:
        raise NotFound("PruningNet", key)
    return row[0], row[1]


def newest(
    session: Session, *, limit: int, before: tuple[float, str] | None = None, space: str | None = None,
    dataset_id: str | None = None,
) -> Sequence[tuple[PruningNet, str]]:  # fmt: skip
    """Nets and the names of their datasets, the newest first.

    Args:
        before: creation time and key of the net behind which the list begins.
        space: a space's name or its whole key.
    """
    query = NAMED.order_by(PruningNet.created_at.desc(), PruningNet.key.desc()).limit(limit)
    if before is not None:
        query = query.where(tuple_(PruningNet.created_at, PruningNet.key) < tuple_(*before))
    if space is not None:
        named = PruningNet.space_key.startswith(f"{space}@", autoescape=True)
        query = query.where(or_(PruningNet.space_key == space, named))
    if dataset_id is not None:
        query = query.where(PruningNet.dataset_id == dataset_id)
    return [(net, name) for net, name in session.execute(query)]
