"""Measurements that wait to be handed in, on disk: what was measured survives a lost server and a killed agent."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from latency_profiler.durable import save

log = logging.getLogger("secateurs.agent")


class Spool:
    """A folder with one file per upload, named by its `upload_id`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, upload: dict[str, Any]) -> None:
        """Keep an upload until it is dropped."""
        save(self._file(upload["upload_id"]), json.dumps(upload).encode())

    def pending(self) -> Iterator[dict[str, Any]]:
        """Uploads that wait, the oldest first; another agent of the same spool may hand them in meanwhile."""
        waiting = list[tuple[int, Path]]()
        for file in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):
                waiting.append((file.stat().st_mtime_ns, file))
        for _, file in sorted(waiting):
            try:
                upload = json.loads(file.read_bytes())
                yield {**upload, "upload_id": file.stem}
            except FileNotFoundError:
                continue
            except (ValueError, TypeError):
                log.warning("%s is no upload; it is left out", file)
                file.rename(file.with_suffix(".broken"))

    def drop(self, upload: dict[str, Any]) -> None:
        """Forget an upload that was taken or is of no use."""
        self._file(upload["upload_id"]).unlink(missing_ok=True)

    def _file(self, upload_id: str) -> Path:
        return self.folder / f"{upload_id}.json"
