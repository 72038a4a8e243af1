"""Files of arrays (.npz) as MedMNIST has them: `train_images`, `train_labels`, `test_images`, `test_labels`, `val_*`.

Headers are looked at before any array is read: an array that claims more than there is in the file is refused.
"""

import math
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as form

from latency_profiler.errors import InvalidDataset
from service.archives import BROKEN, LIMITS, Meter

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def read(path: Path, pixels: bool = True) -> dict[str, tuple[Pixels, Labels]]:
    """Pixels (n, s, s, 1 or 3) and labels (n,) of the parts that a file has; in all parts equally many channels.

    Without `pixels` the images are not read, and there is one pixel of each, which is black.

    Raises:
        InvalidDataset: it cannot be read, or holds something else.
    """
    try:
        shapes = headers(path)
        with np.load(path, allow_pickle=False) as file:
            held = {
                part: _part(
                    file[f"{part}_images"] if pixels else _blank(*shapes[f"{part}_images"]), file[f"{part}_labels"],
                    path.name,
                )
                for part in ("train", "val", "test") if f"{part}_images" in file
            }  # fmt: skip
    except (*BROKEN, KeyError, TypeError, MemoryError, tokenize.TokenError) as error:
        raise InvalidDataset(
            f"{path.name!r} cannot be read: {error}; it must hold plain arrays train_images, train_labels, "
            "test_images, test_labels (and val_*)"
        ) from error
    if "train" not in held or len({images.shape[1:3] for images, _ in held.values()}) != 1:
        raise InvalidDataset(f"{path.name!r} must hold train_images, and images of one size in all parts")
    if len({images.shape[3] for images, _ in held.values()}) != 1:
        held = {part: (in_colour(images), labels) for part, (images, labels) in held.items()}
    if not pixels:
        held = {part: (images[:, :1, :1], labels) for part, (images, labels) in held.items()}
    return held


def _blank(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[np.generic]:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and types of a file's arrays; refuses one that claims more bytes than are in it, before any is read."""
    meter, found = Meter(path, LIMITS), dict[str, tuple[tuple[int, ...], np.dtype[Any]]]()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            meter.add_entry(info.filename)
            meter.add_bytes(info.file_size)
            with archive.open(info) as file:
                version = form.read_magic(file)
                header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
                shape, _, dtype = header(file)
            whole = not dtype.hasobject and math.prod(shape) * dtype.itemsize <= info.file_size
            meter.check(whole, f"holds {info.filename!r}, which is no plain array or lacks a part")
            found[info.filename.removesuffix(".npy")] = shape, dtype
    return found


def in_colour(pixels: Pixels) -> Pixels:
    """Images (n, s, s, 3) of such with one channel or three, without copying them."""
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def _part(pixels: npt.NDArray[np.generic], labels: npt.NDArray[np.generic], name: str) -> tuple[Pixels, Labels]:
    """Pixels (n, s, s, 1 or 3) and labels (n,) from (n, s, s), (n, s, s, 1) or (n, s, s, 3) and (n,) or (n, 1)."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        raise InvalidDataset(f"{name!r} has images {pixels.dtype}{pixels.shape}; they must be uint8 (n, s, s[, 3])")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise InvalidDataset(f"{name!r} has labels {labels.dtype}{labels.shape}; there must be one integer per image")
    if pixels.shape[1] != pixels.shape[2]:
        raise InvalidDataset(
            f"{name!r} has images of {pixels.shape[1]} x {pixels.shape[2]} pixels; they must be square"
        )
    return pixels.astype(np.uint8, copy=False), labels.astype(np.int64)
