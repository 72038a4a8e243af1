"""What an operator does on the server: migrate the database, issue and revoke API keys, check both."""

import argparse
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

import migrations
from latency_profiler.errors import SecateursError
from service.settings import get_settings
from service.store import devices, keys
from service.store.session import get_engine, transaction


class SchemaMismatch(SecateursError):
    """The database's schema is not this version's.

    Attributes:
        found, wanted: revisions; None is an empty database.
    """

    def __init__(self, found: str | None, wanted: str | None) -> None:
        self.found, self.wanted = found, wanted
        super().__init__(
            f"the database is at revision {found or 'none'}, this version needs {wanted}; "
            "run: python -m service.admin migrate"
        )


def alembic_config(url: str | None = None) -> Config:
    """Alembic's configuration without a file; `url` None is the database of the settings."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["url"] = url or get_settings().database
    return config


def migrate(url: str | None = None, revision: str = "head") -> None:
    """Bring a database to a revision."""
    command.upgrade(alembic_config(url), revision)


def check_schema() -> None:
    """Whether the database is at this version's schema.

    Raises:
        SchemaMismatch: it is not.
    """
    wanted = ScriptDirectory.from_config(alembic_config()).get_current_head()
    with get_engine().connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found != wanted:
        raise SchemaMismatch(found, wanted)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(_run(options) + "\n")
    except (SecateursError, CommandError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OperationalError as error:
        sys.stderr.write(f"the database does not answer: {error.orig}\n")
        return 1
    except ValidationError as error:
        wrong = "; ".join(f"SECATEURS_{'_'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors())
        sys.stderr.write(f"{wrong}\n")
        return 1
    return 0


def _run(options: argparse.Namespace) -> str:
    match options.command:
        case "migrate":
            migrate()
            return "the database is up to date"
        case "create-key":
            check_schema()
            with transaction() as session:
                return keys.create_key(session, options.name, options.scope)[1]
        case "new-token":
            check_schema()
            with transaction() as session:
                return devices.new_token(session, options.device)
        case "revoke-key":
            check_schema()
            with transaction() as session:
                keys.revoke_key(session, options.prefix)
            return f"key {options.prefix} is revoked"
        case _:
            check_schema()
            command.check(alembic_config())
            return "the database has this version's schema"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.admin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("migrate", help="bring the database to this version's schema")
    commands.add_parser("check", help="fail unless the database has this version's schema and models")
    create = commands.add_parser("create-key", help="issue an API key; it is printed once")
    create.add_argument("--name", required=True)
    create.add_argument("--scope", action="append", required=True, choices=sorted(keys.IMPLIED))
    token = commands.add_parser("new-token", help="replace the token of a device's agent; it is printed once")
    token.add_argument("device", help="its name")
    revoke = commands.add_parser("revoke-key", help="make a key worthless at once")
    revoke.add_argument("prefix", help="the part between `sct_` and the next `_`")
    return parser


if __name__ == "__main__":
    sys.exit(main())
