"""What can be trained on."""

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import require
from service.api.pages import Cursor, Limit, Page, decode_cursor, page
from service.api.problems import responses
from service.fields import Model, Name, Text
from service.images import inspect
from service.settings import get_settings
from service.store import datasets
from service.store.models import Dataset
from service.store.session import snapshot, transaction

router = APIRouter(prefix="/datasets", tags=["datasets"])
BUILT_IN = "digits"


class DatasetRequest(Model):
    """Images below the data root, to be trained on under a name."""

    name: Name
    kind: Literal["folder", "archive", "npz"]
    path: Annotated[Text, Field(min_length=1, max_length=500, description="below the data root")]


class DatasetRead(BaseModel):
    """A dataset."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    kind: str
    path: str | None
    classes: int
    image_size: int
    train_images: int
    test_images: int
    created_at: float


@router.get("", dependencies=[Depends(require("read"))])
def list_datasets(limit: Limit = 50, cursor: Cursor = None) -> Page[DatasetRead]:
    """All datasets, by name."""
    position = decode_cursor(cursor, str)
    with snapshot() as session:
        rows = datasets.after(session, position[0] if position else None, limit + 1)
    return page(rows, limit, DatasetRead.model_validate, lambda row: [row.name])


@router.get("/{dataset}", dependencies=[Depends(require("read"))], responses=responses(404))
def read_dataset(dataset: Name) -> DatasetRead:
    """One dataset."""
    with snapshot() as session:
        return DatasetRead.model_validate(datasets.get(session, dataset))


@router.post(
    "", status_code=201, responses=responses(409),
    dependencies=[Depends(require("submit"))],
)  # fmt: skip
def add_dataset(request: DatasetRequest) -> DatasetRead:
    """Register images that lie below the data root; they are read once to see that they can be."""
    return DatasetRead.model_validate(_add(request.name, request.kind, request.path))


def ensure_built_in() -> None:
    """Register the data that needs no file, if that has not been done."""
    with snapshot() as session:
        known = datasets.find(session, BUILT_IN)
    if known is None:
        _add(BUILT_IN, BUILT_IN, None)


def _add(name: str, kind: str, path: str | None) -> Dataset:
    root: Path = get_settings().data
    facts = inspect(kind, path, root)
    with transaction() as session:
        return datasets.add(
            session, name, kind, path, classes=len(facts.classes), image_size=facts.image_size,
            train_images=facts.train_images, test_images=facts.test_images,
        )  # fmt: skip
