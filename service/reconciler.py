"""`python -m service.reconciler`: rings for jobs that wait for a worker, and sweeps what has expired.

It repairs whatever a lost message, a dead worker or a restarted broker left behind. Every action is one guarded
statement, so that any number of copies may run.
"""

import logging
import signal
import threading

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service import broker
from service.settings import get_settings
from service.store import idempotency, jobs
from service.store.session import snapshot, transaction

log = logging.getLogger(__name__)
MOST_RINGS = 16


def reconcile() -> int:
    """One round; returns how many jobs wait for a worker."""
    with snapshot() as session:
        waiting, _ = jobs.claimable(session)
    for _ in range(min(waiting, MOST_RINGS)):
        broker.ring()
    return waiting


def main() -> None:
    """Until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    period = get_settings().reconcile_seconds
    while not stop.wait(period):
        try:
            reconcile()
            with transaction() as session:
                idempotency.sweep(session)
        except (OperationalError, PoolTimeout) as error:
            log.warning("the database did not answer: %s", error)


if __name__ == "__main__":
    main()
