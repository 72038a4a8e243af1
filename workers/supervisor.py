"""Beside every running job: starts its runner, renews its lease, passes progress on, and kills it when it must go.

The runner is a fresh process (never a fork of one that has used torch) in a process group of its own. It writes a
line of JSON to its standard output whenever something has moved. Here the lease is renewed as long as it lives and
moves; it is killed when the lease is lost or cannot be renewed, when the user cancels, or when it hangs.
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.settings import Settings, get_settings
from service.store import jobs
from service.store.jobs import Claim, LeaseLost
from service.store.models import JobState
from service.store.session import transaction

log = logging.getLogger(__name__)
MARGIN = 0.8
"""Share of the lease after which a runner whose lease could not be renewed is stopped."""
DATABASE_AWAY = (OperationalError, PoolTimeout)


def supervise_next(worker: str, stopping: Callable[[], bool]) -> bool:
    """Claim a job and stay with it until it ends or is given back; False when no job waits."""
    settings = get_settings()
    with transaction() as session:
        claim = jobs.claim(session, f"{worker}:{os.getpid()}", settings.lease_seconds, settings.attempts)
    if claim is None:
        return False
    log.info("job %s: claimed with fence %d", claim.job_id, claim.fence)
    with _started(claim) as runner:
        try:
            _watch(Watch(runner, claim, settings), stopping)
        except LeaseLost as error:
            log.info("%s", error)
        finally:
            _kill(runner)
    return True


def _started(claim: Claim) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workers.runner", claim.job_id, claim.owner, str(claim.fence), str(os.getpid())]
    # OpenMP's threads spin while they wait for each other; beside other work on the same cores that costs 14 times.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True, env=env
    )  # fmt: skip


class Watch:
    """A runner with the clock readings that decide how long it may live."""

    def __init__(self, runner: subprocess.Popen[bytes], claim: Claim, settings: Settings) -> None:
        self.runner, self.claim, self.settings = runner, claim, settings
        self.progress: dict[str, Any] | None = None
        self.renewed = self.moved = time.monotonic()
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        assert runner.stdout is not None
        self._selector.register(runner.stdout, selectors.EVENT_READ)

    def listen(self) -> bool:
        """Read what the runner says for up to one beat; False once it has closed its output."""
        assert self.runner.stdout is not None
        deadline = time.monotonic() + self.settings.beat_seconds
        while (left := deadline - time.monotonic()) > 0:
            if not self._selector.select(left):
                break
            chunk = os.read(self.runner.stdout.fileno(), 65536)
            if not chunk:
                return False
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            self.moved = time.monotonic()
            for line in lines:
                self.progress = json.loads(line) or self.progress
        return True

    def beat(self) -> bool:
        """Renew the lease; True when the user wants the job cancelled.

        Raises:
            LeaseLost: another worker has the job, or the database was away for too long to be sure.
        """
        try:
            with transaction() as session:
                cancel = jobs.beat(session, self.claim, self.settings.lease_seconds, self.progress)
            self.renewed, self.progress = time.monotonic(), None
            return cancel
        except DATABASE_AWAY as error:
            if time.monotonic() - self.renewed > MARGIN * self.settings.lease_seconds:
                raise LeaseLost(f"job {self.claim.job_id}: its lease could not be renewed ({error})") from error
            return False

    @property
    def hung(self) -> bool:
        """Whether the runner has said nothing for too long."""
        return time.monotonic() - self.moved > self.settings.stall_seconds


def _watch(watch: Watch, stopping: Callable[[], bool]) -> None:
    """Until the runner ends, then record how."""
    while watch.listen():
        if watch.beat():
            _kill(watch.runner)
            with transaction() as session:
                jobs.finish(session, watch.claim, JobState.CANCELLED)
            return
        if watch.hung:
            _kill(watch.runner)
            _lose(watch.claim, f"no progress for {watch.settings.stall_seconds:g} s")
            return
        if stopping():
            watch.runner.send_signal(signal.SIGTERM)
    code = watch.runner.wait()
    if code:
        _lose(watch.claim, f"the runner ended with {_name(code)}")


def _lose(claim: Claim, reason: str) -> None:
    log.error("job %s: %s", claim.job_id, reason)
    with transaction() as session:
        jobs.lose(session, claim, reason, after_seconds=2.0)


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill(runner: subprocess.Popen[bytes]) -> None:
    """The whole process group, so that nothing outlives its job."""
    if runner.poll() is None:
        os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
