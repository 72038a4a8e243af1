"""How the command line shows what the service answers."""

import json
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
UNBROKEN = ("job", "structure", "device", "submitted", "budget")
"""Columns whose cells are copied into other commands, or read badly in pieces."""


def as_json(content: Any) -> str:
    """One JSON document."""
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)


def show_json(content: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(as_json(content))


def show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table; numbers stand right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(_numeric(row[i]) for row in rows)
        plain = column in UNBROKEN
        table.add_column(column, justify="right" if numeric else "left", no_wrap=plain, overflow="fold")
    for row in rows:
        table.add_row(*map(text, row))
    console.print(table)
    if not rows:
        console.print("(none)")


def _numeric(value: Any) -> bool:
    return value is None or (str(value)[:1].isdigit() and not isinstance(value, list))


def text(value: Any) -> str:
    """One cell."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ",".join(map(str, value))
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def count(value: float | None) -> str | None:
    """A number of multiply-adds or parameters for people, e.g. `1.50 M`."""
    if value is None:
        return None
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))


def percent(share: float | None) -> str | None:
    """An accuracy or a share, e.g. `91.30 %`."""
    return None if share is None else f"{100 * share:.2f} %"


def when(seconds: float | None) -> str | None:
    """A moment in local time."""
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def milliseconds(latencies: Mapping[str, float] | None) -> str | None:
    """Latencies by name, e.g. `bench-cpu 0.81`."""
    return None if not latencies else ", ".join(f"{device} {ms:.3f}" for device, ms in sorted(latencies.items()))


def bound(constraint: Row) -> str:
    """A constraint, e.g. `flops ≤ 1.50 M` or `0.5 ≤ bench-cpu ≤ 0.8 ms`."""
    if constraint["metric"] == "latency":
        low, high, statistic = constraint.get("min_ms"), constraint["max_ms"], constraint.get("statistic", "p50")
        name = constraint["device"] if statistic == "p50" else f"{constraint['device']}:{statistic}"
        return (f"{low:g} ≤ " if low else "") + f"{name} ≤ {high:g} ms"
    low, high = constraint.get("min"), constraint["max"]
    return (f"{count(low)} ≤ " if low else "") + f"{constraint['metric']} ≤ {count(high)}"


def show_jobs(console: Console, jobs: Sequence[Row]) -> None:
    """Jobs, one a line."""
    rows = [
        [
            job["id"], job["state"], job["spec"]["space"], job["spec"]["dataset"],
            ", ".join(map(bound, job["spec"]["constraints"])), when(job.get("created_at")),
        ]
        for job in jobs
    ]  # fmt: skip
    show(console, ["job", "state", "space", "dataset", "budget", "submitted"], rows)


def show_job(console: Console, job: Row) -> None:
    """One job: what was asked, where it is, what came out."""
    show_jobs(console, [job])
    for warning in job.get("warnings") or []:
        console.print(f"warning: {warning}")
    if error := job.get("error"):
        console.print(f"error: {error.get('detail') or error.get('title')}")
    if result := job.get("result"):
        show_result(console, result)


def show_result(console: Console, result: Row) -> None:
    """Winner, or every member of a front, beside the uniform network of the same budget."""
    members = [(one, one["uniform"]) for one in result.get("front") or []]
    pairs = members or [(result.get("winner"), result.get("uniform"))]
    roles = [(role, one) for pair in pairs for role, one in zip(("winner", "uniform"), pair, strict=True) if one]
    methods = result.get("methods") or {}
    roles = [*methods.items(), *roles[1:]] if len(methods) > 1 else roles
    roles += [("dense", dense)] if (dense := result.get("dense")) else []
    names = ["", "flops", "parameters", "predicted ms", "measured ms", "proxy accuracy", "test accuracy"]
    masked = any((one.get("pruned") or {}).get("kept") for _, one in roles)
    rows = [
        [
            role, count(one["flops"]), count(one["parameters"]), milliseconds(one.get("predicted_ms")),
            milliseconds(one.get("measured_ms")), percent(one.get("proxy_accuracy")), percent(one.get("test_accuracy")),
            *(_kept(one) if masked else []),
        ]
        for role, one in roles
    ]  # fmt: skip
    show(console, [*names, *(["kept", "sparse flops"] if masked else [])], rows)
    if masked:
        console.print("zeros do not speed dense runtimes up: flops and milliseconds are those of all weights")
    show_channels(console, roles)
    if generations := result.get("generations"):
        show_generations(console, generations)
    if finalists := result.get("finalists"):
        show_finalists(console, finalists, {one["structure_id"] for _, one in roles})
    if fidelity := result.get("fidelity"):
        show_fidelity(console, fidelity["variants"])


def _kept(one: Row) -> list[str]:
    """Weights that a mask keeps, and the multiply-adds that they take part in."""
    pruned = one.get("pruned") or {}
    return [count(pruned[name]) or "" if name in pruned else "" for name in ("kept", "sparse_flops")]


def show_generations(console: Console, generations: Sequence[Row]) -> None:
    """How the search went; diversity is the mean share of genes in which two candidates of a generation differ."""
    names = ("generation", "candidates", "best_accuracy", "mean_accuracy", "diversity", "hypervolume")
    shown = [name for name in names if name in generations[0]]
    rows = [
        [one[name] if name in names[:2] else percent(one[name]) for name in shown]
        for one in generations
    ]  # fmt: skip
    show(console, [name.replace("_", " ") for name in shown], rows)
    if generations[0]["exhaustive"]:
        console.print("every structure within the budget was judged")


def show_finalists(console: Console, finalists: Sequence[Row], winners: Container[str]) -> None:
    """Accuracies on the sub-validation set after short trainings of the search's best, in its order."""
    said = [
        f"{percent(one['accuracy'])}{' (chosen)' if one['structure_id'] in winners else ''}"
        for one in finalists
    ]  # fmt: skip
    console.print(f"finalists on validation images, the proxy's best first: {', '.join(said)}", soft_wrap=True)


def show_fidelity(console: Console, variants: Sequence[Row]) -> None:
    """How well the PruningNet ranks, by each way to judge."""
    taus = [
        f"{text(one['tau'])} by {one['rank_by']}" + ("" if one["recalibrated"] else " without recalibration")
        for one in variants
    ]
    facts = f"{variants[0]['structures']} structures, {variants[0]['weights']} weights"
    console.print(f"fidelity (Kendall's tau, {facts}): {', '.join(taus)}", soft_wrap=True)


def show_channels(console: Console, roles: Sequence[tuple[str, Row]]) -> None:
    """Channel numbers, too long for a table's cell."""
    for role, one in roles:
        console.print(f"{role:<8} channels {text(one['channels'])}", soft_wrap=True)


def show_structures(console: Console, structures: Sequence[Row]) -> None:
    """Structures or candidates, best first."""
    rows = [
        [
            one["structure_id"], percent(one.get("test_accuracy")),
            percent(one.get("proxy_accuracy")), count(one["flops"]), count(one["parameters"]),
            milliseconds(one.get("predicted_ms")), milliseconds(one.get("measured_ms")), one["channels"],
        ]
        for one in structures
    ]  # fmt: skip
    names = ["structure", "test accuracy", "proxy accuracy", "flops", "parameters", "predicted ms", "measured ms"]
    show(console, [*names, "channels"], rows)


def show_devices(console: Console, devices: Sequence[Row]) -> None:
    """Devices, one a line."""
    rows = [
        [
            one["name"],
            "yes" if one.get("alive") else "no",
            when(one.get("beat_at")),
            one.get("measured"),
            one.get("waiting"),
        ]
        for one in devices
    ]
    show(console, ["device", "alive", "last beat", "measured", "waiting"], rows)


def show_device(console: Console, device: Row) -> None:
    """A device, the quality of its table, and what the table shows."""
    table, seen = device["table"] or {}, device["survey"]
    lists = {name: table.get(name) or [] for name in ("fits", "spaces")}
    shown = {key: value for key, value in device.items() if key not in ("survey", "pricing", "table")}
    show_facts(console, shown | {"table": {key: value for key, value in table.items() if key not in lists}})
    terms = [
        {"space_key": fit["space_key"], "statistic": fit["statistic"], "term": name, "weight": weight}
        for fit in lists["fits"]
        for name, weight in fit["terms"].items()
    ]
    fits = [{name: value for name, value in fit.items() if name != "terms"} for fit in lists["fits"]]
    sections = {
        "table quality": fits, "terms beside the slope": terms, "spaces": lists["spaces"],
        "structures that have a latency": device["pricing"],
        "slowest layers": seen["slowest"], "operators": seen["operators"], "coverage": seen["coverage"],
    }  # fmt: skip
    for title, rows in sections.items():
        if rows:
            console.print()
            show_rows(console, rows, title)


def show_rows(console: Console, rows: Sequence[Row], title: str) -> None:
    """Objects that have the same names, one a line; a pair of numbers is a range."""
    cells = [[_range(value) for value in row.values()] for row in rows]
    show(console, [name.replace("_", " ") for name in rows[0]], cells, title)


def _range(value: Any) -> Any:
    return f"{value[0]} to {value[1]}" if isinstance(value, list | tuple) and len(value) == 2 else value


def show_datasets(console: Console, datasets: Sequence[Row]) -> None:
    """Datasets, one a line."""
    rows = [
        [one["name"], one.get("classes"), one.get("image_size"), one.get("train_images"), one.get("test_images")]
        for one in datasets
    ]
    show(console, ["dataset", "classes", "image size", "training images", "test images"], rows)


def _interpolated(layer: Row) -> str:
    """Nothing for a measured layer; about how far an interpolated one is off."""
    if not layer["interpolated"]:
        return ""
    return "yes" if layer.get("error") is None else f"± {percent(layer['error'])}"


def show_price(console: Console, price: Row) -> None:
    """A structure's costs, layer by layer."""
    priced = "latency_ms" in price
    rows = [
        [
            layer["name"], layer["c_in"], layer["c_out"], layer["size"],
            count(layer["flops"]), count(layer["parameters"]),
            *([f"{layer['latency_ms']:.4f}", percent(layer["share"]), _interpolated(layer)] if priced else []),
        ]
        for layer in price["layers"]
    ]  # fmt: skip
    columns = ["layer", "in", "out", "size", "flops", "parameters"]
    show(console, columns + (["ms", "share", "interpolated"] if priced else []), rows)
    lines = {
        "channels": text(price["channels"]),
        "flops": f"{price['flops']:,} multiply-adds ({price['authors_flops']:,} as the authors count)",
        "parameters": f"{price['parameters']:,}",
    }
    if priced:
        lines["latency"] = f"{price['latency_ms']:.4f} ms on {price['device']}"
    for name, line in lines.items():
        console.print(f"{name:<12}{line}", soft_wrap=True)


def show_facts(console: Console, facts: Row, prefix: str = "") -> None:
    """Any answer as indented lines, for what has no table of its own."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            console.print(f"{prefix}{name}")
            show_facts(console, value, prefix + "  ")
        else:
            shown = when(value) if name.endswith("_at") else text(value)
            console.print(f"{prefix}{name}: {shown or '-'}", soft_wrap=True)
