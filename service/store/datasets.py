"""Datasets that structures can be trained on."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from latency_profiler.errors import AlreadyExists, NotFound
from service.store.models import Dataset


def add(session: Session, name: str, kind: str, path: str | None, **facts: int) -> Dataset:
    """A new dataset; `facts` are `classes`, `image_size`, `train_images` and `test_images`.

    Raises:
        AlreadyExists: the name is taken.
    """
    dataset = Dataset(name=name, kind=kind, path=path, **facts)
    session.add(dataset)
    try:
        session.flush()
    except IntegrityError as error:
        raise AlreadyExists("dataset", name) from error
    return dataset


def find(session: Session, name: str) -> Dataset | None:
    """The dataset of this name, if there is one."""
    return session.scalar(select(Dataset).where(Dataset.name == name))


def get(session: Session, name: str) -> Dataset:
    """One dataset.

    Raises:
        NotFound: none has this name; says which there are.
    """
    dataset = find(session, name)
    if dataset is None:
        known = session.scalars(select(Dataset.name).order_by(Dataset.name).limit(20)).all()
        raise NotFound("dataset", name, known)
    return dataset


def after(session: Session, name: str | None, limit: int) -> Sequence[Dataset]:
    """Datasets by name, from behind one."""
    query = select(Dataset).order_by(Dataset.name).limit(limit)
    return session.scalars(query if name is None else query.where(Dataset.name > name)).all()
