"""What runs on this machine: the embedded service, an agent, and prices that need no server."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latency_profiler.errors import InvalidInput
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.quote import quote
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.commands import tables
from service.commands.login import connect, home_folder
from service.commands.options import Json, Key, LastLayer, Server, SpaceName, Width, out, parse_integers, read_json
from service.up import Up


def up(
    home: Annotated[Path | None, typer.Option(envvar="SECATEURS_HOME", help="Where everything is kept.")] = None,
    host: Annotated[str, typer.Option(envvar="SECATEURS_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="SECATEURS_PORT", min=1, max=65535, help="Port to listen on.")] = 8740,
    workers: Annotated[int, typer.Option(min=1, help="How many run at once: jobs first, the rest help to score.")] = 1,
    agent: Annotated[bool, typer.Option(help="Measure on this machine as device this-machine.")] = True,
    as_json: Json = False,
) -> None:
    """Run the whole service on this machine, with nothing else to install; Ctrl-C stops it."""
    say = partial(typer.echo, err=as_json)
    announce = tables.show_json if as_json else None
    Up((home or home_folder()).absolute(), host, port, workers, agent, say, announce).run()


def agent(
    device: Annotated[str, typer.Option(help="Name under which the device is registered.")],
    server: Annotated[str, typer.Option(envvar="SECATEURS_SERVER", help="Address of the service.")],
    token: Annotated[str | None, typer.Option(envvar="SECATEURS_TOKEN", help="The device's token.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds it.")] = None,
    runtime: Annotated[str, typer.Option(help="What computes; a wrong name lists all.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 1,
    batch: Annotated[int, typer.Option(help="Images per run.")] = 1,
    dtype: Annotated[str, typer.Option(help="Numbers that it computes in; a wrong name lists all.")] = "float32",
    spool: Annotated[Path | None, typer.Option(help="Folder for what could not be handed in yet.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End when there is nothing to measure.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say what happens as one JSON object a line.")] = False,
) -> None:
    """Measure on this machine for a service."""
    if not token and token_file is None:
        raise InvalidInput("no token: set SECATEURS_TOKEN to what `secateurs devices add` printed")
    options = {
        "server": server, "device": device, "token-file": token_file, "runtime": runtime, "threads": threads,
        "batch": batch, "dtype": dtype, "spool": spool,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    flags = [f"--{name}" for name, value in {"once": once, "json": as_json}.items() if value]
    command = [sys.executable, "-m", "latency_profiler.agent", *given, *flags]
    os.execve(sys.executable, command, os.environ | ({"SECATEURS_TOKEN": token} if token else {}))


def price(
    space: SpaceName,
    encoding: Annotated[str | None, typer.Option(metavar="N,N,…", help="Choices of the genes, 0 to 30.")] = None,
    channels: Annotated[str | None, typer.Option(metavar="N,N,…", help="Channel numbers.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 224,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 1000,
    width: Width = 1.0,
    last_layer: LastLayer = "fixed",
    table: Annotated[Path | None, typer.Option(help="A lookup table that `devices export` wrote.")] = None,
    device: Annotated[str | None, typer.Option(help="A device of the service, whose table is used.")] = None,
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """What a structure costs (without --encoding and --channels: the unpruned network); only --device asks a server."""
    place = get_space(space, image_size, width, classes, last_layer == "free")
    genes = None if encoding is None else parse_integers(encoding)
    structure = _channels(place, genes, channels)
    answer = quote(place, structure, _table(table, device, server, key), genes)
    tables.show_json(answer) if as_json else tables.show_price(out, answer)


def _channels(space: Space, encoding: Sequence[int] | None, channels: str | None) -> tuple[int, ...]:
    if encoding is not None and channels is not None:
        raise InvalidInput("give --encoding or --channels, not both")
    if channels is not None:
        return space.complete(parse_integers(channels))
    return space.channels(space.largest if encoding is None else encoding)


def _table(file: Path | None, device: str | None, server: str | None, key: str | None) -> LatencyTable | None:
    if file is not None and device is not None:
        raise InvalidInput("give --table or --device, not both")
    if file is not None:
        return LatencyTable.from_json(read_json(file))
    if device is None:
        return None
    with connect(server, key) as client:
        return LatencyTable.from_json(client.lookup_table(device))
