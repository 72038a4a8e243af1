"""The networks that write weights: what each was trained for, and how well it ranks structures."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel

from service.api.auth import require
from service.api.jobs import SpaceKey
from service.api.pages import Cursor, Limit, Page, decode_cursor, page
from service.api.problems import responses
from service.fields import Name
from service.store import datasets, pruning_nets
from service.store.models import PruningNet
from service.store.session import snapshot

router = APIRouter(prefix="/pruning-nets", tags=["pruning-nets"], dependencies=[Depends(require("read"))])
Key = Annotated[str, Path(max_length=64, pattern=r"^[0-9a-z]+$")]


class Fidelity(BaseModel):
    """Kendall's tau between one way to judge random structures of a budget and their accuracy trained from scratch.

    `tau` is null where all structures came out alike.
    """

    job_id: str
    weights: Literal["generated", "shared"]
    recalibrated: bool
    rank_by: Literal["accuracy", "loss"]
    tau: float | None
    p_value: float | None
    structures: int
    epochs: int
    """Of each training from scratch."""


class PruningNetRead(BaseModel):
    """A PruningNet; `band` are the multiply-adds between which structures are sampled, null where all are."""

    key: str
    space_key: str
    dataset: str
    settings: dict[str, Any]
    band: tuple[float, float] | None
    ready: bool
    trainer_job_id: str | None
    """The job that trains it or has trained it."""
    epochs: int
    """That it has behind it."""
    history: list[dict[str, float]]
    """Loss, accuracy and learning rate of each of them."""
    fidelity: list[Fidelity]
    """As the last job that asked for it has found; empty where none has."""
    created_at: float


@router.get("", responses=responses(404))
def list_pruning_nets(
    limit: Limit = 50,
    cursor: Cursor = None,
    space: SpaceKey | None = None,
    dataset: Annotated[Name | None, Query()] = None,
) -> Page[PruningNetRead]:
    """PruningNets, the newest first."""
    position = decode_cursor(cursor, float, str)
    before = (float(position[0]), str(position[1])) if position else None
    with snapshot() as session:
        dataset_id = datasets.get(session, dataset).id if dataset else None
        rows = pruning_nets.newest(session, limit=limit + 1, before=before, space=space, dataset_id=dataset_id)
    return page(rows, limit, lambda row: _read(*row), lambda row: [row[0].created_at, row[0].key])


@router.get("/{pruning_net}", responses=responses(404))
def read_pruning_net(pruning_net: Key) -> PruningNetRead:
    """One PruningNet."""
    with snapshot() as session:
        return _read(*pruning_nets.read(session, pruning_net))


def _read(row: PruningNet, dataset: str) -> PruningNetRead:
    history = row.progress.get("counters", {}).get("history", [])
    return PruningNetRead(
        key=row.key, space_key=row.space_key, dataset=dataset, settings=row.settings,
        band=(row.band_low, row.band_high) if row.settings.get("band") else None, ready=row.ready,
        trainer_job_id=row.trainer_job_id, epochs=len(history), history=history, fidelity=row.fidelity,
        created_at=row.created_at,
    )  # fmt: skip
