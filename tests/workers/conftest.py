from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sqlalchemy import select

from service.settings import get_settings
from service.store.models import Dataset
from service.store.session import transaction
from workers.datasets import Data, prepare


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever tests ran before: the numbers that a test draws without a generator of its own are always the same."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Data:
    """240 images of 8x8 whose brightness tells their class, of 4 classes."""
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 60)
    pixels = np.clip(random.normal(40 + 50 * labels[:, None, None, None], 20, (240, 8, 8, 3)), 0, 255).astype(np.uint8)
    return prepare((pixels, labels), (pixels[:80], labels[:80]), 4, flip=True, validation=40, seed=0)


@pytest.fixture
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setenv("SECATEURS_THREADS", "1")
    get_settings.cache_clear()
    with transaction() as session:
        if session.scalar(select(Dataset).where(Dataset.name == "digits")) is None:
            facts = {"classes": 10, "train_images": 1437, "test_images": 360, "image_size": 8}
            session.add(Dataset(name="digits", kind="digits", **facts))
    yield
    torch.set_num_threads(threads)
