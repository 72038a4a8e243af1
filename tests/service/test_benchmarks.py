"""What the benchmarks keep of a run."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import jobs


def test_a_result_file_says_what_it_was_measured_with_and_when(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    kept = json.loads(jobs.write("gain", {"seeds": {}}).read_text())
    assert set(kept) >= {"seeds", "machine", "python", "at"}
    assert (kept["torch"], kept["onnxruntime"]) == (version("torch"), version("onnxruntime"))


def test_each_job_of_a_file_says_it_too() -> None:
    """With the day on which the job ended: a script that is run again later finds it."""
    job = dict.fromkeys(jobs.KEPT) | {"progress": {}, "finished_at": 86400.0 * 365.5}
    about = jobs.measured_with() | {"at": "1971-01-01"}
    assert jobs.kept(job) == dict.fromkeys(jobs.KEPT) | {"measured_with": about}
    assert set(jobs.measured_with()) >= {"machine", "python", "at", "torch", "onnxruntime"}
