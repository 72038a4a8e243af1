import hashlib
import os
import time

import pytest
import torch

from latency_profiler.durable import STALE_SECONDS, place
from latency_profiler.errors import DamagedCheckpoint
from workers import checkpoints

TENSORS = {"a": torch.arange(6).reshape(2, 3), "b.c": torch.randn(3, 4).t(), "empty": torch.empty(0)}


def test_round_trip_by_content(tmp_path) -> None:
    sha256 = checkpoints.save(tmp_path, TENSORS)
    path = place(tmp_path, sha256)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256 == path.name
    loaded = checkpoints.load(path, sha256)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert checkpoints.save(tmp_path, TENSORS) == sha256
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_bytes_that_another_user_may_read(tmp_path) -> None:
    sha256 = checkpoints.write_blob(tmp_path, b"model")
    assert place(tmp_path, sha256).read_bytes() == b"model"
    assert place(tmp_path, sha256).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:100] + b"x" + raw[101:], lambda raw: b""])
def test_damage_is_noticed(tmp_path, damage) -> None:
    sha256 = checkpoints.save(tmp_path, TENSORS)
    path = place(tmp_path, sha256)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedCheckpoint, match=sha256[:8]):
        checkpoints.load(path, sha256)


def test_what_is_no_checkpoint_or_missing(tmp_path) -> None:
    sha256 = checkpoints.write_blob(tmp_path, b"\x80\x04pickle")
    for name in (sha256, "0" * 64):
        with pytest.raises(DamagedCheckpoint):
            checkpoints.load(place(tmp_path, name), name)


def test_what_killed_writers_left_goes_after_a_day(tmp_path) -> None:
    old, fresh = (tmp_path / f"{checkpoints.WRITING}{name}" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    for path, age in ((old, STALE_SECONDS + 60), (fresh, STALE_SECONDS - 60)):
        os.utime(path, (time.time() - age,) * 2)
    sha256 = checkpoints.write_blob(tmp_path, b"model")
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted([fresh, place(tmp_path, sha256)])
