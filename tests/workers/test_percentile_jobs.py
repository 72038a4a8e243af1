"""Jobs whose budget is about nine of ten runs, through the steps that a runner does."""

from typing import Any

import pytest
from sqlalchemy import delete

from latency_profiler.errors import NotCalibrated
from service.store import agents, devices, measurements
from service.store.agents import Batch, Outcome
from service.store.candidates import space_arguments
from service.store.measurements import canonical_sha
from service.store.models import JobState, TableFit, Work, WorkKind
from service.store.session import transaction
from tests.workers.whole_jobs import FACTS, SPACE, Bench, latency_bound, run, submit

TAIL = 1.4
"""Nine of ten runs of a network take no longer than so many medians."""


class Uneven(Bench):
    """Its single runs differ; `tail` says by how much, of a network that is measured for a purpose."""

    def __init__(self, tail: dict[str, float] | None = None) -> None:
        super().__init__()
        self.tail, self.asked = tail or {}, list[str]()

    def measure(self) -> int:
        """Answer all work that waits; returns how much it was."""
        with transaction() as session:
            device = devices.get(session, self.name)
            leased = agents.lease(session, device, FACTS, 5000, 60.0)
            if leased.works:
                outcomes = [self._outcome(work) for work in leased.works]
                batch = Batch(leased.lease_id, leased.lease_id, canonical_sha(FACTS), outcomes)
                agents.record(session, device, batch)
        return len(leased.works) and len(leased.works) + self.measure()

    def _outcome(self, work: Work) -> Outcome:
        seconds, told = self._value(work), dict[str, Any]()
        if work.kind is WorkKind.NETWORK:
            purpose = work.payload["purpose"]
            self.asked += [work.payload["statistic"]] if purpose.startswith(("check", "verify")) else []
            told = {"p90": seconds * next((t for start, t in self.tail.items() if purpose.startswith(start)), TAIL)}
        return Outcome(work.id, work.kind, work.key, seconds, values=[seconds], conditions=told)


def tail_bound(share: float) -> dict[str, Any]:
    return latency_bound(share) | {"statistic": "p90"}


def test_a_broken_percentile_is_corrected_and_the_median_beside_it_is_not(world: None) -> None:
    bench = Uneven({"check": 1.2 * TAIL, "verify": 1.2 * TAIL})
    job = run(submit(latency_bound(0.6), tail_bound(0.6)), bench)
    assert (job.state, set(bench.asked)) == (JobState.SUCCEEDED, {"p90"})
    assert job.result is not None
    assert job.memory["corrections"]["bench"] == pytest.approx(1.0, rel=0.05)
    assert job.memory["corrections"]["bench:p90"] == pytest.approx(1.2, rel=0.1)
    assert {figure["device"] for figure in job.result["figures"]} == {"bench:p90"}
    winner, limit = job.result["winner"], tail_bound(0.6)["max_ms"]
    assert winner["measured_ms"].keys() == winner["predicted_ms"].keys() == {"bench", "bench:p90"}
    assert 0.8 * limit <= winner["measured_ms"]["bench:p90"] <= limit
    assert winner["measured_ms"]["bench:p90"] == pytest.approx(1.2 * TAIL * winner["measured_ms"]["bench"])
    assert winner["predicted_ms"]["bench:p90"] == pytest.approx(winner["measured_ms"]["bench:p90"], rel=0.1)


def test_a_table_that_cannot_tell_a_percentile_says_so(world: None) -> None:
    """As one that was measured before percentiles were."""
    bench = Uneven()
    with transaction() as session:
        device = devices.get(session, "bench")
        measurements.request_profile(session, device, space_arguments(SPACE), "sampled", 6)
    bench.measure()
    with transaction() as session:
        session.execute(delete(TableFit).where(TableFit.statistic == "p90"))
    with pytest.raises(NotCalibrated, match="tell the p90"):
        run(submit(tail_bound(0.6)), bench)
