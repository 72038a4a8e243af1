"""Devices, their lookup tables, and the datasets of the service."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from latency_profiler.durable import save
from latency_profiler.errors import InvalidInput
from latency_profiler.foreign_tables import is_foreign
from service.commands import tables
from service.commands.login import connect
from service.commands.options import (
    DeviceName,
    ImageSize,
    Json,
    Key,
    LastLayer,
    Server,
    SpaceName,
    Width,
    err,
    given,
    out,
    read_json,
)

LOOPBACK = ("127.0.0.1", "localhost")
devices = typer.Typer(invoke_without_command=True, help="List devices; add, show, remove them; export, import tables.")
datasets = typer.Typer(invoke_without_command=True, help="List datasets; add one below the service's data root.")


@devices.callback()
def list_devices(context: typer.Context, server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """List devices; add, show, remove them; export and import their tables."""
    if context.invoked_subcommand is None:
        with connect(server, key) as client:
            answer = client.devices()
        tables.show_json(answer) if as_json else tables.show_devices(out, answer["items"])


@devices.command("add")
def add_device(
    device: DeviceName,
    description: Annotated[str, typer.Option(help="What it is.")] = "",
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Register a device and print its agent's token, which is shown only this once."""
    with connect(server, key) as client:
        answer = client.add_device(device, description)
        address = client.url
    if as_json:
        return tables.show_json(answer)
    out.print(answer["token"], soft_wrap=True)
    hint = ""
    if (host := urlsplit(address).hostname) in LOOPBACK:
        address = address.replace(host, "THIS-MACHINE", 1)
        hint = " (start the service with `up --host 0.0.0.0`, so that others reach it)"
    err.print(f"on the device: SECATEURS_TOKEN=… secateurs agent --server {address} --device {device}{hint}")


@devices.command("show")
def show_device(device: DeviceName, server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """What a device is, what it has measured, and what is left."""
    with connect(server, key) as client:
        answer = client.device(device) | {"survey": client.table_survey(device)}
    tables.show_json(answer) if as_json else tables.show_device(out, answer)


@devices.command("remove")
def remove_device(device: DeviceName, server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """Forget a device with its tables and its token."""
    with connect(server, key) as client:
        client.delete_device(device)
    tables.show_json({"removed": device}) if as_json else out.print(f"removed {device}")


@devices.command("export")
def export_table(
    device: DeviceName,
    file: Annotated[Path | None, typer.Option(help="Where to; .csv for spreadsheets. Without it: print.")] = None,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """A device's lookup table as JSON, or its layers as CSV."""
    with connect(server, key) as client:
        csv = file is not None and file.suffix == ".csv"
        text = client.lookup_table_csv(device) if csv else tables.as_json(client.lookup_table(device))
    if file is None:
        return typer.echo(text)
    save(file, text.encode())
    if as_json:
        tables.show_json({"device": device, "file": str(file)})


@devices.command("import")
def import_table(
    device: DeviceName,
    file: Annotated[Path, typer.Argument(help="What `devices export` wrote as JSON, or a ProxylessNAS table.")],
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Give a device a lookup table that was measured elsewhere."""
    if file.suffix == ".csv":
        raise InvalidInput(f"{file} is for spreadsheets: import the JSON that `devices export` writes")
    table = read_json(file)
    with connect(server, key) as client:
        if is_foreign(table):
            answer = client.put_foreign_table(device, file.name, table)
        else:
            answer = client.put_lookup_table(device, table)
    tables.show_json(answer) if as_json else tables.show_facts(out, answer)


def profile(
    device: DeviceName,
    space: SpaceName,
    image_size: ImageSize = None,
    width: Width = 1.0,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    last_layer: LastLayer = None,
    points: Annotated[
        int | None, typer.Option(min=3, max=31, help="Widths per slot; the rest is interpolated.")
    ] = None,
    refine: Annotated[bool, typer.Option(help="Measure more widths where interpolation between those fails.")] = True,
    full: Annotated[bool, typer.Option("--full", help="Measure every choice.")] = False,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Measure nothing before a job needs the space.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Measure all that the device's table holds anew, into a new table.")
    ] = False,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Plan the layers of a space to be measured on a device."""
    request = given(
        space=space, image_size=image_size, width=width, classes=classes, points=points, last_layer=last_layer
    )
    with connect(server, key) as client:
        mode = "full" if full else "on-demand" if on_demand else None
        more = given(mode=mode) | ({"again": True} if again else {}) | ({} if refine else {"refine": False})
        answer = client.profile(device, request | more)
    tables.show_json(answer) if as_json else tables.show_facts(out, answer)


@datasets.callback()
def list_datasets(context: typer.Context, server: Server = None, key: Key = None, as_json: Json = False) -> None:
    """List datasets; add one below the service's data root."""
    if context.invoked_subcommand is None:
        with connect(server, key) as client:
            answer = client.datasets()
            while cursor := answer["next"]:
                more = client.datasets(cursor=cursor)
                answer = {"items": answer["items"] + more["items"], "next": more["next"]}
        tables.show_json(answer) if as_json else tables.show_datasets(out, answer["items"])


@datasets.command("add")
def add_dataset(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs shall call it.")],
    path: Annotated[str, typer.Argument(help="Folder, archive or .npz, relative to the service's data root.")],
    kind: Annotated[str | None, typer.Option(help="folder, archive or npz; without it the path's ending says.")] = None,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Register images that lie below the service's data root."""
    with connect(server, key) as client:
        answer = client.add_dataset({"name": name, "path": path, "kind": kind or _kind(path)})
    tables.show_json(answer) if as_json else tables.show_facts(out, answer)


def _kind(path: str) -> str:
    name = path.lower()
    if name.endswith(".npz"):
        return "npz"
    return "archive" if name.endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")) else "folder"
