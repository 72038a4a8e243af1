import numpy as np
import pytest
import torch

from latency_profiler.errors import InvalidDataset
from workers.datasets import Data, generator, prepare, split
from workers.evaluation import Kept

CPU = torch.device("cpu")


def test_the_split_is_disjoint_complete_stratified_and_seeded() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100, generator=generator(0))]
    kept, held = split(labels, 20, 1)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(100))
    assert labels[held].bincount().tolist() == [12, 6, 2]
    assert torch.equal(split(labels, 20, 1)[1], held)
    assert not torch.equal(split(labels, 20, 2)[1], held)


def test_validation_is_at_most_a_fifth_and_search_parts_come_from_training(data: Data) -> None:
    assert len(data.training) == 240
    assert (len(data.sub_training), len(data.sub_validation)) == (200, 40)
    pixels, labels = np.zeros((20, 8, 8, 3), np.uint8), np.tile(np.arange(2), 10)
    assert len(prepare((pixels, labels), (pixels, labels), 2, flip=True, validation=999, seed=0).sub_validation) == 4
    with pytest.raises(InvalidDataset, match="too few"):
        prepare((pixels[:4], labels[:4]), (pixels, labels), 2, flip=True, validation=999, seed=0)


def test_training_images_are_normalised(data: Data) -> None:
    images = torch.cat([batch for batch, _ in data.training.plain(64, CPU)])
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_sees_every_image_once_and_depends_on_its_counters(data: Data) -> None:
    labels = [data.training.training(48, 5, i, CPU)[1] for i in range(5)]
    assert torch.cat(labels).bincount().tolist() == [60] * 4
    one, same, other = (data.training.training(48, 5, i, CPU)[0] for i in (2, 2, 3))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_shifts_and_mirrors(flip: bool) -> None:
    """Of one image whose pixels all differ: every augmented one is among its 3 x 3 shifts, mirrored or not."""
    pixels = np.arange(1, 8 * 8 * 3 + 1, dtype=np.uint8).reshape(1, 8, 8, 3).repeat(300, axis=0)
    data = prepare((pixels, np.arange(300) % 2), (pixels, np.arange(300) % 2), 2, flip=flip, validation=30, seed=0)
    plain = torch.from_numpy(pixels[:1]).double()
    mean, deviation = plain.mean((0, 1, 2)), plain.std((0, 1, 2), correction=0)
    padded = torch.nn.functional.pad(plain.permute(0, 3, 1, 2), (1, 1, 1, 1))[0]
    shifts = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    known = {
        tuple(s.flatten().int().tolist()): (k, m) for k, t in enumerate(shifts) for m, s in ((0, t), (1, t.flip(2)))
    }
    images = data.training.training(300, 0, 0, CPU)[0].double()
    found = (images * deviation[None, :, None, None] + mean[None, :, None, None]).round().int()
    kinds = [known[tuple(image.flatten().tolist())] for image in found]
    assert {k for k, _ in kinds} == set(range(9))
    mirrored = sum(m for _, m in kinds) / 300
    assert 0.4 < mirrored < 0.6 if flip else mirrored == 0


def test_reading_images_as_they_are_says_that_it_goes_on() -> None:
    said, pixels = list[int](), np.zeros((50, 4, 4, 3), dtype=np.uint8)
    part = (pixels, np.arange(50) % 2)
    data = prepare(part, part, 2, flip=False, validation=10, seed=0, told=lambda: said.append(1))
    assert len(said) == 1, "the one chunk of the normalisation"
    said.clear()
    few = data.training.sample(20, 0)
    once = Kept(few)
    for images in (data.test, few, data.training.unaugmented(), once, once):
        batches = len(list(images.plain(10, CPU)))
        assert len(said) >= batches > 1
        said.clear()
