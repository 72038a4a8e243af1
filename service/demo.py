"""`make demo`: the whole way once, on this machine: profile it, search twice, compare with uniform networks.

Both jobs run on `digits`, one under a FLOPs budget, one under a latency budget; the second reuses the PruningNet that
the first has trained. The second is submitted when the first has ended, because training beside a measurement would
disturb it. What was found is printed and written to `summary.json` in the demo's home.
"""

import json
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from latency_profiler.client import Client
from latency_profiler.durable import save
from latency_profiler.errors import SecateursError, ServiceError
from latency_profiler.spaces.registry import get_space
from service.children import Child
from service.commands import tables
from service.commands.watching import bars, follow
from service.up import THIS_MACHINE, locked

SPACE = "resnet20"
SIZE: dict[str, Any] = {"image_size": 8, "width": 1.0}
SIZE_OF_SPACE = {**SIZE, "classes": 10, "last_layer": "free"}
JOB = {"space": SPACE, "dataset": "digits", "effort": "quick", "seed": 0, **SIZE}
FLOPS_SHARE = 1 / 8
"""The first job's budget, as a share of the unpruned network's FLOPs."""
UNIFORM_SHARE = 0.5
"""The second job's budget is the predicted latency of the uniform network with this share of all widths."""
PHASES = ("profiling", "training", "searching", "retraining", "verifying")
LARGE_ERROR = 0.15
START_SECONDS = 90.0
POINTS = 6
"""Widths a side that are measured: where the processor is seldom quiet, ten take minutes."""
PROFILE_SECONDS = 400.0
STOP_SECONDS = 20.0
MARK = "demo.mark"
"""The file that tells a demo's home, which the next demo removes, from a service's."""

Result = dict[str, Any]


class DemoError(SecateursError):
    """The demo cannot go on; the message says where to look."""


def main(
    home: Annotated[Path, typer.Option(help="Where the demo's service lives.")] = Path("demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Go on with the home as the last demo left it.")] = False,
    install_seconds: Annotated[float, typer.Option(help="How long making the environment took.")] = 0.0,
) -> None:
    """Profile this machine, run two searches on it and show what they found."""
    console, begun = Console(highlight=False, markup=False), time.monotonic()
    if not keep:
        _clear(home)
    if not home.exists():
        home.mkdir(parents=True, mode=0o700)
        (home / MARK).touch()
    with _service(home.absolute(), console) as client:
        profiling = _profile(client, console)
        first = _search(client, console, "job 1", [_flops_budget(client)], measure_on=[THIS_MACHINE])
        second = _search(client, console, "job 2", [_latency_budget(client)])
    jobs = [first, second]
    summary = {
        "jobs": [summarise(job) for job in jobs],
        "profiling_seconds": round(profiling, 2),
        "seconds": round(time.monotonic() - begun + install_seconds, 2),
        "install_seconds": install_seconds,
    }
    save(home / "summary.json", json.dumps(summary, indent=2).encode())
    _show(console, summary, home)
    if failed := [job for job in jobs if job["state"] != "succeeded"]:
        raise DemoError("; ".join(f"job {job['id']} {job['state']}: {_reason(job)}" for job in failed))


def _reason(job: Result) -> str:
    return str((job.get("error") or {}).get("detail") or "; ".join(map(str, job["warnings"])) or "no reason given")


def _clear(home: Path) -> None:
    """Remove what an earlier demo left, and nothing else; no service may be using it."""
    if not home.exists():
        return
    if any(home.iterdir()) and not (home / MARK).exists():
        raise DemoError(f"{home.absolute()} holds something else than a demo; remove it, or choose another --home")
    with locked(home):
        shutil.rmtree(home)


@contextmanager
def _service(home: Path, console: Console) -> Iterator[Client]:
    """A service of the demo's own, on a free port."""
    (home / "logs").mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "service.cli", "up", "--home", str(home), "--port", str(port)]
    up = Child("secateurs up", argv, None, home / "logs" / "up.log")
    console.print(f"starting the service on port {port} (home: {home})")
    begun = time.monotonic()
    up.start()
    try:
        with _connect(up, home, port) as client:
            console.print(f"ready after {time.monotonic() - begun:.1f} s")
            yield client
    finally:
        up.terminate()
        up.end(time.monotonic() + STOP_SECONDS)


def _connect(up: Child, home: Path, port: int) -> Client:
    """A client of the service, once it is ready and its agent has come."""
    deadline = time.monotonic() + START_SECONDS
    while up.alive() and time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            known = json.loads((home / "client.json").read_text())
            if known["server"].endswith(f":{port}"):
                client = Client(known["server"], known["key"])
                if _measures(client):
                    return client
                client.close()
        except FileNotFoundError:
            continue
    raise DemoError(f"the service did not start: {up.last_line()} (logs: {home / 'logs'})")


def _measures(client: Client) -> bool:
    try:
        client.ready()
        return bool(client.device(THIS_MACHINE)["alive"])
    except ServiceError:
        return False


def _profile(client: Client, console: Console) -> float:
    """Have this machine measured for the space; returns the seconds that it took."""
    begun = time.monotonic()
    wanted = client.profile(THIS_MACHINE, {"space": SPACE, **SIZE_OF_SPACE, "points": POINTS})
    with bars(console) as progress:
        task = progress.add_task("profile this machine", total=wanted["planned"] or None)
        while time.monotonic() - begun < PROFILE_SECONDS:
            profile = next(one for one in client.profiles(THIS_MACHINE)["items"] if one["id"] == wanted["id"])
            finished = profile["done"] + profile["failed"]
            progress.update(task, total=profile["planned"] or None, completed=finished)
            if profile["planned"] and finished >= profile["planned"] and profile["fit"]:
                break
            time.sleep(0.3)
        else:
            raise DemoError(f"profiling took longer than {PROFILE_SECONDS:g} s; see the agent's log")
    if profile["failed"]:
        raise DemoError(f"{profile['failed']} layers could not be measured; see the agent's log")
    error = profile["fit"]["mean_error"]
    console.print(f"{profile['done']} layers and networks; mean error on held-out networks {100 * error:.1f} %")
    if error > LARGE_ERROR:
        console.print(
            "this is much: something else keeps the machine busy, and latencies are uncertain", style="yellow"
        )
    return time.monotonic() - begun


def _flops_budget(client: Client) -> Result:
    largest = client.space(SPACE, **SIZE_OF_SPACE)["largest"]
    return {"metric": "flops", "max": round(int(largest["flops"] * FLOPS_SHARE), -3)}


def _latency_budget(client: Client) -> Result:
    """What the uniform network costs; the middle of the range where noise has put that outside of it."""
    space = get_space(SPACE, classes=10, free_last=True, **SIZE)
    structures = (space.channels(space.smallest), space.uniform(UNIFORM_SHARE), space.channels(space.largest))
    smallest, uniform, largest = (_latency_ms(client, channels) for channels in structures)
    most = uniform if smallest < uniform < largest else (smallest + largest) / 2
    return {"metric": "latency", "device": THIS_MACHINE, "max_ms": round(most, 4)}


def _latency_ms(client: Client, channels: Sequence[int]) -> float:
    price = client.price(SPACE, {"channels": list(channels), "devices": [THIS_MACHINE], **SIZE_OF_SPACE})
    return float(price["latency_ms"][THIS_MACHINE])


def _search(client: Client, console: Console, label: str, constraints: list[Result], **options: Any) -> Result:
    job = client.submit({**JOB, **options, "constraints": constraints})
    console.print(f"{label}: {', '.join(map(tables.bound, constraints))} ({job['id']})")
    return follow(client, job["id"], console, label)


def summarise(job: Result) -> Result:
    """A job as `summary.json` shows it; latencies are this machine's."""
    result = job["result"] or {}
    return {
        "job_id": job["id"],
        "state": job["state"],
        "space": job["spec"]["space"],
        "dataset": job["spec"]["dataset"],
        "constraints": job["spec"]["constraints"],
        "winner": _structure(result.get("winner")),
        "uniform": _structure(result.get("uniform")),
        "candidates": result.get("candidates"),
        "seconds": {phase: round(job["seconds"].get(phase, 0.0), 2) for phase in PHASES},
        "pruning_net_reused": result.get("pruning_net_reused"),
    }


def _structure(one: Result | None) -> Result | None:
    if one is None:
        return None
    kept = {name: one[name] for name in ("channels", "flops", "parameters", "proxy_accuracy", "test_accuracy")}
    latencies = {name: one[name].get(THIS_MACHINE) for name in ("predicted_ms", "measured_ms")}
    return kept | latencies


def _show(console: Console, summary: Result, home: Path) -> None:
    columns = ["", "flops", "predicted ms", "measured ms", "proxy accuracy", "test accuracy"]
    for number, job in enumerate(summary["jobs"], 1):
        budget = ", ".join(map(tables.bound, job["constraints"]))
        reused = ", PruningNet reused" if job["pruning_net_reused"] else ""
        title = f"job {number}: {budget}; {job['state']}, {job['candidates']} candidates{reused}"
        roles = [(role, job[role]) for role in ("winner", "uniform") if job[role]]
        rows = [
            [role, tables.count(one["flops"]), one["predicted_ms"], one["measured_ms"],
             tables.percent(one["proxy_accuracy"]), tables.percent(one["test_accuracy"])]
            for role, one in roles
        ]  # fmt: skip
        console.print()
        tables.show(console, columns, rows, title)
        tables.show_channels(console, roles)
    console.print()
    times = [[f"job {number}", *(f"{job['seconds'][phase]:.1f}" for phase in PHASES)]
             for number, job in enumerate(summary["jobs"], 1)]  # fmt: skip
    tables.show(console, ["seconds", *PHASES], times)
    spent = f"{summary['seconds']:.0f} s in all (install {summary['install_seconds']:.0f} s, "
    console.print(f"{spent}profiling this machine {summary['profiling_seconds']:.0f} s)")
    console.print(f"\nwritten: {home / 'summary.json'}. To ask the service for more, start it again:", soft_wrap=True)
    _show_commands(console, summary, home)


def _show_commands(console: Console, summary: Result, home: Path) -> None:
    secateurs = shlex.quote(str(Path(sys.executable).with_name("secateurs")))
    bound = summary["jobs"][1]["constraints"][0]
    best = f"best --space {SPACE} --dataset digits --device {bound['device']} --max-ms {bound['max_ms']}"
    console.print(f"  {secateurs} up --home {shlex.quote(str(home))}", soft_wrap=True)
    console.print(f"  SECATEURS_HOME={shlex.quote(str(home))} {secateurs} {best}", soft_wrap=True)


def run() -> int:
    """Run the demo; returns the exit code."""
    try:
        typer.run(main)
    except SecateursError as error:
        Console(stderr=True, highlight=False, markup=False).print(f"error: {error}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
