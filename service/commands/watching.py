"""Follow a job on the terminal: one progress bar that changes with the job's phase."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from latency_profiler.client import TERMINAL, Client


class JobBar:
    """A job's phase as a line with a bar; every phase that is over stays on the screen."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._task: TaskID | None = None

    def show(self, event: dict[str, Any]) -> None:
        """Draw what an event tells."""
        data = event["data"]
        if event["event"] == "state":
            self._close()
            if data["state"] not in TERMINAL:
                self._task = self._progress.add_task(f"{self._label} {data['state']}", total=None)
        elif event["event"] == "progress" and self._task is not None and data.get("total"):
            self._progress.update(self._task, total=data["total"], completed=data.get("done", 0))

    def _close(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
            self._progress.stop_task(self._task)
            self._task = None


def bars(console: Console) -> Progress:
    """Progress bars on a console."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def follow(client: Client, job_id: str, console: Console, label: str | None = None) -> dict[str, Any]:
    """Show a job until it has ended and return it; a server that goes away is waited for."""
    client.job(job_id)  # one that does not exist is refused before anything is drawn
    with bars(console) as progress:
        bar = JobBar(progress, label or job_id[:8])
        for event in client.events(job_id):
            bar.show(event)
    return client.job(job_id)
