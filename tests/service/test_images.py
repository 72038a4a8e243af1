import errno
import gzip
import io
import multiprocessing
import os
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latency_profiler.errors import InvalidDataset
from service import images
from service.archives import Limits, Tar, Zip, open_files

CLASSES = ("cat", "dog")


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def tree(split: bool = True, per_class: int = 10) -> dict[str, bytes]:
    """Names and contents; the value of every pixel tells class and split."""
    content = {}
    for k, name in enumerate(CLASSES):
        for part, base in (("train/", 0), ("test/", 100)) if split else (("", 0),):
            for i in range(per_class):
                content[f"{part}{name}/{i}.png"] = png(base + 10 * k + i % 5)
    return content


def written(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, content: dict[str, bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def same(one: images.Images, other: images.Images) -> bool:
    return one.classes == other.classes and all(
        np.array_equal(getattr(one, part), getattr(other, part)) for part in images.PARTS
    )


def test_folder_zip_and_tar_give_the_same_arrays(tmp_path: Path) -> None:
    content = tree()
    written(tmp_path / "set", content)
    zipped(tmp_path / "set.zip", {f"around/{name}": data for name, data in reversed(content.items())})
    tarred(tmp_path / "set.tar.xz", {"README.txt": b"hello", **content})
    tarred(tmp_path / "set.tar", content, "w:")
    loaded = [
        images.load(kind, path, tmp_path, 8, tmp_path / "cache")
        for kind, path in (("folder", "set"), ("archive", "set.zip"), ("archive", "set.tar.xz"), ("archive", "set.tar"))
    ]
    assert all(same(loaded[0], other) for other in loaded[1:])
    first = loaded[0]
    assert first.train_x.dtype == np.uint8
    assert first.train_x.shape == (20, 8, 8, 3)
    assert first.train_y.dtype == np.int64
    assert ((first.train_x[:, 0, 0, 0] >= 10) == (first.train_y == 1)).all()
    assert (first.test_x >= 100).all()
    for kind, path in (("folder", "set"), ("archive", "set.zip")):
        assert images.inspect(kind, path, tmp_path) == images.DatasetFacts(CLASSES, 20, 20, 8)


@pytest.mark.parametrize("size", [8, 16])
def test_decoding_says_that_it_goes_on(tmp_path: Path, size: int) -> None:
    written(tmp_path / "set", tree())
    pixels = np.zeros((30, 8, 8), dtype=np.uint8)
    labels = np.arange(30) % 2
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    for kind, path, fitted in (("folder", "set", 40), ("npz", "a.npz", 60 if size == 16 else 0)):
        said = list[int]()
        for _ in ("decoded", "mapped"):
            images.load(kind, path, tmp_path, size, tmp_path / "cache", lambda said=said: said.append(1))
            assert len(said) == fitted + len(images.PARTS)


def test_without_a_split_a_fifth_of_every_class_is_tested(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", tree(split=False))
    loaded = images.load("archive", "a.zip", tmp_path, 8, tmp_path / "cache")
    assert np.bincount(loaded.test_y).tolist() == [2, 2]
    assert np.bincount(loaded.train_y).tolist() == [8, 8]
    assert images.inspect("archive", "a.zip", tmp_path).test_images == 4


def test_val_joins_train_when_there_is_a_test_split_and_is_the_test_when_there_is_none(tmp_path: Path) -> None:
    content = tree()
    content |= {name.replace("train", "val"): data for name, data in content.items() if "train" in name}
    written(tmp_path / "both", content)
    written(tmp_path / "val", {name: data for name, data in content.items() if "test" not in name})
    assert images.inspect("folder", "both", tmp_path).train_images == 40
    assert images.inspect("folder", "val", tmp_path).test_images == 20


def test_resized_to_the_asked_size_with_the_centre_kept(tmp_path: Path) -> None:
    picture = Image.new("L", (60, 20), 0)
    picture.paste(255, (20, 0, 40, 20))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    written(tmp_path / "a", {f"{c}/{i}.jpg": file.getvalue() for c in "xy" for i in range(5)})
    loaded = images.load("folder", "a", tmp_path, 16, tmp_path / "cache")
    assert loaded.train_x.shape == (8, 16, 16, 3)
    assert loaded.train_x[0, 4:12, 4:12].mean() > 240


def test_digits_facts_and_arrays(tmp_path: Path) -> None:
    loaded = images.load("digits", None, tmp_path, 8, tmp_path / "cache")
    facts = images.inspect("digits", None, tmp_path)
    assert (len(loaded.train_y), len(loaded.test_y)) == (facts.train_images, facts.test_images)
    assert loaded.classes == facts.classes
    assert len(loaded.train_y) + len(loaded.test_y) == 1797
    assert (loaded.train_x.min(), loaded.train_x.max()) == (0, 255)


def test_the_service_pays_for_no_heavy_import() -> None:
    code = "import sys, service.images; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def medmnist(path: Path, **changed: object) -> Path:
    random = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 30), ("val", 10), ("test", 12)):
        arrays[f"{part}_images"] = random.integers(0, 255, (n, 8, 8), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 3)[:, None]
    np.savez_compressed(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path


def test_npz(tmp_path: Path) -> None:
    medmnist(tmp_path / "a.npz")
    loaded = images.load("npz", "a.npz", tmp_path, 8, tmp_path / "cache")
    with np.load(tmp_path / "a.npz") as held:
        assert np.array_equal(loaded.train_x[30:, ..., 1], held["val_images"])
        assert np.array_equal(loaded.test_y, held["test_labels"][:, 0])
    assert images.inspect("npz", "a.npz", tmp_path) == images.DatasetFacts(("0", "1", "2"), 40, 12, 8)


@pytest.mark.parametrize(
    "changed",
    [
        {"train_images": np.zeros((30, 8, 8))},
        {"train_images": None},
        {"train_images": np.array([object()] * 30)},
        {"train_labels": np.zeros((30, 4), dtype=int)},
        {"train_labels": np.zeros(29, dtype=int)},
        {"test_images": np.zeros((12, 8, 9), dtype=np.uint8)},
        {"test_labels": np.full(12, 7)},
        {"train_labels": np.zeros(30), "train_images": np.zeros((30, 8, 8), np.uint8)},
    ],
)
def test_wrong_npz_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    medmnist(tmp_path / "a.npz", **changed)
    with pytest.raises(InvalidDataset):
        images.inspect("npz", "a.npz", tmp_path)


def test_an_npz_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**50,)})
    zipped(tmp_path / "a.npz", {"train_images.npy": header.getvalue(), "train_labels.npy": header.getvalue()})
    with pytest.raises(InvalidDataset, match="no plain array"):
        images.inspect("npz", "a.npz", tmp_path)


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "a\\..\\..\\out.png", "c:/out.png"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_names_that_point_outside_are_refused(tmp_path: Path, name: str, pack: object) -> None:
    path = tmp_path / ("a.zip" if pack is zipped else "a.tar.xz")
    pack(path, {**tree(), name: png(1)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidDataset, match="points outside"):
        images.inspect("archive", path.name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("train/cat/x.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(InvalidDataset, match="link or a device"):
        images.inspect("archive", "a.tar", tmp_path)


def test_links_and_encrypted_files_in_a_zip_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("train/cat/x.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidDataset, match="link or a device"):
        images.inspect("archive", "a.zip", tmp_path)
    raw = bytearray(zipped(tmp_path / "b.zip", {"cat/x.png": png(1)}).read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(raw)
    with pytest.raises(InvalidDataset, match="encrypted"):
        images.inspect("archive", "b.zip", tmp_path)


def test_bombs_are_stopped_while_they_are_read(tmp_path: Path) -> None:
    limits = Limits(bytes=200_000, grace=10_000)
    zeros = {f"cat/{i}.png": bytes(50_000) for i in range(10)}
    flat = {f"cat/{i}.png": os.urandom(50_000) for i in range(10)}
    for files in (Zip(zipped(tmp_path / "a.zip", zeros), limits), Tar(tarred(tmp_path / "a.tar.xz", zeros), limits)):
        with pytest.raises(InvalidDataset, match="times its size"):
            list(files.read(set(zeros)))
    for files in (Zip(zipped(tmp_path / "b.zip", flat), limits), Tar(tarred(tmp_path / "b.tar.xz", flat), limits)):
        with pytest.raises(InvalidDataset, match="more than 0 MiB"):
            list(files.read(set(flat)))
    with pytest.raises(InvalidDataset, match="more than 3 entries"):
        Zip(tmp_path / "a.zip", Limits(entries=3)).names()
    with pytest.raises(InvalidDataset, match="larger than"):
        Tar(tarred(tmp_path / "c.tar", flat, "w:"), Limits(file=1000)).names()
    with pytest.raises(InvalidDataset, match="larger than"):
        list(Zip(tmp_path / "b.zip", Limits(file=1000)).read(set(flat)))


def test_double_names_are_refused(tmp_path: Path) -> None:
    tarred(tmp_path / "a.tar", {"cat/x.png": png(1), "cat//x.png": png(2)}, "w:")
    with pytest.raises(InvalidDataset, match="twice"):
        open_files(tmp_path / "a.tar").names()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = tarred(tmp_path / "a.tar.gz", tree(), "w:gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"no archive" * 100))
    (tmp_path / "c.zip").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "d.npz").write_bytes(b"\x80\x04pickle")
    written(tmp_path / "e", {**tree(), "train/cat/0.png": b"no image"})
    written(tmp_path / "f", {**tree(), "train/cat/0.png": png(3)[:45]})
    for kind, path in (("archive", "a.tar.gz"), ("archive", "b.tar.gz"), ("archive", "c.zip"), ("npz", "d.npz"), ("folder", "e"), ("folder", "f")):  # fmt: skip # noqa: E501
        with pytest.raises(InvalidDataset):
            images.load(kind, path, tmp_path, 8, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_files_that_break_their_reader_are_refused(tmp_path: Path) -> None:
    named = zipped(tmp_path / "names.zip", {f"{name}é/{i}.png": png(i) for name in CLASSES for i in range(3)})
    named.write_bytes(named.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("cat/0.png")
        info.size, info.pax_headers = 3, {"GNU.sparse.map": "x,y", "GNU.sparse.size": "3"}
        archive.addfile(info, io.BytesIO(b"abc"))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8".ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(128)
    zipped(tmp_path / "header.npz", {"train_images.npy": array})
    for kind, path in (("archive", "names.zip"), ("archive", "sparse.tar"), ("npz", "header.npz")):
        with pytest.raises(InvalidDataset, match=r"damaged|cannot be read"):
            images.inspect(kind, path, tmp_path)


def test_what_the_service_may_not_read_is_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unprivileged user meets it; who may read everything meets it through these two functions."""
    written(tmp_path / "set", tree())
    scan, read = os.scandir, Path.read_bytes

    def scandir(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    def read_bytes(path: Path) -> bytes:
        if path.parent.name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for place, name, instead in ((os, "scandir", scandir), (Path, "read_bytes", read_bytes)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, instead)
            with pytest.raises(InvalidDataset, match=f"not for the service to read: .*{os.geteuid()}"):
                images.inspect("folder", "set", tmp_path)


def test_a_stray_folder_makes_no_classes_of_the_splits(tmp_path: Path) -> None:
    written(tmp_path / "set", {**tree(), "samples/0.png": png(1)})
    with pytest.raises(InvalidDataset, match="'samples' lies beside test and train"):
        images.inspect("folder", "set", tmp_path)
    vehicles = {f"{name}/{i}.png": png(i) for name in ("car", "train") for i in range(10)}
    written(tmp_path / "vehicles", vehicles)
    assert images.inspect("folder", "vehicles", tmp_path).classes == ("car", "train")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path: Path, kind: str) -> None:
    ramp, file = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024, io.BytesIO()
    Image.fromarray(ramp).save(file, kind)
    written(tmp_path / "set", {f"{c}/{i}.{kind.lower()}": file.getvalue() for c in "xy" for i in range(5)})
    loaded = images.load("folder", "set", tmp_path, 8, tmp_path / "cache")
    assert np.array_equal(loaded.train_x[0, ..., 0], ramp >> 8)


def test_numbers_of_unknown_range_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(file, "TIFF")
    written(tmp_path / "set", {f"{c}/{i}.tif": file.getvalue() for c in "xy" for i in range(5)})
    with pytest.raises(InvalidDataset, match="8 or 16 bits"):
        images.inspect("folder", "set", tmp_path)


def test_looking_at_an_npz_reads_no_images(tmp_path: Path) -> None:
    """Nine MiB of grey images, which took three times that when they were read."""
    blank = np.zeros((12_000, 28, 28), dtype=np.uint8)
    medmnist(tmp_path / "a.npz", train_images=blank, train_labels=np.arange(12_000) % 3, val_images=None,
             val_labels=None, test_images=blank[:10], test_labels=np.arange(10) % 3)  # fmt: skip
    tracemalloc.start()
    facts = images.inspect("npz", "a.npz", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts == images.DatasetFacts(("0", "1", "2"), 12_000, 10, 28)
    assert peak < 4 * 2**20


def test_what_systems_leave_among_images_is_no_image(tmp_path: Path) -> None:
    written(tmp_path / "set", {**tree(split=False), "__MACOSX/cat/1.png": b"x", "dog/.2.png": b"x"})
    assert images.inspect("folder", "set", tmp_path) == images.DatasetFacts(CLASSES, 16, 4, 8)


def test_an_image_of_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "set", tree())
    monkeypatch.setattr(images, "LARGEST_IMAGE", 64)
    assert images.inspect("folder", "set", tmp_path).train_images == 20
    monkeypatch.setattr(images, "LARGEST_IMAGE", 63)
    with pytest.raises(InvalidDataset, match="8 x 8 pixels; scale it down"):
        images.load("folder", "set", tmp_path, 8, tmp_path / "cache")


def test_paths_outside_of_the_data_root_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    written(tmp_path / "secret", tree())
    written(root / "inside", tree())
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inside/train/cat/l.png").symlink_to(tmp_path / "secret/train/cat/0.png")
    for path in ("../secret", str(tmp_path / "secret"), "link", "nothing", "a\0b", "", "."):
        with pytest.raises(InvalidDataset, match="data root"):
            images.inspect("folder", path, root)
    with pytest.raises(InvalidDataset, match="link out of the folder"):
        images.inspect("folder", "inside", root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "0 images"),
        ({"a.png": png(1), "cat/b.png": png(1)}, "1 of them in a folder"),
        ({"train/cat/1.png": png(1), "test/cat/1.png": png(1)}, "at least two"),
        ({"train/cat/1.png": png(1), "test/cat/1.png": png(1), "test/dog/1.png": png(1)}, "no training images"),
    ],
)
def test_what_is_no_dataset_says_what_would_be(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    (tmp_path / "a").mkdir()
    written(tmp_path / "a", content)
    with pytest.raises(InvalidDataset, match=message):
        images.inspect("folder", "a", tmp_path)


def test_a_change_of_the_files_is_noticed(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", tree())
    first = images.load("archive", "a.zip", tmp_path, 8, tmp_path / "cache")
    zipped(tmp_path / "a.zip", tree(per_class=12))
    assert len(images.load("archive", "a.zip", tmp_path, 8, tmp_path / "cache").train_y) == 24 != len(first.train_y)


def test_a_change_of_a_file_that_keeps_its_size_is_noticed(tmp_path: Path) -> None:
    def load() -> images.Images:
        return images.load("folder", "set", tmp_path, 8, tmp_path / "cache")

    ppm = {value: b"P6 8 8 255\n" + bytes([value]) * 192 for value in (0, 200)}
    path = written(tmp_path / "set", {f"{name}/{i}.ppm": ppm[0] for name in "ab" for i in range(5)}) / "a/0.ppm"
    before = (load(), path.stat().st_mtime_ns)[1]
    path.write_bytes(ppm[200])
    os.utime(path, ns=(before, before + 10**9))
    assert max(load().train_x.max(), load().test_x.max()) == 200


def _load(root: str) -> int:
    return len(images.load("archive", "a.zip", Path(root), 8, Path(root, "cache")).train_y)


def test_racing_workers_share_one_cache(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip", tree())
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_load, [str(tmp_path)] * 6) == [20] * 6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_is_an_error_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int, _offset: int, size: int) -> None:
        assert size > 16 * 8 * 8 * 3
        raise OSError(errno.ENOSPC, "no room")

    written(tmp_path / "set", tree())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room"):
        images.load("folder", "set", tmp_path, 8, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*.npy"))
