"""Which server the command line talks to, and with which key."""

import json
import os
from pathlib import Path

from platformdirs import user_data_path

from latency_profiler.client import Client
from latency_profiler.errors import InvalidInput

DEFAULT_SERVER = "http://127.0.0.1:8740"


def home_folder() -> Path:
    """Where `secateurs up` keeps everything unless it is told otherwise."""
    return Path(os.environ.get("SECATEURS_HOME") or user_data_path("secateurs"))


def connect(server: str | None, key: str | None) -> Client:
    """A client from the options, else from what `secateurs up` wrote into its home.

    Options hold the environment already. The file's key goes to the file's server only.

    Raises:
        InvalidInput: there is no key to use.
    """
    known = _known(home_folder() / "client.json")
    if key is None and (server is None or server.rstrip("/") == known.get("server")):
        key = known.get("key")
    if key is None:
        raise InvalidInput("no API key: give --key, set SECATEURS_KEY, or start `secateurs up` on this machine")
    return Client(server or known.get("server") or DEFAULT_SERVER, key)


def _known(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read ({error}); give --server and --key, or remove it") from error
    return content if isinstance(content, dict) else {}
