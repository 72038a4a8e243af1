"""README's own runtime, as it is printed there, against a board that is a script called `ssh`."""

import importlib
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latency_profiler.device import fingerprint
from latency_profiler.errors import MeasurementFailed, RuntimeUnavailable
from latency_profiler.graphs import layer_model
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.measuring import measure_work
from latency_profiler.runtimes import base
from latency_profiler.runtimes.base import Settings, open_runtime

README = Path(__file__).parents[2] / "README.md"
MOST_LINES = 100
LAYER = Layer(Op.CONV, 3, 8, 8, 3, 1, 1, Activation.RELU, norm=True)
SSH = r"""#!/bin/sh
# A board that takes 0.5 ms for a run of anything, and keeps the files in its own folder.
cd "$BOARD_FOLDER" || exit 1
echo "$*" >> said
case "$2" in
    uname*) echo "Linux 6.6 armv8"; echo "c0ffee  /usr/bin/onnxruntime_perf_test" ;;
    "cat > "*) cat > "$(basename "${2#cat > }")" ;;
    *) cat broken >&2 2>/dev/null && exit 1; echo "Average inference time cost total: 0.500000 ms" ;;
esac
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The board's folder, with README's module and the fake ssh in place."""
    module = re.search(r'```python\n("""board_runtime\.py.*?)```', README.read_text(), re.DOTALL)
    assert module
    assert len(module[1].splitlines()) < MOST_LINES
    (tmp_path / "board_runtime.py").write_text(module[1])
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SECATEURS_BOARD", "pi@board")
    monkeypatch.setenv("BOARD_FOLDER", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    entry = re.search(r'```toml\n\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"\n```', README.read_text())
    assert entry
    assert entry[1] == base.GROUP
    monkeypatch.setattr(base, "entry_points", lambda group: [EntryPoint(entry[2], entry[3], group)])
    yield tmp_path
    sys.modules.pop("board_runtime", None)


def item(layer: Layer) -> dict[str, Any]:
    return {"work_id": "1", "kind": "layer", "key": layer.key, "payload": {"layer": layer.to_json()}}


def test_readmes_runtime_measures_on_its_board(board: Path) -> None:
    runtime = open_runtime("board", Settings(threads=4, batch=2))
    assert fingerprint(runtime).runtime_version == "Linux 6.6 armv8 c0ffee"
    subject = runtime.load_layer(LAYER)
    assert subject.seconds(10) == pytest.approx(0.005)
    assert onnx.load(board / "secateurs-0.onnx") == layer_model(LAYER, batch=2)
    said = (board / "said").read_text()
    assert "pi@board onnxruntime_perf_test -I -m times -r 10 -x 4 -y 1 /tmp/secateurs-0.onnx" in said


@pytest.mark.usefixtures("board")
def test_readmes_runtime_without_its_board_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEURS_BOARD")
    with pytest.raises(RuntimeUnavailable, match="'board' is not available: KeyError: 'SECATEURS_BOARD'"):
        open_runtime("board", Settings())


def test_an_agents_work_runs_on_the_board_and_its_failures_are_data(board: Path) -> None:
    runtime = open_runtime("board", Settings())
    (result,) = measure_work(runtime, [item(LAYER)], np.random.default_rng(0))
    assert result["conditions"]["empty_run"] == pytest.approx(5e-4)
    assert result["seconds"] < 1e-6, "this board takes as long for nothing"
    (board / "broken").write_text("no space left")
    with pytest.raises(MeasurementFailed, match="no space left"):
        runtime.empty_run().seconds(1)
    (result,) = measure_work(runtime, [item(LAYER)], np.random.default_rng(0))
    assert "no space left" in result["error"]
