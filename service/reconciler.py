"""`python -m service.reconciler`: rings for jobs that wait, sweeps what has expired, prices and sorts what was found.

It repairs whatever a lost message, a dead worker or a restarted broker left behind. Every action is guarded or can be
repeated, so that any number of copies may run.
"""

import logging
import signal
import threading
import time

from service import broker
from service.settings import get_settings
from service.store import blobs, idempotency, jobs, repricing, skybands
from service.store.repricing import Due, Walk
from service.store.session import DATABASE_AWAY, snapshot, transaction

log = logging.getLogger(__name__)
MOST_RINGS = 16
SWEEP_SECONDS = 3600.0
"""How often files are looked for that nobody has registered."""
PRICING_SECONDS = 5.0
"""Time for pricing in each round: enough to read a table and have time left to use it."""


def reconcile() -> int:
    """One round; returns how many jobs wait for a worker.

    As many bells lie in the queue as jobs wait, and no more however long no worker comes.
    """
    with transaction() as session:
        jobs.end_cancelled(session)
        waiting, _ = jobs.claimable(session)
    wanted = min(waiting, MOST_RINGS)
    for _ in range(wanted - broker.unheard() if wanted else 0):
        if not broker.ring():
            break
    return waiting


def reprice(seconds: float, stop: threading.Event, walks: dict[Due, Walk] | None = None) -> bool:
    """Price what is due, a chunk per transaction, for so long or until told to stop; True when nothing is left.

    Args:
        walks: keeps the walk that time has run out for, so that the next call goes on with it; one whose step has
            failed begins anew.
    """
    until, begun = time.monotonic() + seconds, {} if walks is None else walks
    with snapshot() as session:
        due = repricing.due(session)
    for gone in begun.keys() - set(due):
        del begun[gone]
    for one in due:
        walk = begun.pop(one, None) or _walk(one)
        more = True
        while more:
            if stop.is_set() or time.monotonic() > until:
                begun[one] = walk
                return False
            with transaction() as session:
                more = walk.step(session)
    return True


def _walk(due: Due) -> Walk:
    with snapshot() as session:
        return Walk(session, due)


def gather(seconds: float, stop: threading.Event) -> bool:
    """Take candidates into skybands for so long or until told to stop; True when nothing is left."""
    until = time.monotonic() + seconds
    with transaction() as session:
        last = skybands.last_candidate(session)
        places = skybands.places(session) if last is not None else []
    for place in places:
        more = last is not None
        while more:
            if stop.is_set() or time.monotonic() > until:
                return False
            with transaction() as session:
                more = skybands.advance(session, place, last or 0)
    return True


def main() -> None:
    """Until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    period, done, walks, swept = get_settings().reconcile_seconds, True, dict[Due, Walk](), -SWEEP_SECONDS
    while not stop.wait(period if done else 0.0):
        try:
            reconcile()
            if time.monotonic() - swept > SWEEP_SECONDS:
                swept = time.monotonic()
                with snapshot() as session:
                    blobs.sweep(session)
            with transaction() as session:
                idempotency.sweep(session)
            seconds = max(period, PRICING_SECONDS)
            done = reprice(seconds, stop, walks) and gather(seconds, stop)
        except DATABASE_AWAY as error:
            log.warning("the database did not answer: %s", error)
            done = True


if __name__ == "__main__":
    main()
