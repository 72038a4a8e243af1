"""Measuring in a process of its own, one process of a machine at a time.

Runtimes are native code: some layer may hang or crash one. Then its process is killed, and what it was measuring is a
failed measurement instead of a dead agent. The process opens the runtime once, then takes groups of work as JSON.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from latency_profiler.errors import MeasurementFailed, NoMeasuringProcess
from latency_profiler.measuring import failure, measure_group, yardstick_of
from latency_profiler.parent import die_with
from latency_profiler.reference import reference_of
from latency_profiler.runtimes.base import Settings, open_runtime

Json = dict[str, Any]
PATIENCE = 300.0
"""Seconds without a sign of progress: compilers take minutes, and no layer or value takes so long."""
ALIVE = b"alive"
"""What the process says when it is ready, and while it measures; results come as JSON."""
ALIVE_SECONDS = 1.0
"""How often it says so while it measures, at most."""
LOOK_SECONDS = 1.0
"""How often somebody who waits looks around."""
log = logging.getLogger("secateurs.agent")


class Bench:
    """A process that measures with one runtime; it is started when it is needed, and anew when it was lost.

    Args:
        runtime: its name.
        settings: how it computes.
        patience: seconds without progress after which a group hangs.
        waiting: called about every second while something is measured.
        usual: a file that tells the next process how fast the machine usually is with these settings.
    """

    def __init__(
        self,
        runtime: str,
        settings: Settings,
        patience: float = PATIENCE,
        waiting: Callable[[], None] = lambda: None,
        usual: Path | None = None,
    ) -> None:
        self._runtime, self._settings, self._patience, self.waiting = runtime, settings, patience, waiting
        self._usual = usual
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def measure(self, items: Sequence[Json], seed: int) -> list[Json]:
        """Results of a group. If the process is lost over it, each item is tried alone: the guilty one has failed.

        Raises:
            NoMeasuringProcess: none starts, whatever it shall measure.
        """
        try:
            return self._ask({"items": list(items), "seed": seed})
        except MeasurementFailed as error:
            log.warning("%s while it measured %s", error, ", ".join(str(item["key"]) for item in items))
            if len(items) == 1:
                return [failure(items[0], str(error))]
        return [result for item in items for result in self.measure([item], seed)]

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._line is not None:
            self._line.close()
        self._process = self._line = None

    def _ask(self, task: Json) -> list[Json]:
        line = self._open()
        try:
            line.send_bytes(json.dumps(task).encode())
            while (said := self._heard(line, self._patience)) == ALIVE:
                pass
            results: list[Json] = json.loads(said)
        except (EOFError, OSError) as error:
            raise MeasurementFailed(f"the measuring process {self._end()}") from error
        return results

    def _heard(self, line: Connection, patience: float) -> bytes:
        """The next that the process says.

        Raises:
            MeasurementFailed: it says nothing for too long.
        """
        deadline = time.monotonic() + patience
        while not line.poll(LOOK_SECONDS):
            if time.monotonic() > deadline:
                self.close()
                raise MeasurementFailed(f"the measuring process hung for {patience:g} s and was killed")
            self.waiting()
        return line.recv_bytes()

    def _open(self) -> Connection:
        if self._line is not None:
            return self._line
        line, theirs = Pipe()
        about = [self._runtime, json.dumps(asdict(self._settings)), *([str(self._usual)] if self._usual else ())]
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid()), *about]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()
                )
            self._heard(line, PATIENCE)  # that it is ready
        except (EOFError, OSError, MeasurementFailed) as error:
            line.close()
            how = "hung" if isinstance(error, MeasurementFailed) else self._end()
            raise NoMeasuringProcess(self._runtime, how) from error
        self._line = line
        return line

    def _end(self) -> str:
        """How the process ended, which has hung up."""
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(LOOK_SECONDS)
        self.close()
        if code is not None and code < 0:
            return f"died of {signal.Signals(-code).name}"
        return f"ended with status {code}"


class Turn:
    """A file that one agent of this machine holds while it measures, whichever services they belong to.

    The system takes the lock away from a process that dies. Where the file cannot be opened there is no lock.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._handle = _open_shared(file or Path(tempfile.gettempdir()) / "secateurs-measuring.lock")

    def take(self) -> bool:
        """Whether it is this agent's turn now."""
        if self._handle is None:
            return True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def give_back(self) -> None:
        """Let others measure."""
        if self._handle is not None:
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give back, and forget the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _open_shared(file: Path) -> int | None:
    """A file that every user may lock; a link is not followed."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with suppress(FileNotFoundError):  # first: in a shared folder, another user's file must not be "created"
            return os.open(file, flags)
        handle = os.open(file, flags | os.O_CREAT, 0o666)
        with suppress(OSError):
            os.fchmod(handle, 0o666)
        return handle
    except OSError as error:
        log.warning("agents of other services on this machine are not waited for: %s", error)
        return None


def _serve(line: Connection, runtime: str, settings: Settings, usual: Path | None) -> None:
    """Measure group after group until the agent hangs up."""
    opened = open_runtime(runtime, settings)
    yardstick, reference, last = yardstick_of(opened), reference_of(opened, usual), 0.0

    def alive() -> None:
        nonlocal last
        if time.monotonic() > last + ALIVE_SECONDS:
            line.send_bytes(ALIVE)
            last = time.monotonic()

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        alive()
        while True:
            task = json.loads(line.recv_bytes())
            results = measure_group(opened, task["items"], task["seed"], yardstick, alive, reference)
            line.send_bytes(json.dumps(results).encode())


def main(arguments: Sequence[str]) -> None:
    """The process: handle of its line, id of the agent's process, runtime, settings, and the file of what is usual."""
    handle, parent, runtime, settings, *usual = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which ends this process
    if die_with(int(parent)):
        file = Path(usual[0]) if usual else None
        _serve(Connection(int(handle)), runtime, Settings(**json.loads(settings)), file)


if __name__ == "__main__":
    main(sys.argv[1:])
