"""What the tests of whole jobs stand on: a simulated device, and the steps of a runner done one after the other."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from sqlalchemy import select, update

from latency_profiler.cost import flops, layer_flops
from latency_profiler.layers import Layer
from latency_profiler.spaces.registry import get_space
from service.settings import get_settings
from service.specs import JobRequest, resolve
from service.store import agents, devices, jobs
from service.store.agents import Batch, Outcome
from service.store.jobs import Claim
from service.store.measurements import canonical_sha
from service.store.models import Candidate, Dataset, Job, PruningNet, Result, Work, WorkKind, clock, new_id
from service.store.session import transaction
from workers.steps.advance import advance
from workers.steps.context import Context

SPACE = get_space("mobilenet_v1", 8, 0.1, 10, free_last=True)
FULL = flops(SPACE.layers(SPACE.channels(SPACE.largest)))
FACTS = {"cpu": "simulated", "cores": 1}


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Console:
    """Hears what the steps say; with `dies_in`, the process ends when a phase has said something so many times."""

    stopping = False

    def __init__(self, dies_in: str = "", after: int = 1) -> None:
        self.dies_in, self.left = dies_in, after

    def say(self, progress: dict[str, Any] | None = None) -> None:
        if progress and progress.get("phase") == self.dies_in:
            self.left -= 1
            if not self.left:
                raise Killed


class Listener(Console):
    """Remembers all that it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    def say(self, progress: dict[str, Any] | None = None) -> None:
        self.told += [progress] if progress else []


class Bench:
    """A device whose layers take a nanosecond per multiply-add and some microseconds.

    `factor` makes whole networks slower than the sum of their layers; `away` makes it answer nothing.
    """

    def __init__(self, factor: Callable[[str], float] = lambda purpose: 1.0, name: str = "bench") -> None:
        self.factor, self.name, self.away = factor, name, False
        with transaction() as session:
            devices.register(session, name, "")

    @staticmethod
    def seconds(layer: Layer) -> float:
        return 1e-9 * layer_flops(layer) + 1e-6 * layer.c_out**0.5

    def measure(self) -> int:
        """Answer all work that waits; returns how much it was."""
        done = 0
        while not self.away:
            with transaction() as session:
                device = devices.get(session, self.name)
                leased = agents.lease(session, device, FACTS, 500, 60.0)
                if not (works := self._taken(leased.works)):
                    break
                outcomes = [self._outcome(work) for work in works]
                upload = hashlib.sha256(repr([w.id for w in works]).encode()).hexdigest()[:32]
                agents.record(session, device, Batch(upload, leased.lease_id, canonical_sha(FACTS), outcomes))
                done += len(outcomes)
        return done

    def _taken(self, works: Sequence[Work]) -> Sequence[Work]:
        """Of what was leased, what is answered."""
        return works

    def _outcome(self, work: Work) -> Outcome:
        return Outcome(work.id, work.kind, work.key, self._value(work), values=[self._value(work)])

    def _value(self, work: Work) -> float:
        if work.kind is WorkKind.LAYER:
            return self.seconds(Layer.from_json(work.payload["layer"]))
        layers = [Layer.from_json(node["layer"]) for node in work.payload["nodes"]]
        return 2e-6 + self.factor(work.payload["purpose"]) * sum(map(self.seconds, layers))


def submit(*constraints: dict[str, Any], **fields: Any) -> str:
    request = {
        "space": "mobilenet_v1", "width": 0.1, "image_size": 8, "dataset": "digits", "effort": "smoke",
        "constraints": list(constraints), "search": {"generations": 3, "population": 6}, **fields,
    }  # fmt: skip
    with transaction() as session:
        dataset = session.scalars(select(Dataset).where(Dataset.name == "digits")).one()
        spec = resolve(JobRequest.model_validate(request), 8)
        return jobs.submit(session, spec, space_key=SPACE.key, dataset_id=dataset.id, created_by=None).id


def take(job_id: str) -> Claim:
    with transaction() as session:
        session.get_one(Job, job_id).run_after = 0.0
        session.get_one(Job, job_id).lease_until = None if session.get_one(Job, job_id).owner is None else 1.0
    with transaction() as session:
        claim = jobs.claim(session, "worker", 30.0, 1000)
    assert claim is not None
    assert claim.job_id == job_id
    return claim


def run(job_id: str, bench: Bench | None = None, console: Console | None = None) -> Job:
    """Do steps until the job ends; whenever it waits, the device answers."""
    context = Context(take(job_id), get_settings(), console or Console())
    for _ in range(200):
        with transaction() as session:
            job = jobs.load(session, context.claim)
        outcome = advance(context, job)
        if outcome.ended:
            return read(job_id)
        if outcome.wait is not None:
            assert bench is not None
            bench.measure()
    raise AssertionError("the job did not end")


def read(job_id: str) -> Job:
    with transaction() as session:
        return jobs.get(session, job_id)


def candidates(job_id: str) -> list[tuple[Any, ...]]:
    with transaction() as session:
        rows = session.scalars(select(Candidate).where(Candidate.job_id == job_id).order_by(Candidate.id)).all()
        names = ("generation", "position", "encoding_key", "flops", "proxy_accuracy", "proxy_loss", "birth", "parents")
        return [tuple(getattr(row, name) for name in names) for row in rows]


def states(job_id: str) -> list[str]:
    with transaction() as session:
        return [e.data["state"] for e in jobs.events_after(session, job_id, 0, 10_000) if e.kind == "state"]


def flops_bound(share: float) -> dict[str, Any]:
    return {"metric": "flops", "max": int(share * FULL)}


def latency_bound(share: float) -> dict[str, Any]:
    full = 2e-6 + sum(map(Bench.seconds, SPACE.layers(SPACE.channels(SPACE.largest))))
    return {"metric": "latency", "device": "bench", "max_ms": share * full * 1000}


class Partial(Bench):
    """Of the networks that a search ends with, it runs the first, in the order asked, slower than others or not at all.

    `checked` has the channels of all of them, in that order.
    """

    def __init__(self, slow: int = 0, failing: int = 0) -> None:
        super().__init__()
        self.slow, self.failing, self.checked = slow, failing, list[list[int]]()
        self.took: list[float] = []

    def _outcome(self, work: Work) -> Outcome:
        if work.kind is not WorkKind.NETWORK or not work.payload["purpose"].startswith("check"):
            return super()._outcome(work)
        self.checked.append([node["layer"]["c_out"] for node in work.payload["nodes"]])
        factor = 1.2 if self.failing < len(self.checked) <= self.failing + self.slow else 1.0
        self.took.append(factor * self._value(work))
        if len(self.checked) <= self.failing:
            return Outcome(work.id, work.kind, work.key, error="out of memory")
        return Outcome(work.id, work.kind, work.key, factor * self._value(work), values=[factor * self._value(work)])

    def held(self, job: Job) -> list[int]:
        """Which of the first round's networks ran and held the budget of `latency_bound(0.5)`."""
        most = latency_bound(0.5)["max_ms"] / 1000 / (1 + job.memory["noise"]["bench"])
        return [at for at, seconds in enumerate(self.took[:8]) if at >= self.failing and seconds <= most]


SHORT = {"generations": 1, "population": 8}


def later(monkeypatch: pytest.MonkeyPatch, *steps: str) -> dict[str, float]:
    """A clock of some steps that goes ahead by what is told."""
    late = {"clock": 0.0}
    for step in steps:
        monkeypatch.setattr(f"workers.steps.{step}.clock", lambda session: clock(session) + late["clock"])
    return late


def forget() -> None:
    """Nothing can be taken over from the jobs before."""
    with transaction() as session:
        session.execute(update(PruningNet).values(family="forgotten", key=new_id()))
        session.execute(update(Result).values(recipe=None))
