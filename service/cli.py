"""`secateurs`: the command line. It is a client of the HTTP service and needs none of the server's packages.

Exit codes: 0 done (for `watch`: succeeded), 1 refused or failed, 2 used wrongly, 130 interrupted.
"""

import os
import sys
from importlib import metadata
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from latency_profiler.errors import InvalidInput, SecateursError, ServiceError
from service.commands import devices, jobs, local
from service.commands.options import err

app = typer.Typer(name="secateurs", no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(metadata.version("secateurs"))
        raise typer.Exit


@app.callback()
def about(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Find the best channel numbers of a convolutional network for your device and your data."""


app.command()(local.up)
app.command()(jobs.submit)
app.command()(jobs.watch)
app.command()(jobs.jobs)
app.command()(jobs.cancel)
app.command()(jobs.candidates)
app.command()(jobs.best)
app.command()(jobs.pareto)
app.add_typer(devices.devices, name="devices")
app.command()(devices.profile)
app.add_typer(devices.datasets, name="datasets")
app.command()(jobs.spaces)
app.command()(local.price)
app.command()(local.agent)


def main() -> None:
    """Run the command; every error is one line that says what to do."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TyperException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "secateurs"
        # Empty where the help has been shown instead; the words before a list of choices are pydantic's.
        message = error.format_message().replace(" Value error,", "")
        return _fail(f"{message} (see {where} --help)", error.exit_code) if message else error.exit_code
    except InvalidInput as error:
        return _fail(str(error), 2)
    except (SecateursError, OSError) as error:
        unknown = isinstance(error, ServiceError) and error.problem.get("kind") == "job"
        return _fail(f"{error}; see `secateurs jobs`" if unknown else str(error), 1)
    except (KeyboardInterrupt, Abort):
        return 130
    except Exception as error:  # an error of ours: the user gets a line too, and the way to a report
        if os.environ.get("SECATEURS_TRACEBACK"):
            raise
        return _fail(f"unexpected {type(error).__name__}: {error} (SECATEURS_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    err.print(f"error: {' '.join(message.split())}", markup=False)
    return code


if __name__ == "__main__":
    main()
