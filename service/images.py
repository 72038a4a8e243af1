"""Datasets as arrays: scikit-learn's digits, image folders, archives of image folders, and MedMNIST's npz files.

`inspect` tells what a dataset holds; `load` decodes every image once, to one size, and keeps the arrays in a cache from
which they are mapped. An image folder is `train/<class>/*` with `test/<class>/*` or `val/<class>/*` (with both, val
joins train), or `<class>/*` alone, of which a fifth of every class is then split off for testing. One folder around all
of it does not matter. Letters: n images, s side in pixels.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as form
from PIL import Image, ImageOps

from latency_profiler.durable import flush, sweep
from latency_profiler.errors import InvalidDataset
from service import npz
from service.archives import Files, open_files

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
CHUNK = 4096
"""Images that are digested at a time."""
FORMAT = 3
"""Part of the cache's key: grows when other arrays come out of the same files."""
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
TRAIN, TEST, VALIDATION = {"train", "training"}, {"test", "testing"}, {"val", "valid", "validation"}
LARGEST_IMAGE = 50_000_000
SIZES = (8, 224)
"""Native sizes that are proposed; larger images are proposed to be scaled down."""
TEST_SHARE = 0.2
PARTS = ("train_x", "train_y", "test_x", "test_y")


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What a dataset holds; `image_size` is the side of its first image, within 8 to 224 pixels."""

    classes: tuple[str, ...]
    train_images: int
    test_images: int
    image_size: int


@dataclass(frozen=True, slots=True)
class Images:
    """Pixels (n, s, s, 3), labels (n,), and the classes' names."""

    train_x: Pixels
    train_y: Labels
    test_x: Pixels
    test_y: Labels
    classes: tuple[str, ...]
    digest: str = ""
    """Of all of it, where it is from the cache."""


DIGITS = DatasetFacts(tuple("0123456789"), 1438, 359, 8)
"""Known without scikit-learn, which takes a second to import."""


def inspect(kind: str, path: str | None, data_root: Path) -> DatasetFacts:
    """What a dataset holds, found by looking at names and one image, or at an npz file's headers.

    Raises:
        InvalidDataset: it cannot be read, or lies outside the data root.
    """
    match kind:
        case "digits":
            return DIGITS
        case "folder" | "archive":
            files = open_files(_located(kind, path, data_root))
            plan = _plan(files.names())
            with next(_decoded(files, [plan.names[0]]))[1] as first:
                size = min(first.size)
                _fitted(first, SIZES[0], plan.names[0])
            return DatasetFacts(plan.classes, *plan.counts(), min(max(size, SIZES[0]), SIZES[1]))
        case "npz":
            located = _located(kind, path, data_root)
            arrays = _npz(located, pixels=False)
            size = min(max(npz.headers(located)["train_images"][0][1], SIZES[0]), SIZES[1])
            return DatasetFacts(arrays.classes, len(arrays.train_y), len(arrays.test_y), size)
    raise InvalidDataset(f"unknown kind of dataset {kind!r}; it must be digits, folder, archive or npz")


def load(
    kind: str,
    path: str | None,
    data_root: Path,
    image_size: int,
    cache: Path,
    told: Callable[[], object] = lambda: None,
) -> Images:
    """All images at one size, from the cache if they were decoded before.

    `told` is called after every image that is decoded, which may take hours in all.

    Raises:
        InvalidDataset: the dataset cannot be read, or lies outside the data root.
    """
    located = None if kind == "digits" else _located(kind, path, data_root)
    key = _key(kind, located, image_size)
    if not (cache / key).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _build(cache, key, lambda folder: _decode(kind, located, image_size, folder, told), told)
    classes = json.loads((cache / key / "classes.json").read_text())
    # Mapped copy-on-write: pages are read when they are used, and torch takes only arrays that could be written.
    arrays = {part: np.load(cache / key / f"{part}.npy", mmap_mode="c", allow_pickle=False) for part in PARTS}
    return Images(**arrays, classes=tuple(classes), digest=(cache / key / "digest").read_text())


def stratified(labels: Labels, share: float) -> npt.NDArray[np.bool_]:
    """Which images (n,) to split off: this share of every class, at least one, chosen by a fixed seed."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    random = np.random.default_rng(0)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(share * len(members)))]] = True
    return chosen


@dataclass(frozen=True, slots=True)
class Plan:
    """Which file is which image: sorted names with labels (n,), and which of them (n,) are for testing."""

    names: list[str]
    labels: Labels
    testing: npt.NDArray[np.bool_]
    classes: tuple[str, ...]

    def counts(self) -> tuple[int, int]:
        """Images for training and for testing."""
        return int((~self.testing).sum()), int(self.testing.sum())


def _located(kind: str, path: str | None, data_root: Path) -> Path:
    """The real path of a dataset, which must lie below the data root."""
    try:
        root = data_root.resolve(strict=True)
        found = (root / (path or "")).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidDataset(f"there is nothing at {path!r} below the data root; copy the dataset there") from error
    if not path or root not in found.parents:
        raise InvalidDataset(f"{path!r} is not below the data root; copy the dataset there and give its relative path")
    if found.is_dir() != (kind == "folder"):
        raise InvalidDataset(f"{path!r} is {'a folder' if found.is_dir() else 'a file'}, which is no {kind}")
    return found


def _plan(names: Sequence[str]) -> Plan:
    """Classes and splits from the names of all files."""
    images = sorted(name for name in names if _is_image(name))
    parts = [name.split("/") for name in images]
    while parts and all(len(p) > 2 and p[0] == parts[0][0] for p in parts) and not _split_of(parts[0][0]):
        parts = [p[1:] for p in parts]
    splits = {p[0].lower() for p in parts if _split_of(p[0])}
    divided = bool(splits) and all(_split_of(p[0]) for p in parts)
    folders = [p[1] if divided else p[0] for p in parts if len(p) > (2 if divided else 1)]
    if len(folders) < len(images) or not images:
        raise InvalidDataset(
            f"{len(images)} images (.jpg, .png, ...) were found, {len(folders)} of them in a folder of their class; "
            "use train/<class>/* and test/<class>/*, or <class>/*"
        )
    stray = next((p[0] for p in parts if not _split_of(p[0])), None)
    if stray and any(_split_of(p[0]) and len(p) > 2 for p in parts):
        raise InvalidDataset(f"{stray!r} lies beside {' and '.join(sorted(splits))}: move it away, or into one of them")
    kinds = np.array([_split_of(p[0]) if divided else "train" for p in parts])
    classes, labels = np.unique(np.array(folders), return_inverse=True)
    labels = labels.astype(np.int64)
    testing = kinds == ("test" if (kinds == "test").any() else "validation")
    if not testing.any():
        testing = stratified(labels, TEST_SHARE)
    return _checked(Plan(images, labels, testing, tuple(map(str, classes))))


def _checked(plan: Plan) -> Plan:
    _check_labels(plan.labels[~plan.testing], plan.labels[plan.testing], plan.classes)
    return plan


def _check_labels(train: Labels, test: Labels, classes: Sequence[str]) -> None:
    """Every class must have training images, there must be two, and something to test on."""
    untrained = sorted(set(range(len(classes))) - set(train.tolist()))
    if len(classes) < 2:
        raise InvalidDataset(f"there is one class, {classes[0]!r}; at least two are needed")
    if untrained:
        raise InvalidDataset(f"class {classes[untrained[0]]!r} has no training images; every class needs some")
    if not len(test):
        raise InvalidDataset("there are no test images; put some under test/<class>/, or leave the split out")


def _is_image(name: str) -> bool:
    path = Path(name)
    hidden = path.name.startswith(".") or "__MACOSX" in path.parts
    return path.suffix.lower() in ENDINGS and not hidden


def _split_of(folder: str) -> str:
    """`train`, `test`, `validation`, or nothing."""
    name = folder.lower()
    return "train" if name in TRAIN else "test" if name in TEST else "validation" if name in VALIDATION else ""


def _decode(kind: str, path: Path | None, size: int, folder: Path, told: Callable[[], object]) -> tuple[str, ...]:
    """Write the arrays of a dataset into a folder; returns the classes."""
    if kind in ("folder", "archive"):
        assert path is not None
        return _decode_files(open_files(path), size, folder, told)
    arrays = _digits() if path is None else _npz(path)
    for part, pixels in (("train_x", arrays.train_x), ("test_x", arrays.test_x)):
        np.save(folder / f"{part}.npy", _resized(pixels, size, told), allow_pickle=False)
    np.save(folder / "train_y.npy", arrays.train_y, allow_pickle=False)
    np.save(folder / "test_y.npy", arrays.test_y, allow_pickle=False)
    return arrays.classes


def _take_room(file: Path) -> None:
    """Where the disk is full, an error now instead of a signal that ends the process when a page is written.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _decode_files(files: Files, size: int, folder: Path, told: Callable[[], object]) -> tuple[str, ...]:
    """Decode image files into arrays that are mapped, in the order of the names, whatever order they are stored in."""
    plan = _plan(files.names())
    places: dict[str, tuple[np.memmap[Any, np.dtype[np.uint8]], int]] = {}
    for part, chosen in (("train", ~plan.testing), ("test", plan.testing)):
        indices = np.flatnonzero(chosen)
        np.save(folder / f"{part}_y.npy", plan.labels[indices], allow_pickle=False)
        shape = (len(indices), size, size, 3)
        pixels = form.open_memmap(file := folder / f"{part}_x.npy", mode="w+", dtype=np.uint8, shape=shape)
        _take_room(file)
        places |= {plan.names[index]: (pixels, place) for place, index in enumerate(indices)}
    missing = set(places)
    for name, image in _decoded(files, places, size):
        pixels, place = places[name]
        pixels[place] = _fitted(image, size, name)
        missing.discard(name)
        told()
    if missing:
        raise InvalidDataset(f"{min(missing)!r} vanished while the dataset was read; read it again")
    for mapped in {id(array): array for array, _ in places.values()}.values():
        mapped.flush()
    return plan.classes


def _decoded(files: Files, wanted: Iterable[str], size: int = 0) -> Iterator[tuple[str, Image.Image]]:
    """Opened images of the wanted names; JPEGs are decoded near `size`, which is faster."""
    for name, content in files.read(set(wanted)):
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > LARGEST_IMAGE:
                raise InvalidDataset(f"{name!r} has {image.width} x {image.height} pixels; scale it down")
            if size:
                image.draft("RGB", (size, size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InvalidDataset(f"{name!r} is no image that can be read: {error}") from error
        yield name, image


def _fitted(image: Image.Image, size: int, name: str = "") -> Pixels:
    """The centre of an image (size, size, 3) in colour, of 16 bits a pixel the upper eight."""
    try:
        if image.mode.startswith("I;16"):  # Pillow would not scale but clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise InvalidDataset(f"{name!r} has pixels of 32 bits, whose range is unknown; save it with 8 or 16 bits")
        coloured = image.convert("RGB")
        if coloured.size != (size, size):
            coloured = ImageOps.fit(coloured, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(coloured, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise InvalidDataset(f"{name!r} is no image that can be read: {error}") from error


def _resized(pixels: Pixels, size: int, told: Callable[[], object]) -> Pixels:
    """Square images (n, ., ., 3) at another size."""
    pixels = npz.in_colour(pixels)
    if pixels.shape[1:3] == (size, size):
        return pixels
    resized = np.empty((len(pixels), size, size, 3), dtype=np.uint8)
    for at, image in enumerate(pixels):
        resized[at] = _fitted(Image.fromarray(image), size)
        told()
    return resized


def _digits() -> Images:
    from sklearn.datasets import load_digits  # heavy, and only this dataset needs it

    bunch = load_digits()
    grey = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    return _divided(np.repeat(grey[..., None], 3, axis=3), labels, DIGITS.classes)


def _divided(pixels: Pixels, labels: Labels, classes: tuple[str, ...]) -> Images:
    testing = stratified(labels, TEST_SHARE)
    return Images(pixels[~testing], labels[~testing], pixels[testing], labels[testing], classes)


def _npz(path: Path, pixels: bool = True) -> Images:
    """Arrays of a MedMNIST-style file at their own size, grey ones (n, s, s, 1); val joins train."""
    return _joined(npz.read(path, pixels))


def _joined(held: dict[str, tuple[Pixels, Labels]]) -> Images:
    used = np.unique(np.concatenate([labels for _, labels in held.values()]))
    classes = tuple(map(str, used.tolist()))
    training = [held[part] for part in ("train", "val") if part in held]
    pixels = np.concatenate([part for part, _ in training])
    labels = np.searchsorted(used, np.concatenate([part for _, part in training])).astype(np.int64)
    if "test" not in held:
        images = _divided(pixels, labels, classes)
    else:
        tested = np.searchsorted(used, held["test"][1]).astype(np.int64)
        images = Images(pixels, labels, held["test"][0], tested, classes)
    _check_labels(images.train_y, images.test_y, classes)
    return images


def _key(kind: str, path: Path | None, size: int) -> str:
    """Name of the cached arrays: changes with the files' names, sizes and times of change."""
    marks: list[object] = [FORMAT, kind, size]
    if path is not None:
        names = sorted(open_files(path).names()) if path.is_dir() else [""]
        for name in names:
            status = (path / name).stat()
            marks.append((str(path), name, status.st_mtime_ns, status.st_size))
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]


def _build(cache: Path, key: str, decode: Callable[[Path], tuple[str, ...]], told: Callable[[], object]) -> None:
    """Fill a folder beside its place and rename it; when another process was faster, its folder stands."""
    folder = Path(tempfile.mkdtemp(prefix=".decoding-", dir=cache))
    try:
        sweep(cache, ".decoding-*", folder)
        classes = decode(folder)
        (folder / "classes.json").write_text(json.dumps(classes))
        digest = hashlib.sha256(json.dumps(classes).encode())
        for part in PARTS:
            array = np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            for start in range(0, len(array), CHUNK):
                digest.update(array[start : start + CHUNK])
                told()
        (folder / "digest").write_text(digest.hexdigest())
        for file in folder.iterdir():
            flush(file)
        try:
            folder.rename(cache / key)
        except OSError:
            if not (cache / key).is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
