"""What a runner keeps between the steps of its job, so that nothing is read or built twice."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from latency_profiler.cost import Constraint, Metric, split_latency
from latency_profiler.errors import DamagedCheckpoint, InvalidDataset
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service import images
from service.methods import UNSTRUCTURED
from service.settings import Settings
from service.specs import JobRequest
from service.store import jobs
from service.store.blobs import blob_path
from service.store.jobs import Claim
from service.store.models import Dataset, Job
from service.store.session import transaction
from workers import checkpoints
from workers.budget import Budget, predict
from workers.datasets import Data, prepare
from workers.parallel import ALONE, Team
from workers.placement import SMALL_IMAGE, choose
from workers.steps.recipe import CODE

T = TypeVar("T")
log = logging.getLogger(__name__)


class Console(Protocol):
    """Where a step says how far it is, and hears that it shall stop."""

    stopping: bool

    def say(self, progress: dict[str, Any] | None = None) -> None:
        """Report progress."""


class Resumable(Protocol):
    """What goes on from a checkpoint; every trainer does."""

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], /) -> None:
        """Go on where another one was when it gave these."""


R = TypeVar("R", bound=Resumable)


@dataclass(frozen=True)
class Facts:
    """A job's dataset row, detached."""

    id: str
    kind: str
    path: str | None
    classes: int


class Context:
    """One job in one runner process; a `guest` only helps, holds no claim of the job and writes nothing of it."""

    def __init__(
        self, claim: Claim, settings: Settings, console: Console, *, guest: bool = False, team: Team = ALONE
    ) -> None:  # fmt: skip
        self.claim, self.settings, self.console, self.team = claim, settings, console, team
        with transaction() as session:
            job = jobs.get(session, claim.job_id) if guest else jobs.load(session, claim)
            dataset = session.get_one(Dataset, job.dataset_id)
        self.spec = JobRequest.model_validate(job.spec)
        self.dataset = Facts(dataset.id, dataset.kind, dataset.path, dataset.classes)
        small = (self.spec.image_size or 0) <= SMALL_IMAGE
        cores = max(1, (os.cpu_count() or 1) // settings.training_processes)
        self.threads = settings.threads or (1 if small else cores)
        torch.set_num_threads(self.threads)
        self.device = choose(settings.device, team.rank, team.size)
        self.kept: dict[str, Any] = {}
        self._begun = job.environment or self.environment
        if self._begun | {"images": None} != self.environment | {"images": None} and job.reproducible and not guest:
            with transaction() as session:
                jobs.note(session, claim, reproducible=False)

    @cached_property
    def space(self) -> Space:
        """The job's space."""
        spec = self.spec
        assert spec.image_size is not None
        return get_space(spec.space, spec.image_size, spec.width, self.dataset.classes, spec.last_layer == "free")

    @cached_property
    def constraints(self) -> list[Constraint]:
        """The job's constraints in the profiler's terms."""
        return [bound.constraint() for bound in self.spec.constraints]

    @cached_property
    def constrained(self) -> list[str]:
        """Names of the latencies that are constrained (`latency_name`)."""
        return [c.latency for c in self.constraints if c.metric is Metric.LATENCY and c.latency]

    @cached_property
    def latencies(self) -> list[str]:
        """Names of the latencies that the winner is measured for: the constrained ones, and every device's median."""
        medians = [split_latency(name)[0] for name in self.constrained] + self.spec.measure_on
        return list(dict.fromkeys(self.constrained + medians))

    @cached_property
    def loaded(self) -> images.Images:
        """The dataset's images, mapped.

        Raises:
            InvalidDataset: they cannot be read, or are not those that the job began with.
        """
        dataset, settings = self.dataset, self.settings
        loaded = images.load(
            dataset.kind, dataset.path, settings.data, self.space.image_size, settings.home / "cache", self.console.say
        )
        if len(loaded.classes) != dataset.classes or self._begun.get("images", loaded.digest) != loaded.digest:
            raise InvalidDataset("the dataset's files have changed; register them under another name, and submit again")
        return loaded

    def pin_images(self) -> None:
        """Note which images the job has seen: it ends when they are others (`loaded`)."""
        if "images" not in self._begun:
            pinned = {**self._begun, "images": self.loaded.digest}
            with transaction() as session:
                jobs.note(session, self.claim, environment=pinned)
            self._begun = pinned

    @property
    def flips(self) -> bool:
        """Whether a mirrored image means the same."""
        return self.dataset.kind != "digits"

    @property
    def seen(self) -> tuple[str, bool]:
        """What decides which images a training sees: their digest, and whether they may be mirrored."""
        return self.loaded.digest, self.flips

    @cached_property
    def data(self) -> Data:
        """The dataset, split for the search."""
        loaded = self.loaded
        assert self.spec.training.validation_images is not None
        return prepare(
            (loaded.train_x, loaded.train_y), (loaded.test_x, loaded.test_y), len(loaded.classes),
            flip=self.flips, validation=self.spec.training.validation_images, seed=self.spec.seed,
            device=self.device, told=self.console.say,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, Any]:
        """What a result can be reproduced with."""
        on_cpu = self.device.type == "cpu"
        kernels = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(self.device)
        processes = self.settings.training_processes
        return {
            "torch": torch.__version__, "threads": self.threads, "kernels": kernels, "processes": processes,
            "code": CODE,
        }  # fmt: skip

    def budget(self, job: Job) -> Budget:
        """The constraints, less their safety margins, with the tables and corrections that the job holds now."""
        return self.budget_of(job.memory)

    def budget_of(self, memory: Mapping[str, Any]) -> Budget:
        """The budget of a job that has this memory.

        Raises:
            InfeasibleConstraint: no structure satisfies it.
        """
        return self._kept_budget("budget", memory, memory["margins"])

    def search_budget(self, memory: Mapping[str, Any]) -> Budget:
        """The same for the evolution, whose best are measured before one of them is the winner.

        Where prices are corrected, half of all networks take no longer than predicted: it keeps free only what the next
        measurement may differ by.

        Raises:
            InfeasibleConstraint: no structure satisfies it.
        """
        return self._kept_budget("search budget", memory, search_margins(memory))

    def _kept_budget(self, name: str, memory: Mapping[str, Any], margins: dict[str, float]) -> Budget:
        held = [memory["tables"], memory["corrections"], margins]
        return self.keep(name, held, lambda: self._budget(*held))

    def predict(self, job: Job, channels: Sequence[int]) -> dict[str, float]:
        """Corrected seconds of a network; nothing where a job only masks weights, which its tables say nothing of."""
        if UNSTRUCTURED.issuperset(self.spec.methods):
            return {}
        return predict(self.space, self._tables(job.memory["tables"]), job.memory["corrections"], channels)

    def _tables(self, tables: dict[str, str]) -> dict[str, LatencyTable]:
        """The pinned tables, which both budgets and predictions are from."""
        return self.keep("tables", tables, lambda: {name: load_table(sha256) for name, sha256 in tables.items()})

    def _budget(self, tables: dict[str, str], corrections: dict[str, float], margins: dict[str, float]) -> Budget:
        bounds, search = tightened(self.constraints, margins), self.spec.search
        return Budget(
            self.space,
            bounds,
            self._tables(tables),
            corrections,
            search.least_budget_share or 0.0,
            fills=bool(search.repair),
        )

    def keep(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """A thing that was made for the same key, or a new one."""
        wanted = json.dumps(key)
        if name not in self.kept or self.kept[name][0] != wanted:
            self.kept.pop(name, None)
            self.kept[name] = (wanted, make())
        made: T = self.kept[name][1]
        return made

    def restored(self, make: Callable[[], R], sha256: str, counters: dict[str, Any]) -> R:
        """A trainer that goes on from a checkpoint.

        One that begins anew, which ends the same, if the file is damaged, or of another version that kept other things.
        """
        trainer = make()
        try:
            trainer.restore(checkpoints.load(blob_path(sha256), sha256), counters)
        except (DamagedCheckpoint, KeyError, ValueError, RuntimeError) as error:
            log.warning("job %s trains from the beginning: %s", self.claim.job_id, error)
            return make()
        return trainer

    def rename(self, name: str, key: Any) -> None:
        """The kept thing has moved on: it is now what this key would make."""
        self.kept[name] = (json.dumps(key), self.kept[name][1])

    def forget(self, name: str) -> None:
        """Free a kept thing."""
        self.kept.pop(name, None)

    def pause(self, seconds: float, progress: Callable[[], dict[str, Any]]) -> Callable[[], bool]:
        """For a trainer: reports progress, and says when it shall pause for a checkpoint."""
        deadline = time.monotonic() + seconds

        def pause() -> bool:
            self.console.say(progress())
            return self.console.stopping or time.monotonic() > deadline

        return pause


def search_margins(memory: Mapping[str, Any]) -> dict[str, float]:
    """Latency → share that the evolution keeps free (`Context.search_budget`)."""
    noise = {name: memory.get("noise", {}).get(name, 0.0) for name in memory["corrections"]}
    return {**memory["margins"], **noise}


def tightened(constraints: Sequence[Constraint], margins: Mapping[str, float]) -> list[Constraint]:
    """Latency bounds less the margin that their table asks for."""
    return [
        replace(bound, maximum=bound.maximum / (1.0 + margins.get(bound.latency or "", 0.0)))
        if bound.metric is Metric.LATENCY
        else bound
        for bound in constraints
    ]


def load_table(sha256: str) -> LatencyTable:
    """A lookup table as a job has pinned it."""
    return LatencyTable.from_json(json.loads(blob_path(sha256).read_bytes()))
