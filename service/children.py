"""Child processes that die with their parent, are started again when they die, and leave nothing behind."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latency_profiler.parent import die_with

STABLE_SECONDS = 60.0
LONGEST_BACKOFF = 30.0


@dataclass
class Child:
    """One supervised process with its log file."""

    name: str
    argv: list[str]
    env: Mapping[str, str] | None
    """None is this process's."""
    log: Path
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    """Deaths in a row, each within `STABLE_SECONDS` of its start."""
    started: float = 0.0
    retry_at: float | None = None

    def start(self) -> None:
        """Start it in a process group of its own that dies with this process."""
        self.retry_at, self.started = None, time.monotonic()
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=partial(_arm, os.getpid()),
            )  # fmt: skip

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def tend(self) -> str | None:
        """Restart it when it is dead and its backoff is over; what to tell the user, if anything."""
        if self.alive():
            return None
        now = time.monotonic()
        if self.retry_at is None:
            self.failures = self.failures + 1 if now - self.started < STABLE_SECONDS else 1
            delay = min(LONGEST_BACKOFF, 0.5 * 2 ** (self.failures - 1))
            self.retry_at = now + delay
            code = self.process.returncode if self.process else None
            return f"{self.name} ended with code {code}; starting it again in {delay:g} s (log: {self.log})"
        if now >= self.retry_at:
            self.start()
        return None

    def last_line(self) -> str:
        """The last thing that it said."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def terminate(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.alive():
            self.process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until the deadline (monotonic seconds), then kill what is left of its process group."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _arm(parent: int) -> None:
    """In the forked child: without its parent it is not wanted."""
    if not die_with(parent):
        os._exit(1)
