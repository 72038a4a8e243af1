"""Images as tensors: the split that a search needs, normalisation, augmentation.

The whole dataset is one uint8 tensor, on the GPU if it has room for it, and a batch is assembled by indexing, so no
worker processes are needed, and all randomness is drawn from generators made of counters, so a resumed run needs
nothing but its counters.

Letters: n images, s their side, b images of a batch.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from latency_profiler.errors import InvalidDataset
from workers.placement import home, place

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
LARGEST_VALIDATION = 5
"""The sub-validation set is at most this part of the training set: a fifth."""
CHUNK = 4096
Told = Callable[[], object]
"""Called whenever something has moved: a large dataset takes longer than a process may be silent."""
HOST = torch.device("cpu")


def generator(seed: int, *counters: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    text = "/".join(map(str, (seed, *counters)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation (3,) of a training set's channels, in pixel values 0..255."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, pixels: Tensor, told: Told = lambda: None) -> "Normalisation":
        """Of images (n, s, s, 3), summed in integers, so that the result depends on no order."""
        total, squares, count = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
        for chunk in torch.split(pixels, CHUNK):
            told()
            values = chunk.reshape(-1, 3).to(torch.int32)
            total += values.sum(dim=0, dtype=torch.int64)
            squares += (values * values).sum(dim=0, dtype=torch.int64)
            count += len(values)
        mean = total.double() / count
        deviation = (squares.double() / count - mean**2).clamp(min=1.0).sqrt()
        return cls(mean.float(), deviation.float())

    def on(self, device: torch.device) -> "Normalisation":
        """The same there."""
        return Normalisation(self.mean.to(device), self.deviation.to(device))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Images (b, s, s, 3) as channels-last float images (b, 3, s, s)."""
        scaled = (pixels.float() - self.mean.to(pixels.device)) / self.deviation.to(pixels.device)
        return scaled.permute(0, 3, 1, 2)


class Batches:
    """A part of a dataset, read in batches.

    Args:
        flip: whether a mirrored image means the same.
        augment: whether training sees the images shifted and, where that is allowed, mirrored.
        told: called before every batch of those that are read as they are.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, indices: Tensor, normalise: Normalisation, flip: bool,
        augment: bool = True, told: Told = lambda: None,
    ) -> None:  # fmt: skip
        self.told = told
        self._pixels, self._labels, self._indices = pixels, labels, indices
        self._normalise, self._flip, self._augment = normalise, flip, augment
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self._pixels.shape[1]

    def steps(self, batch_size: int) -> int:
        """Training batches of an epoch; a last one that is not full is left out (batch norm needs equal batches)."""
        return max(1, len(self) // batch_size)

    def training(
        self, batch_size: int, seed: int, iteration: int, device: torch.device, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """The batch of an iteration, or a part of it: images (b, 3, s, s), labels (b,)."""
        epoch, step = divmod(iteration, self.steps(batch_size))
        chosen = self._order(seed, epoch)[step * batch_size : (step + 1) * batch_size]
        pixels, labels = self._taken(chosen)
        if self._augment:
            pixels = _augmented(pixels, self._flip, generator(seed, "augment", iteration))
        return self._on(pixels[part], labels[part], device)

    def plain(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All images as they are, in their order, in batches of nearly equal size."""
        for chosen in self._indices.tensor_split(-(-len(self) // batch_size)):
            self.told()
            yield self._on(*self._taken(chosen), device)

    def unaugmented(self) -> "Batches":
        """The same images, as they are in training too."""
        return self._of(self._indices, augment=False)

    def sample(self, count: int, seed: int) -> "Batches":
        """A fixed random part of at most `count` images."""
        order = torch.randperm(len(self), generator=generator(seed, "sample"))[:count]
        return self._of(self._indices[order])

    def _of(self, indices: Tensor, augment: bool = True) -> "Batches":
        return Batches(self._pixels, self._labels, indices, self._normalise, self._flip, augment, self.told)

    def _shuffled(self, seed: int, epoch: int) -> Tensor:
        return self._indices[torch.randperm(len(self), generator=generator(seed, "shuffle", epoch))]

    def _taken(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        chosen = place(chosen, self._pixels.device)
        return self._pixels[chosen], self._labels[chosen]

    def _on(self, pixels: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        return self._normalise(place(pixels, device)), place(labels, device)


@dataclass(frozen=True)
class Data:
    """A dataset, split for a search. The test part is touched only by the final score."""

    classes: int
    image_size: int
    training: Batches
    """The whole training set: what winners are trained on."""
    sub_training: Batches
    """What the PruningNet is trained and its batch norms are recalibrated on."""
    sub_validation: Batches
    """What candidates are scored on."""
    test: Batches


def prepare(
    train: tuple[Pixels, Labels], test: tuple[Pixels, Labels], classes: int, *, flip: bool, validation: int, seed: int,
    device: torch.device = HOST, told: Told = lambda: None,
) -> Data:  # fmt: skip
    """A split dataset from images (n, s, s, 3) with labels (n,), for work on `device`.

    `validation` images are split off the training set, at most a fifth of it, chosen by `seed`; `told` is called
    whenever something has moved, here and where images are read.

    Raises:
        InvalidDataset: too few training images to split.
    """
    (pixels, labels), (test_pixels, test_labels) = (tuple(map(torch.from_numpy, part)) for part in (train, test))
    normalise = Normalisation.of(pixels, told).on(device)
    kept, held = split(labels, min(validation, len(labels) // LARGEST_VALIDATION), seed)
    if not len(held) or not len(kept):
        raise InvalidDataset(f"{len(labels)} training images are too few for a search; at least 10 are needed")

    where = home(pixels.nbytes + test_pixels.nbytes, device)
    pixels, labels, test_pixels, test_labels = (one.to(where) for one in (pixels, labels, test_pixels, test_labels))

    def part(indices: Tensor) -> Batches:
        return Batches(pixels, labels, indices, normalise, flip, told=told)

    return Data(
        classes, pixels.shape[1], part(torch.arange(len(labels))), part(kept), part(held),
        Batches(test_pixels, test_labels, torch.arange(len(test_labels)), normalise, flip, told=told),
    )  # fmt: skip


def split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the others, and of `count` images with the classes' shares kept as near as whole images allow."""
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    ranks = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # The k-th of m images of a class stands at (k + 1/2) / m, so any prefix holds every class in proportion.
    by_rank = torch.argsort(ranks[order], stable=True)
    chosen = order[by_rank]
    return chosen[count:].sort().values, chosen[:count].sort().values


def _augmented(pixels: Tensor, flip: bool, random: torch.Generator) -> Tensor:
    """Each image (b, s, s, 3) shifted by at most s // 8 with black behind it, and mirrored in half of the cases."""
    count, size = pixels.shape[:2]
    margin = size // 8
    shifts = torch.randint(0, 2 * margin + 1, (2, count, 1), generator=random)
    rows, columns = shifts + torch.arange(size)  # (b, s) each
    mirrored = torch.rand(count, 1, generator=random) < 0.5
    if flip:
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded, here = functional.pad(pixels, (0, 0, margin, margin, margin, margin)), pixels.device
    images = torch.arange(count, device=here)
    return padded[images[:, None, None], place(rows, here)[:, :, None], place(columns, here)[:, None, :]]
