"""The command line against a running service, and alone."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from rich.console import Console

from latency_profiler.cost import flops
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.spaces.registry import SPACES, get_space
from service import cli
from service.app import create_app
from service.commands import tables
from service.commands.options import parse_count
from service.commands.watching import JobBar, bars
from service.store import keys
from service.store.session import transaction

ENCODING = (28, 18, 10, 23, 23, 22, 22, 13, 17, 28, 17, 25, 29)
JOB = ["submit", "mobilenet_v1", "--dataset", "digits", "--effort", "smoke", "--image-size", "8", "--width", "0.25"]
SIZE = ["--image-size", "8", "--width", "0.25", "--classes", "10"]


@pytest.fixture
def server(home: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A running service on SQLite, which the environment names with a key."""
    shutil.copy(sqlite_template, home / "secateurs.db")
    running = uvicorn.Server(uvicorn.Config(create_app(), port=0, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    port = running.servers[0].sockets[0].getsockname()[1]
    with transaction() as session:
        key = keys.create_key(session, "test", ["admin"])[1]
    monkeypatch.setenv("SECATEURS_SERVER", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("SECATEURS_KEY", key)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def answer(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out)


def test_price_without_a_server_gives_the_published_numbers(call: Any) -> None:
    price = answer(call("price", "mobilenet_v1", "--encoding", ",".join(map(str, ENCODING)), "--json"))
    assert price["flops"] == 313_208_831
    assert price["authors_flops"] == 316_800_208
    assert price["channels"][-2:] == [993, 1024]
    assert sum(layer["flops"] for layer in price["layers"]) == price["flops"]
    assert sum(layer["parameters"] for layer in price["layers"]) == price["parameters"]
    again = answer(call("price", "mobilenet_v1", "--channels", ",".join(map(str, price["channels"])), "--json"))
    assert again == price


def test_price_of_the_unpruned_network_and_of_widths_off_the_grid(call: Any) -> None:
    assert answer(call("price", "mobilenet_v1", "--json"))["flops"] == 568_740_352
    uniform = get_space("mobilenet_v1").uniform(0.75)
    price = answer(call("price", "mobilenet_v1", "--channels", " ".join(map(str, uniform)), "--json"))
    assert price["encoding"] is None
    assert price["channels"] == list(uniform)


def test_price_with_a_table_adds_latency_and_shares(call: Any, tmp_path: Path) -> None:
    space = get_space("resnet20", 8, 0.25, 10)
    layers = set(space.layers(space.channels(space.largest)))
    table = LatencyTable("here", "f" * 64)
    for layer in layers:
        table.add(Entry(layer, 1e-6 * (1 + layer.c_out)))
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table.to_json()))
    price = answer(call("price", "resnet20", *SIZE, "--table", file, "--json"))
    assert price["latency_ms"] == pytest.approx(sum(layer["latency_ms"] for layer in price["layers"]))
    assert sum(layer["share"] for layer in price["layers"]) == pytest.approx(1)
    assert price["device"] == "here"
    code, out, _ = call("price", "resnet20", *SIZE, "--table", file)
    assert code == 0
    assert f"{price['latency_ms']:.4f} ms on here" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["price", "mobilenet_v9"], 2, "mobilenet_v1, mobilenet_v2"),
        (["price"], 2, "Missing argument"),
        (["price", "resnet20", "--encoding", "1,x"], 2, "28,18,10"),
        (["price", "resnet20", "--encoding", "1", "--channels", "1"], 2, "not both"),
        (["price", "resnet20", "--encoding", "99"], 2, "genes"),
        (["price", "resnet20", "--table", "/nowhere.json"], 2, "/nowhere.json"),
        (["price", "resnet20", "--last-layer", "odd"], 2, "'free', 'fixed'"),
        (["prize"], 2, "No such command"),
        (["jobs"], 2, "SECATEURS_KEY"),
        (["jobs", "--server", "http://127.0.0.1:1", "--key", "k"], 1, "is `secateurs up` running?"),
        (["jobs", "--server", "nonsense", "--key", "k"], 2, "http://"),
        (["submit", "x", "--dataset", "d", "--max-flops", "many", "--key", "k"], 2, "1.5M"),
        (["submit", "x", "--dataset", "d", "--device", "a", "--key", "k"], 2, "--max-ms"),
        (["submit", "--dataset", "d", "--max-flops", "1M", "--key", "k"], 2, "name a space: lenet"),
        (["submit", "x", "--max-flops", "1M", "--key", "k"], 2, "--dataset"),
        (["submit", "x", "--dataset", "d", "--key", "k"], 2, "--max-flops, --max-parameters or --device with --max-ms"),
        (["submit", "x", "--method", "y"], 2, "'y' is not one of 'metapruning', 'collaborative'"),
        (["submit", "x", "--effort", "y"], 2, "for '--effort': 'y' is not one of 'smoke', 'quick'"),
        (["submit", "x", "--strategy", "y"], 2, "'y' is not one of 'evolution', 'random'"),
        (["devices", "import", "d", "table.csv", "--key", "k"], 2, "import the JSON"),
        (["agent", "--device", "d", "--server", "http://127.0.0.1:1"], 2, "SECATEURS_TOKEN"),
    ],
)
def test_mistakes_get_one_line_that_helps(
    call: Any, home: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    for name in ("SECATEURS_SERVER", "SECATEURS_KEY", "SECATEURS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    got, out, err = call(*arguments)
    assert (got, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "value"), [("1500000", 1_500_000), ("1.5M", 1_500_000), ("300k", 300_000), ("4.1G", 4_100_000_000)]
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.usefixtures("server")
def test_a_job_is_submitted_listed_shown_and_cancelled(call: Any) -> None:
    code, out, _ = call(*JOB, "--max-flops", "100K", "--seed", "7", "--epochs", "2", "--idempotency-key", "one")
    assert code == 0
    job_id = out.strip()
    assert call(*JOB, "--max-flops", "100K", "--seed", "7", "--epochs", "2", "--idempotency-key", "one")[1] == out

    job = answer(call("jobs", job_id, "--json"))
    assert job["spec"]["constraints"] == [{"metric": "flops", "max": 100_000, "min": None}]
    assert (job["spec"]["seed"], job["spec"]["training"]["epochs"]) == (7, 2)
    assert job_id in call("jobs")[1]
    assert "flops ≤ 100.00 K" in call("jobs")[1]
    assert [one["id"] for one in answer(call("jobs", "--json"))["items"]] == [job_id]

    assert call("cancel", job_id)[0] == 0
    code, out, _ = call("watch", job_id, "--json")
    assert code == 1
    assert json.loads(out)["state"] == "cancelled"
    assert answer(call("candidates", job_id, "--json"))["items"] == []


@pytest.mark.usefixtures("server")
def test_a_job_from_a_file_takes_options_over_it(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    constraints = [{"metric": "flops", "max": 90_000}]
    file.write_text(json.dumps({"space": "mobilenet_v1", "dataset": "digits", "width": 0.25, "image_size": 8,
                                "constraints": constraints, "search": {"generations": 3}}))  # fmt: skip
    job = answer(call("submit", "--file", file, "--population", "10", "--max-flops", "95K", "--json"))
    assert job["spec"]["constraints"][0]["max"] == 95_000
    assert (job["spec"]["search"]["generations"], job["spec"]["search"]["population"]) == (3, 10)
    file.write_text(json.dumps({"search": 3}))
    code, _, err = call("submit", "--file", file, "--population", "10")
    assert (code, err.count("\n")) == (2, 1)
    assert 'search must be an object, such as {"search": {"population": 10}}' in err


@pytest.mark.usefixtures("server")
def test_what_users_write_is_no_markup(call: Any) -> None:
    assert call("devices", "add", "board", "--description", "[/lab] the [v2] board")[0] == 0
    code, out, _ = call("devices", "show", "board")
    assert code == 0
    assert "[/lab] the [v2] board" in out


@pytest.mark.usefixtures("server")
def test_an_infeasible_budget_is_refused_with_the_range(call: Any) -> None:
    space = get_space("mobilenet_v1", 64, 0.25, 10, True)
    smallest = flops(space.layers(space.channels(space.smallest)))
    code, _, err = call(*JOB, "--image-size", "64", "--max-flops", "10")
    largest = flops(space.layers(space.channels(space.largest)))
    assert code == 1
    assert f"from {smallest} to {largest}" in err


@pytest.mark.usefixtures("server")
def test_a_device_lives_from_add_to_remove(call: Any, tmp_path: Path) -> None:
    code, token, hint = call("devices", "add", "bench")
    assert code == 0
    assert "secateurs agent --server http://THIS-MACHINE:" in hint
    assert "up --host 0.0.0.0" in hint
    assert token.strip() not in hint
    assert call("devices", "add", "bench")[0] == 1
    assert "bench" in call("devices")[1]

    profile = answer(call("profile", "bench", "resnet20", *SIZE, "--points", "3", "--json"))
    assert profile["space"] == "resnet20"

    space = get_space("resnet20", 8, 0.25, 10)
    layers = set(space.layers(space.channels(space.largest)))
    table = LatencyTable("elsewhere", "f" * 64, {layer.key: Entry(layer, 1e-5) for layer in layers})
    file, copy = tmp_path / "table.json", tmp_path / "copy.json"
    file.write_text(json.dumps(table.to_json()))
    assert call("devices", "import", "bench", file)[0] == 0
    assert call("devices", "export", "bench", "--file", copy)[0] == 0
    assert {row["layer"]["c_out"] for row in json.loads(copy.read_text())["entries"]} == {one.c_out for one in layers}
    price = answer(call("price", "resnet20", *SIZE, "--device", "bench", "--json"))
    assert price["latency_ms"] == pytest.approx(len(space.layers(space.channels(space.largest))) * 0.01)

    shown = call("devices", "show", "bench")[1]
    assert "bench" in shown
    for title in ("slowest layers", "operators", "coverage"):
        assert title in shown
    foreign = tmp_path / "phone.json"
    foreign.write_text(json.dumps({"Conv-input:8x8x3-output:8x8x4": {"mean": 1.0}, "Logits-input:1x1x4": {}}))
    imported = answer(call("devices", "import", "bench", foreign, "--json"))
    assert (imported["stored"], list(imported["skipped"])) == (1, ["Logits-input:1x1x4"])
    assert call("devices", "remove", "bench")[0] == 0
    assert call("devices", "show", "bench")[0] == 1


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["devices", "add", "bad name!"], "body.name: must begin with a letter or digit"),
        (["devices", "show", "nope"], "no device 'nope'; there are: bench"),
        (["devices", "export", "nope"], "no device 'nope'; there are: bench"),
        (["devices", "remove", "nope"], "no device 'nope'; there are: bench"),
        (["profile", "nope", "resnet20"], "no device 'nope'; there are: bench"),
        (["watch", "abc"], "no job 'abc'; see `secateurs jobs`"),
        (["cancel", "abc"], "no job 'abc'; see `secateurs jobs`"),
        (["watch", "A!"], "path.job: must hold only small letters, digits and hyphens"),
    ],
)
def test_what_the_service_refuses_is_one_line_that_helps(call: Any, arguments: list[str], says: str) -> None:
    call("devices", "add", "bench")
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("server")
def test_spaces_are_listed(call: Any) -> None:
    shown = call("spaces")[1]
    assert all(name in shown for name in SPACES)
    assert {one["name"] for one in answer(call("spaces", "--json"))["items"]} == set(SPACES)


def test_the_version_is_told(call: Any) -> None:
    assert call("--version") == (0, f"{version('secateurs')}\n", "")


@pytest.mark.usefixtures("server")
def test_what_was_found_can_be_asked_before_anything_was(call: Any) -> None:
    assert "digits" in call("datasets")[1]
    asked = ("--space", "mobilenet_v1", "--dataset", "digits", "--json")
    assert answer(call("best", *asked, "--max-flops", "1M", "--image-size", "8"))["items"] == []
    assert answer(call("pareto", *asked))["items"] == []


def test_the_key_of_the_embedded_service_goes_to_its_server_only(
    call: Any, home: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transaction() as session:
        key = keys.create_key(session, "file", ["read"])[1]
    (home / "client.json").write_text(json.dumps({"server": server, "key": key}))
    monkeypatch.delenv("SECATEURS_KEY")
    assert call("jobs")[0] == 0
    monkeypatch.delenv("SECATEURS_SERVER")
    assert call("jobs")[0] == 0
    code, _, err = call("jobs", "--server", "http://elsewhere.example")
    assert code == 2
    assert "SECATEURS_KEY" in err


def test_every_phase_gets_a_bar_of_its_own() -> None:

    with bars(Console(quiet=True)) as progress:
        bar = JobBar(progress, "job")
        for event, data in (
            ("state", {"state": "queued"}), ("state", {"state": "training"}), ("progress", {"done": 3, "total": 9}),
            ("generation", {"generation": 0}),
        ):  # fmt: skip
            bar.show({"id": "1", "event": event, "data": data})
        assert [(task.description, task.completed, task.total) for task in progress.tasks] == [
            ("job queued", 1, 1), ("job training", 3, 9),
        ]  # fmt: skip
        bar.show({"id": "9", "event": "state", "data": {"state": "succeeded"}})
        assert all(task.finished for task in progress.tasks)


def test_the_command_lists_its_commands_and_loads_nothing_that_takes_long() -> None:
    code = "import sys, service.cli as cli\ntry: cli.app(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = "up submit watch jobs candidates best pareto devices profile price datasets spaces cancel agent"
    assert all(command in done.stdout for command in wanted.split())
    slow = {"torch", "pydantic", "fastapi", "sqlalchemy", "celery", "onnx", "onnxruntime", "scipy", "sklearn", "PIL"}
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "typer" in loaded
    assert not slow & loaded


def test_a_job_shows_its_front_and_how_the_search_went() -> None:
    def one(flops: int, uniform: dict[str, Any] | None) -> dict[str, Any]:
        return {"flops": flops, "parameters": 10, "channels": [flops], "test_accuracy": 0.5, "uniform": uniform}

    generation = {"generation": 0, "candidates": 8, "best_accuracy": 0.75, "mean_accuracy": 0.25, "diversity": 0.875,
                  "exhaustive": True, "hypervolume": 0.625}  # fmt: skip
    front = [one(1000, one(990, None)), one(2000, None)]
    console = Console(record=True, width=200)
    tables.show_result(console, {"winner": front[1], "front": front, "generations": [generation]})
    shown = console.export_text()
    assert [line.split()[0] for line in shown.splitlines() if " K" in line] == ["winner", "winner"]
    assert "uniform  channels 990" in shown
    assert all(text in shown for text in ("87.50 %", "62.50 %", "every structure within the budget was judged"))


def test_a_budget_may_be_about_nine_of_ten_runs(server: str, call: Any) -> None:
    call("devices", "add", "bench")
    bound = ["--device", "bench", "--max-ms", "5", "--statistic", "p90"]
    job = answer(call(*JOB, *bound, "--json"))
    assert job["spec"]["constraints"] == [
        {"metric": "latency", "device": "bench", "max_ms": 5.0, "min_ms": None, "statistic": "p90"}
    ]
    _, shown, _ = call("jobs", job["id"])
    assert "bench:p90 ≤ 5 ms" in shown
    place = ["--space", "mobilenet_v1", "--dataset", "digits"]
    assert answer(call("best", *place, *bound, "--json"))["items"] == []
    assert answer(call("pareto", *place, "--device", "bench", "--statistic", "p90", "--json"))["items"] == []
    code, _, err = call(*JOB, *bound[:-1], "p95")
    assert code != 0
    assert "p90" in err
