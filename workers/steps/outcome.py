"""How a step ended."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """`ended`: the job is over. `wait`: nothing could be done; look again after so many seconds, or when woken."""

    ended: bool = False
    wait: float | None = None


MOVED = Outcome()
ENDED = Outcome(ended=True)
FOR_DEVICE = Outcome(wait=60.0)
"""A device's upload wakes the job, so looking is only for deadlines."""
FOR_JOB = Outcome(wait=5.0)
"""Another job trains what this one needs."""
