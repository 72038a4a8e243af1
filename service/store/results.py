"""What jobs trained from scratch, tested and had measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from latency_profiler.spaces.space import Space
from service.store.candidates import add_structures
from service.store.models import Candidate, Job, Result, Role, Structure

METAPRUNING = "metapruning"


def record(session: Session, job: Job, space: Space, channels: tuple[int, ...], role: Role, **values: Any) -> None:
    """Store a structure that was trained and tested; its latencies follow with `measured`."""
    [structure_id] = add_structures(session, space, [channels])
    session.add(Result(job_id=job.id, structure_id=structure_id, dataset_id=job.dataset_id, role=role, **values))
    session.flush()


def of_job(session: Session, job_id: str) -> Sequence[Result]:
    """A job's results: winners by rank, then the uniform network, then what was trained to judge the proxy."""
    query = select(Result).where(Result.job_id == job_id)
    return session.scalars(query.order_by(Result.role.desc(), Result.rank, Result.id)).all()


def find(session: Session, job_id: str, structure_id: str, role: Role, method: str = METAPRUNING) -> Result | None:
    """The result of one structure of a job, if it was trained already."""
    query = select(Result).where(Result.job_id == job_id, Result.structure_id == structure_id, Result.role == role)
    return session.scalar(query.where(Result.method == method))


def winner(session: Session, job_id: str) -> Result | None:
    """The winner of a job that has a result: of its first method that gives an ordinary network, without masks."""
    job = session.get(Job, job_id)
    result = (job.result if job else None) or {}
    for shown in [result["winner"], *result["methods"].values()] if result else []:
        found = find(session, job_id, shown["structure_id"], Role.WINNER, shown["method"])
        if found is not None and found.weights is not None and found.masks is None:
            return found
    return None


def same_training(session: Session, recipe: str) -> Result | None:
    """An earlier outcome, of any job, of exactly this training."""
    return session.scalar(select(Result).where(Result.recipe == recipe).order_by(Result.id).limit(1))


def judged(session: Session, job_id: str, structure_id: str, role: Role, proxy_accuracy: float) -> None:
    """Store the proxy accuracy of a structure that was trained before it was judged."""
    chosen = (Result.job_id == job_id, Result.structure_id == structure_id, Result.role == role)
    session.execute(update(Result).where(*chosen).values(proxy_accuracy=proxy_accuracy))


def measured(session: Session, result_id: int, seconds: Mapping[str, float]) -> None:
    """Store the whole network's measured seconds per device."""
    session.execute(update(Result).where(Result.id == result_id).values(measured=dict(seconds)))


def candidate_count(session: Session, job_id: str) -> int:
    """How many candidates a job has judged."""
    return session.scalar(select(func.count()).where(Candidate.job_id == job_id)) or 0


def summary(session: Session, result: Result, encoding: Sequence[int] | None) -> dict[str, Any]:
    """A result as the job's JSON shows it; latencies in milliseconds per device."""
    structure = session.get_one(Structure, result.structure_id)
    return {
        "structure_id": structure.id,
        "channels": structure.channels,
        "encoding": list(encoding) if encoding else None,
        "flops": structure.flops,
        "parameters": structure.parameters,
        "predicted_ms": milliseconds(result.predicted),
        "measured_ms": milliseconds(result.measured),
        "proxy_accuracy": result.proxy_accuracy,
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        "reused": result.reused,
        "method": result.method,
        "pruned": result.pruned,
    }


def milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds per device as milliseconds."""
    return {device: value * 1000 for device, value in seconds.items()}
