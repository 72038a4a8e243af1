"""`python -m service.reconciler`: rings for jobs that wait for a worker, and sweeps what has expired.

It repairs whatever a lost message, a dead worker or a restarted broker left behind. Every action is one guarded
statement, so that any number of copies may run.
"""

import logging
import signal
import threading

from sqlalchemy import delete
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from service import broker
from service.settings import get_settings
from service.store import jobs
from service.store.models import Idempotency, now
from service.store.session import snapshot, transaction

log = logging.getLogger(__name__)
MOST_RINGS = 16
DAY = 86_400.0


def reconcile() -> int:
    """One round; returns how many jobs wait for a worker."""
    with snapshot() as session:
        waiting, _ = jobs.claimable(session)
    for _ in range(min(waiting, MOST_RINGS)):
        broker.ring()
    return waiting


def sweep(session: Session) -> None:
    """Forget answers whose repetition nobody needs any more."""
    session.execute(delete(Idempotency).where(Idempotency.created_at < now() - DAY))


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
                sweep(session)
        except (OperationalError, PoolTimeout) as error:
            log.warning("the database did not answer: %s", error)


if __name__ == "__main__":
    main()
