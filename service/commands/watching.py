"""Follow a job on the terminal: one progress bar that changes with the job's phase."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from latency_profiler.client import Client

TERMINAL = ("succeeded", "failed", "cancelled", "unverified")


class JobBar:
    """A job's state as a line with a bar; every finished phase stays on the screen."""

    def __init__(self, progress: Progress, job_id: str) -> None:
        self._progress, self._job_id = progress, job_id
        self._state = ""
        self._task: TaskID | None = None

    def show(self, job: dict[str, Any]) -> None:
        """Draw the job as it is now."""
        if job["state"] != self._state:
            self._enter(job["state"])
        moved = job.get("progress") or {}
        if self._task is not None and moved.get("total"):
            self._progress.update(self._task, total=moved["total"], completed=moved.get("done", 0))
        if job["state"] in TERMINAL:
            self._finish_bar()

    def _enter(self, state: str) -> None:
        self._finish_bar()
        self._state = state
        self._task = self._progress.add_task(f"{self._job_id[:8]} {state}", total=None)

    def _finish_bar(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[self._progress.task_ids.index(self._task)].total or 1
            self._progress.update(self._task, total=total, completed=total)
            self._progress.stop_task(self._task)


def bars(console: Console) -> Progress:
    """Progress bars on a console."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def follow(client: Client, job_id: str, console: Console) -> dict[str, Any]:
    """Show a job until it has ended and return it; a server that goes away is waited for."""
    with bars(console) as progress:
        bar = JobBar(progress, job_id)
        bar.show(client.job(job_id))
        for _ in client.events(job_id):
            bar.show(client.job(job_id))
        job = client.job(job_id)
        bar.show(job)
    return job
