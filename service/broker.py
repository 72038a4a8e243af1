"""The one Celery app, and the doorbells: one for jobs, one for chunks that other workers may score.

A message says only "look for work": it carries no arguments, may be lost or doubled, and expires. Rows are the truth;
the reconciler rings again for whatever is still claimable.
"""

import logging
import threading
from pathlib import Path

from celery import Celery
from kombu.exceptions import OperationalError

from service.settings import get_settings

JOBS = "jobs"
EVALUATE = "evaluate"
DOORBELLS = {JOBS: "secateurs.doorbell", EVALUATE: "secateurs.evaluate"}
"""Queue → its one task."""
log = logging.getLogger(__name__)


def _filesystem(home: Path) -> dict[str, object]:
    folder = home / "queue"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "data_folder_in": str(folder), "data_folder_out": str(folder), "control_folder": str(home / "queue-control"),
        "polling_interval": 0.2,
    }  # fmt: skip


def make_app() -> Celery:
    """The app with the settings that the design relies on: early acknowledgement, JSON only, no result backend."""
    settings = get_settings()
    app = Celery("secateurs", broker=settings.broker_url or "filesystem://")
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        task_publish_retry=False,
        task_default_queue=JOBS,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=bool(settings.broker_url),
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_timeout": 5, "socket_connect_timeout": 2, "socket_keepalive": True, "health_check_interval": 10,
            # Without these a bell whose broker is away holds a thread of the API for six seconds.
            "max_retries": 1, "interval_start": 0, "interval_step": 0,
        } if settings.broker_url else _filesystem(settings.home),
    )  # fmt: skip
    return app


app = make_app()
_ringing = threading.Lock()
TURN_SECONDS = 0.2
"""How long a bell waits for the one before it, which takes milliseconds where the broker answers."""


def unheard(queue: str = JOBS) -> int:
    """How many bells lie in the queue; 0 where the broker cannot tell."""
    with app.connection_for_write() as connection:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except (OperationalError, OSError, *connection.connection_errors, *connection.channel_errors):
            return 0


def ring(queue: str = JOBS) -> bool:
    """Tell a worker to look for work; False when the broker did not take the message (who needs it rings again).

    One bell of a process is rung at a time: a broker that accepts and never answers would hold every thread that
    rings for seconds.
    """
    if not _ringing.acquire(timeout=TURN_SECONDS):
        log.warning("the doorbell did not ring: the one before has not been heard yet")
        return False
    try:
        app.send_task(DOORBELLS[queue], queue=queue, expires=60, retry=False)
    except (OperationalError, OSError) as error:
        log.warning("the doorbell did not ring: %s", error)
        return False
    finally:
        _ringing.release()
    return True
