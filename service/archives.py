"""Files of a folder or an archive, read one after another without unpacking anything to disk.

Headers are not believed: bytes are counted while they are read. Refused are names that point outside, links, devices
and sparse files, encrypted files, double names, and more of anything than `Limits` allows. (`tarfile`'s own filters
are not relied upon: they guard extraction, and had holes.)
"""

import bz2
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Literal, Protocol

from latency_profiler.errors import InvalidDataset

MIB = 2**20
BROKEN = (
    OSError, EOFError, ValueError, OverflowError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError,
    zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip
"""What the libraries that unpack raise over damaged files; names that are no text are ValueErrors."""
Opener = Callable[[Path, Literal["rb"]], "IO[bytes] | BufferedIOBase"]
OPENERS: dict[str, Opener] = {
    ".tar": open, ".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".txz": lzma.open,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """What may come out of an archive."""

    entries: int = 200_000
    bytes: int = 2048 * MIB
    ratio: int = 100
    """Unpacked bytes per packed byte, asked once `grace` bytes are unpacked."""
    grace: int = 16 * MIB
    file: int = 64 * MIB


LIMITS = Limits()


class Files(Protocol):
    """Where images come from."""

    def names(self) -> list[str]:
        """Names of all files, relative, with `/`."""

    def read(self, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of the wanted files, in any order."""


def open_files(path: Path, limits: Limits = LIMITS) -> Files:
    """A folder, or an archive by its ending.

    Raises:
        InvalidDataset: neither of them.
    """
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() == ".zip":
        return Zip(path, limits)
    if path.suffix.lower() in OPENERS:
        return Tar(path, limits)
    raise InvalidDataset(f"{path.name!r} is no archive that can be read; use .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz")


class Meter:
    """Counts what comes out of an archive, and refuses too much of it."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._name, self._packed, self._limits = path.name, path.stat().st_size, limits
        self.bytes, self.seen = 0, set[str]()

    def add_bytes(self, count: int) -> None:
        """So many more bytes were unpacked."""
        self.bytes += count
        limits = self._limits
        if self.bytes > limits.bytes:
            raise InvalidDataset(f"{self._name!r} unpacks to more than {limits.bytes // MIB} MiB; split it")
        if self.bytes > limits.grace and self.bytes > limits.ratio * self._packed:
            raise InvalidDataset(f"{self._name!r} unpacks to more than {limits.ratio} times its size; pack images only")

    def add_entry(self, name: str) -> str:
        """One more entry; returns its safe name."""
        self.check(len(self.seen) < self._limits.entries, f"has more than {self._limits.entries} entries")
        path = PurePosixPath(name)
        drive = path.parts[:1] and path.parts[0].endswith(":")
        outside = path.is_absolute() or drive or ".." in path.parts or "\\" in name or "\0" in name
        self.check(not outside, f"holds {name!r}, which points outside of it")
        self.check(str(path) not in self.seen, f"holds {name!r} twice")
        self.seen.add(str(path))
        return str(path)

    def check(self, good: bool, otherwise: str) -> None:
        """Refuse the archive unless all is good."""
        if not good:
            raise InvalidDataset(f"{self._name!r} {otherwise}; pack plain files under relative names")


class Folder:
    """Files of a folder and the folders in it; links that leave it are refused."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def names(self) -> list[str]:
        """Names of all files."""
        found = []
        with readable(self._path):
            for folder, folders, files in os.walk(self._path, onerror=_raised):
                for name in (*folders, *files):
                    self._check(Path(folder, name))
                found += [Path(folder, name).relative_to(self._path).as_posix() for name in files]
                if len(found) > LIMITS.entries:
                    raise InvalidDataset(f"{self._path.name!r} has more than {LIMITS.entries} files")
        return found

    def read(self, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of the wanted files."""
        for name in self.names():
            if name in wanted:
                with readable(self._path / name):
                    content = (self._path / name).read_bytes()
                yield name, content

    def _check(self, path: Path) -> None:
        mode = path.lstat().st_mode
        inside = not stat.S_ISLNK(mode) or (path.is_file() and path.resolve().is_relative_to(self._path))
        if not inside or not (path.is_file() or path.is_dir()):
            name = path.relative_to(self._path)
            raise InvalidDataset(
                f"{str(name)!r} is a link out of the folder, a linked folder or a device; copy the files"
            )


class Zip:
    """Files of a .zip."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits

    def names(self) -> list[str]:
        """Names of all files, without unpacking them."""
        meter = Meter(self._path, self._limits)
        with readable(self._path), zipfile.ZipFile(self._path) as archive:
            return [name for name, _ in self._entries(archive, meter)]

    def read(self, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of the wanted files."""
        meter = Meter(self._path, self._limits)
        with readable(self._path), zipfile.ZipFile(self._path) as archive:
            for name, info in self._entries(archive, meter):
                if name in wanted:
                    with archive.open(info) as file:
                        yield name, self._content(file, name, meter)

    def _entries(self, archive: zipfile.ZipFile, meter: Meter) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        for info in archive.infolist():
            name = meter.add_entry(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            meter.check(kind in (0, stat.S_IFREG, stat.S_IFDIR), f"holds {name!r}, which is a link or a device")
            meter.check(not info.flag_bits & 0x1, f"holds {name!r}, which is encrypted")
            if not info.is_dir():
                yield name, info

    def _content(self, file: IO[bytes], name: str, meter: Meter) -> bytes:
        content = bytearray()
        while chunk := file.read(MIB):
            meter.add_bytes(len(chunk))
            content += chunk
            meter.check(len(content) <= self._limits.file, f"holds {name!r}, which is larger than an image may be")
        return bytes(content)


class Tar:
    """Files of a .tar.*, read in one pass as a stream."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits

    def names(self) -> list[str]:
        """Names of all files; the whole archive is unpacked in memory, piece by piece, to find them."""
        with readable(self._path):
            return [name for name, _, _ in self._entries()]

    def read(self, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of the wanted files."""
        with readable(self._path):
            for name, archive, member in self._entries():
                if name in wanted and (file := archive.extractfile(member)) is not None:
                    yield name, file.read()

    def _entries(self) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
        meter = Meter(self._path, self._limits)
        with OPENERS[self._path.suffix.lower()](self._path, "rb") as packed:
            stream = Metered(packed, meter)
            with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined] # tarfile keeps every header it has seen
                    name = meter.add_entry(member.name)
                    plain = (member.isfile() and not member.issparse()) or member.isdir()
                    meter.check(plain, f"holds {name!r}, which is a link or a device")
                    meter.check(member.size <= self._limits.file, f"holds {name!r}, larger than an image may be")
                    if member.isfile():
                        yield name, archive, member


class Metered(RawIOBase):
    """A stream whose bytes are counted."""

    def __init__(self, stream: "BufferedIOBase | IO[bytes]", meter: Meter) -> None:
        self._stream, self._meter = stream, meter

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        content = self._stream.read(size if size >= 0 else self._meter.bytes)
        self._meter.add_bytes(len(content))
        return content


def _raised(error: OSError) -> None:
    """A folder that cannot be looked into is no empty one."""
    raise error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what files raise that are damaged, or not for the service to read, into InvalidDataset."""
    try:
        yield
    except PermissionError as error:
        raise InvalidDataset(
            f"{Path(error.filename or path).name!r} is not for the service to read: give its user "
            f"(id {os.geteuid()}) permission"
        ) from error
    except BROKEN as error:
        raise InvalidDataset(f"{path.name!r} is damaged or no such archive: {error}") from error
