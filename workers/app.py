"""`celery -A workers.app worker`: the doorbell, and the flag that tells its jobs to stop at the next step."""

import multiprocessing
import socket
from typing import Any

from celery.signals import worker_shutting_down

from service.broker import DOORBELL, app
from workers.supervisor import supervise_next

stopping = multiprocessing.Event()
"""Set by the worker's main process at a warm shutdown; pool processes inherit it and give their jobs back."""


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    stopping.set()


@app.task(name=DOORBELL)
def doorbell() -> None:
    """Work on jobs until none is left."""
    while not stopping.is_set() and supervise_next(socket.gethostname(), stopping.is_set):
        pass
