import numpy as np
import pytest
import torch

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
