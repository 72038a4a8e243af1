"""`celery -A workers.app worker`: the doorbells, and the flag that tells its jobs to stop at the next step.

A worker listens to the queues `jobs` and `evaluate`, or to one of them (`-Q`); each of its processes (`-c`) runs one
job or scores chunks of another worker's.
"""

import multiprocessing
import socket
from typing import Any

from celery.signals import worker_shutting_down

from service.broker import DOORBELLS, EVALUATE, JOBS, app
from workers.supervisor import evaluate_next, supervise_next

stopping = multiprocessing.Event()
"""Set by the worker's main process at a warm shutdown; pool processes inherit it and give their jobs back."""


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    stopping.set()


@app.task(name=DOORBELLS[JOBS])
def doorbell() -> None:
    """Work on jobs until none is left."""
    while not stopping.is_set() and supervise_next(socket.gethostname(), stopping.is_set):
        pass


@app.task(name=DOORBELLS[EVALUATE])
def evaluate() -> None:
    """Score chunks until none is left, or, where the worker takes jobs too, until one waits."""
    jobs_first = JOBS in app.amqp.queues.consume_from
    while not stopping.is_set() and evaluate_next(socket.gethostname(), stopping.is_set, jobs_first):
        pass
