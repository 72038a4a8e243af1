"""Beside every running job: starts its runner, renews its lease, passes progress on, and kills it when it must go.

The runner is a fresh process (never a fork of one that has used torch) in a process group of its own. It writes a
line of JSON to its standard output whenever something has moved. Here the lease is renewed as long as it lives and
moves; it is killed when the lease is lost or cannot be renewed, when the user cancels, or when it hangs.

A process that scores chunks of a job that another worker runs is kept in the same way, with the leases of its chunks.
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.orm import Session

from service import broker
from service.settings import Settings, get_settings
from service.store import chunks, jobs
from service.store.jobs import Claim, LeaseLost
from service.store.models import JobState, new_id
from service.store.session import DATABASE_AWAY, snapshot, transaction

log = logging.getLogger(__name__)
MARGIN = 0.8
"""Share of the lease after which a runner whose lease could not be renewed is stopped."""
RUNNER_ENVIRONMENT = {
    # OpenMP's threads spin while they wait for each other; beside other work on the same cores that costs 14 times.
    "OMP_WAIT_POLICY": "PASSIVE",
    # glibc gives large freed blocks back to the system, so that every map of every step is mapped in and cleared anew.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
RING_SECONDS = 10.0
"""How often at most one supervisor rings for chunks that wait; each worker that hears it passes it on."""
in_vain: Counter[tuple[str, str]] = Counter()
"""Job and environment → evaluators that failed here; one that is not in that environment counts as all attempts."""


def supervise_next(worker: str, stopping: Callable[[], bool]) -> bool:
    """Claim a job and stay with it until it ends or is given back; False when no job waits."""
    settings = get_settings()
    with transaction() as session:
        claim = jobs.claim(session, _owner(worker), settings.lease_seconds, settings.attempts)
    if claim is None:
        return False
    log.info("job %s: claimed with fence %d", claim.job_id, claim.fence)

    def renew(session: Session, progress: dict[str, Any] | None) -> bool:
        chunks.renew(session, claim.owner, settings.lease_seconds)
        return jobs.beat(session, claim, settings.lease_seconds, progress)

    with _started("workers.runner", claim.job_id, claim.owner, str(claim.fence)) as runner:
        try:
            _watch(Watch(runner, settings, renew), claim, stopping)
        except LeaseLost as error:
            log.info("%s", error)
        finally:
            _kill(runner)
            _release(claim.owner)
    return True


def evaluate_next(worker: str, stopping: Callable[[], bool], jobs_first: bool) -> bool:
    """Score chunks of another worker's job until none is left; False when none waits that this worker can score.

    Args:
        jobs_first: whether a job that waits for a worker goes before all chunks.
    """
    settings, owner = get_settings(), _owner(worker)
    with snapshot() as session:
        waiting = [one for one in chunks.waiting(session) if in_vain[one] < settings.attempts]
        if not waiting or (jobs_first and jobs.claimable(session)[0]):
            return False

    def renew(session: Session, _progress: object) -> bool:
        chunks.renew(session, owner, settings.lease_seconds)
        return jobs_first and jobs.claimable(session)[0] > 0

    with _started("workers.evaluator", *waiting[0], owner) as runner:
        try:
            code = _attend(Watch(runner, settings, renew), stopping)
        except LeaseLost as error:
            log.info("%s", error)
            code = 0
        finally:
            _kill(runner)
            _release(owner)
    if code not in (0, -signal.SIGTERM):  # it may have been told to stop before it could listen
        log.warning("job %s: the process that scored for it ended with %s", waiting[0][0], _name(code))
        in_vain[waiting[0]] += settings.attempts if code == os.EX_CONFIG else 1
    return True


def _owner(worker: str) -> str:
    """Another name for every claim: what a former one left behind must not be kept by this one's beats."""
    return f"{worker}:{os.getpid()}:{new_id()[:8]}"


def _started(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *arguments, str(os.getpid())]
    env = {**RUNNER_ENVIRONMENT, **os.environ}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True, env=env
    )  # fmt: skip


Renew = Callable[[Session, dict[str, Any] | None], bool]
"""Renews all leases of a runner and stores its progress; True when it shall stop."""


class Watch:
    """A runner with the clock readings that decide how long it may live."""

    def __init__(self, runner: subprocess.Popen[bytes], settings: Settings, renew: Renew) -> None:
        self.runner, self.settings, self._renew = runner, settings, renew
        self.progress: dict[str, Any] | None = None
        self.renewed = self.moved = time.monotonic()
        self._rang = -RING_SECONDS
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
                self.progress = _progress(line) or self.progress
        return True

    def beat(self) -> bool:
        """Renew the leases, ring for chunks that wait for a worker; True when the runner shall stop.

        Raises:
            LeaseLost: another worker has the job, or the database was away for too long to be sure.
        """
        try:
            with transaction() as session:
                stop = self._renew(session, self.progress)
                alone = bool(chunks.waiting(session))
            self.renewed, self.progress = time.monotonic(), None
        except DATABASE_AWAY as error:
            if time.monotonic() - self.renewed > MARGIN * self.settings.lease_seconds:
                raise LeaseLost(f"runner {self.runner.pid}: its leases could not be renewed ({error})") from error
            return False
        if alone and self.renewed - self._rang > RING_SECONDS:
            self._rang = self.renewed
            broker.ring(broker.EVALUATE)
        return stop

    @property
    def hung(self) -> bool:
        """Whether the runner has said nothing for too long."""
        return time.monotonic() - self.moved > self.settings.stall_seconds


def _progress(line: bytes) -> dict[str, Any] | None:
    """What a runner tells in a line; None where that is nothing, or where some library has printed."""
    try:
        said = json.loads(line)
    except ValueError:
        log.warning("a runner printed %r", line[:200])
        return None
    return said if isinstance(said, dict) else None


def _watch(watch: Watch, claim: Claim, stopping: Callable[[], bool]) -> None:
    """Until the job's runner ends, then record how; an attempt that was told to stop does not count."""
    told = False
    while watch.listen():
        if watch.beat():
            _kill(watch.runner)
            with transaction() as session:
                jobs.finish(session, claim, JobState.CANCELLED)
            return
        if watch.hung:
            _kill(watch.runner)
            _lose(claim, f"no progress for {watch.settings.stall_seconds:g} s")
            return
        if stopping():
            watch.runner.send_signal(signal.SIGTERM)
            told = told or _excused(claim)
    code = watch.runner.wait()
    if code == -signal.SIGTERM and told:  # before it could listen
        with transaction() as session:
            jobs.release(session, claim)
    elif code:
        _lose(claim, f"the runner ended with {_name(code)}")


def _attend(watch: Watch, stopping: Callable[[], bool]) -> int:
    """Until a process that scores chunks ends; its exit code."""
    while watch.listen():
        if watch.beat() or stopping():
            watch.runner.send_signal(signal.SIGTERM)
        if watch.hung:
            _kill(watch.runner)
    return watch.runner.wait()


def _excused(claim: Claim) -> bool:
    """Whether the job knows that its runner was told to stop."""
    with suppress(*DATABASE_AWAY), transaction() as session:
        jobs.excuse(session, claim)
        return True
    return False


def _lose(claim: Claim, reason: str) -> None:
    log.error("job %s: %s", claim.job_id, reason)
    with transaction() as session:
        jobs.lose(session, claim, reason, after_seconds=2.0)


def _release(owner: str) -> None:
    """Give back chunks that a dead runner held; where the database is away, their leases end."""
    with suppress(*DATABASE_AWAY), transaction() as session:
        chunks.release(session, owner)


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill(runner: subprocess.Popen[bytes]) -> None:
    """The whole process group, so that nothing outlives its job."""
    if runner.poll() is None:
        os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
