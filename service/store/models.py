"""All tables.

Times are seconds since 1970 by the database's clock (`now()`), so that a machine with a wrong clock breaks no lease.
Ids are random hex strings unless a row has a natural key.
"""

import uuid
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    select,
    text,
)  # fmt: skip
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.sql.functions import FunctionElement

from latency_profiler.cost import Statistic

BigId = BigInteger().with_variant(Integer, "sqlite")
"""A counting primary key: SQLite counts only `INTEGER` ones."""


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function that it is
    """Seconds since 1970 at this moment by the database's clock (not at the transaction's start)."""

    type = Double()
    inherit_cache = True


def clock(session: Session) -> float:
    """`now` as it is read once."""
    return session.scalars(select(now())).one()


@compiles(now, "postgresql")
def _now_postgresql(_element: object, _compiler: object, **_: object) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(now, "sqlite")
def _now_sqlite(_element: object, _compiler: object, **_: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


def new_id() -> str:
    """A random id."""
    return uuid.uuid4().hex


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    """Accepted; no worker has begun."""
    PROFILING = "profiling"
    """Waits for the lookup table of a device."""
    TRAINING = "training"
    """Its PruningNet is trained (or another job trains it)."""
    SEARCHING = "searching"
    """Generations of candidates are judged."""
    RETRAINING = "retraining"
    """Winner and baselines are trained from scratch."""
    VERIFYING = "verifying"
    """Devices measure the winner as a whole network."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNVERIFIED = "unverified"
    """Everything is stored, but a device did not measure the winner in time."""


TERMINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.UNVERIFIED)


class WorkState(StrEnum):
    """Where a piece of measuring work is."""

    WAITING = "waiting"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"


class WorkKind(StrEnum):
    """What is measured."""

    LAYER = "layer"
    NETWORK = "network"
    CANARY = "canary"
    """A layer of the table once more, to see whether the device is still what it was."""


class Role(StrEnum):
    """Why a structure was trained from scratch."""

    WINNER = "winner"
    UNIFORM = "uniform"
    FIDELITY = "fidelity"
    """A random structure of the budget, to see whether the PruningNet ranks structures as training does."""
    FINALIST = "finalist"
    """One of a search's best, before short trainings have chosen the winner among them; it leaves no result."""
    DENSE = "dense"
    """The network that a pruning method began with, before anything was pruned."""


def _enum(kind: type[StrEnum]) -> Enum:
    return Enum(kind, native_enum=False, length=16, values_callable=lambda members: [m.value for m in members])


class Base(DeclarativeBase):
    """Naming convention for every constraint, so that migrations can drop them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        **dict.fromkeys((dict[str, Any], dict[str, float], list[Any], list[int], list[float], list[str]), JSON),
        float: Double, int: BigInteger,
    }  # fmt: skip


class ApiKey(Base):
    """A user's key; the secret itself is not stored."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(100))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[Any]]
    created_at: Mapped[float] = mapped_column(default=now())
    revoked_at: Mapped[float | None]


class Device(Base):
    """One machine + runtime + settings that answers measurements; its token is stored hashed."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    description: Mapped[str] = mapped_column(Text, default="")
    token_prefix: Mapped[str] = mapped_column(String(16), unique=True)
    token_digest: Mapped[str] = mapped_column(String(64))
    table_id: Mapped[str | None] = mapped_column(String(32))
    """The table of the fingerprint that the agent presented last (no foreign key: tables refer to devices)."""
    created_at: Mapped[float] = mapped_column(default=now())
    beat_at: Mapped[float | None]
    connection: Mapped[str | None] = mapped_column(String(64))
    """The agents' processes that were heard first lately, the newest last (`canaries`)."""


class Host(Base):
    """A machine that measures: one device at a time does."""

    __tablename__ = "hosts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """As its agents call it (`latency_profiler.device.host`)."""
    device_id: Mapped[str | None] = mapped_column(ForeignKey("devices.id", ondelete="SET NULL"))
    """Who measures, until `lease_until`."""
    lease_until: Mapped[float] = mapped_column(default=0.0)
    wanted_by: Mapped[str | None] = mapped_column(String(32))
    """The device that was sent away, whose turn it is next if it still asks before `wanted_until`."""
    wanted_until: Mapped[float] = mapped_column(default=0.0)


class Fingerprint(Base):
    """What a device's agent runs on; measurements under different fingerprints never mix."""

    __tablename__ = "fingerprints"
    __table_args__ = (UniqueConstraint("device_id", "sha256"),)
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"))
    sha256: Mapped[str] = mapped_column(String(64))
    facts: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=now())


class LookupTable(Base):
    """The measurements of one device under one fingerprint; measuring anew makes the next version."""

    __tablename__ = "lookup_tables"
    __table_args__ = (
        UniqueConstraint("id", "fingerprint_id"),
        UniqueConstraint("device_id", "fingerprint_id", "version"),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"))
    fingerprint_id: Mapped[str] = mapped_column(ForeignKey("fingerprints.id", ondelete="CASCADE"))
    version: Mapped[int] = mapped_column(default=1)
    checks: Mapped[int] = mapped_column(default=0)
    """How often its canaries were measured again, or are to be."""
    checked_at: Mapped[float | None]
    """When the last such check ended."""
    drift: Mapped[float | None]
    """By what share the canaries took longer then."""
    stale: Mapped[str | None] = mapped_column(Text)
    """Why its numbers no longer hold."""
    created_at: Mapped[float] = mapped_column(default=now())


class TableFit(Base):
    """How the sum of layers becomes a network's latency in one space (`latency_profiler.lookup_table.Fit`)."""

    __tablename__ = "table_fits"
    table_id: Mapped[str] = mapped_column(ForeignKey("lookup_tables.id", ondelete="CASCADE"), primary_key=True)
    space_key: Mapped[str] = mapped_column(String(100), primary_key=True)
    statistic: Mapped[Statistic] = mapped_column(_enum(Statistic), primary_key=True, default=Statistic.P50)
    """What is fitted: the networks' medians, or another percentile of their runs."""
    overhead: Mapped[float]
    slope: Mapped[float]
    fitted_on: Mapped[int]
    held_out: Mapped[int]
    mean_error: Mapped[float]
    max_error: Mapped[float]
    within_5: Mapped[float | None]
    within_10: Mapped[float | None]
    spearman: Mapped[float | None]
    bias: Mapped[float | None]
    noise_floor: Mapped[float | None]
    terms: Mapped[dict[str, float]] = mapped_column(default=dict)
    """Weights of the terms by name."""
    created_at: Mapped[float] = mapped_column(default=now())


class Profile(Base):
    """A user's wish: measure what a space needs on this device. Its work is planned for each table that comes up."""

    __tablename__ = "profiles"
    __table_args__ = (UniqueConstraint("device_id", "space_key", "mode", "points"),)
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"))
    space_key: Mapped[str] = mapped_column(String(100))
    space: Mapped[dict[str, Any]]
    """Arguments of `get_space`."""
    mode: Mapped[str] = mapped_column(String(16))
    """`full` (every choice) or `sampled` (`points` widths per slot, the rest interpolated)."""
    points: Mapped[int]
    refined: Mapped[list[str] | None]
    """Keys of the layers that were planned since, for all tables: widths between measured ones were priced badly. None
    where the grid stays as it is."""
    planned_table_id: Mapped[str | None] = mapped_column(String(32))
    """The table whose work rows exist; another one means that the fingerprint changed."""
    created_at: Mapped[float] = mapped_column(default=now())


class Work(Base):
    """One layer or network that an agent shall measure for one table."""

    __tablename__ = "work"
    __table_args__ = (
        UniqueConstraint("table_id", "kind", "key"),
        CheckConstraint("state <> 'leased' OR (lease_id IS NOT NULL AND lease_until IS NOT NULL)", name="leased"),
        Index(None, "table_id", "state", "priority"),
    )
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    table_id: Mapped[str] = mapped_column(ForeignKey("lookup_tables.id", ondelete="CASCADE"))
    kind: Mapped[WorkKind] = mapped_column(_enum(WorkKind))
    key: Mapped[str] = mapped_column(String(200))
    """A layer's key, or `<space key>|<structure digest>|<purpose>` of a network."""
    payload: Mapped[dict[str, Any]]
    """`{"layer": …}`, or `{"nodes": […], "space_key", "channels", "purpose"}`; what the agent is sent."""
    priority: Mapped[int] = mapped_column(default=0)
    """Smaller is sooner."""
    state: Mapped[WorkState] = mapped_column(_enum(WorkState), default=WorkState.WAITING)
    lease_id: Mapped[str | None] = mapped_column(String(32))
    lease_until: Mapped[float | None]
    attempts: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None] = mapped_column(Text)


def _structure_of(context: Any) -> str | None:
    """The structure of a measured network, by its key."""
    row = context.get_current_parameters()
    return row["key"].split("|")[1][:32] if row["kind"] == WorkKind.NETWORK and "|" in row["key"] else None


class Measurement(Base):
    """Raw seconds of one layer or network, with their conditions. The first one of a key stands."""

    __tablename__ = "measurements"
    __table_args__ = (
        UniqueConstraint("table_id", "kind", "key"),
        Index("ix_measurements_structure", "table_id", "structure_id", "seconds", "p90"),
        Index("ix_measurements_seconds", "table_id", "seconds", "structure_id"),
        ForeignKeyConstraint(
            ["table_id", "fingerprint_id"], ["lookup_tables.id", "lookup_tables.fingerprint_id"], ondelete="CASCADE"
        ),
    )
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    table_id: Mapped[str] = mapped_column(String(32))
    fingerprint_id: Mapped[str] = mapped_column(String(32))
    kind: Mapped[WorkKind] = mapped_column(_enum(WorkKind))
    key: Mapped[str] = mapped_column(String(200))
    structure_id: Mapped[str | None] = mapped_column(String(32), default=_structure_of)
    """Of a network."""
    payload: Mapped[dict[str, Any]]
    """The work's payload."""
    seconds: Mapped[float]
    """The median of `values` at the machine's usual speed, less the runtime's empty run for a layer."""
    p90: Mapped[float | None]
    """The 90th percentile of single runs (of `values`, where runs were not timed one by one), less the same."""
    iqr: Mapped[float]
    steady: Mapped[bool] = mapped_column(Boolean)
    values: Mapped[list[float]]
    conditions: Mapped[dict[str, Any]]
    """Loops, single runs, warm-up, empty run, the machine's speed, load, frequency, time, versions of agent and
    runtime, source (`measured` or `imported`)."""
    upload_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(default=now())


class Upload(Base):
    """A batch that an agent handed in: the same id again is answered from here."""

    __tablename__ = "uploads"
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    upload_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    body_sha: Mapped[str] = mapped_column(String(64))
    response: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=now())


class Dataset(Base):
    """Images that structures can be trained on."""

    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    """`digits`, `folder`, `archive` or `npz`."""
    path: Mapped[str | None] = mapped_column(Text)
    """Below the data root; None for built-in data."""
    classes: Mapped[int]
    image_size: Mapped[int]
    """Side of its images as they are used, in pixels."""
    train_images: Mapped[int]
    test_images: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=now())


class Blob(Base):
    """A file in the blob folder, by its content."""

    __tablename__ = "blobs"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=now())


class PruningNet(Base):
    """A trained (or half-trained) PruningNet; jobs with the same key share it."""

    __tablename__ = "pruning_nets"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of space, dataset, training settings, seed and band."""
    family: Mapped[str] = mapped_column(String(64), index=True)
    """The same without the band: a job takes any ready net of its family whose band holds its budget."""
    space_key: Mapped[str] = mapped_column(String(100))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    settings: Mapped[dict[str, Any]]
    band_low: Mapped[float]
    band_high: Mapped[float]
    """FLOPs between which structures were sampled in training."""
    ready: Mapped[bool] = mapped_column(Boolean, default=False)
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Counters of the checkpoint, and the training history."""
    checkpoint: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"))
    trainer_job_id: Mapped[str | None] = mapped_column(String(32))
    """The job that trains it now; others wait for it."""
    fidelity: Mapped[list[Any]] = mapped_column(default=list)
    """How well it ranks structures, as the last job that asked has found (`workers.steps.fidelity`)."""
    created_at: Mapped[float] = mapped_column(default=now())


class Job(Base):
    """What a user asked for, and where it stands."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("owner IS NULL OR lease_until IS NOT NULL", name="lease"),
        Index("ix_jobs_claim", "run_after", postgresql_where=text(f"state NOT IN {tuple(map(str, TERMINAL))}")),
        Index("ix_jobs_list", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    spec: Mapped[dict[str, Any]]
    """The request with every default filled in (`service.specs.JobRequest`)."""
    space_key: Mapped[str] = mapped_column(String(100))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    seed: Mapped[int]
    state: Mapped[JobState] = mapped_column(_enum(JobState), default=JobState.QUEUED)
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """What a progress bar shows: `{"phase", "done", "total", …}`."""
    memory: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """What the next step needs to know: counters, rounds, corrections, digests of checkpoints, seconds per phase."""
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    cancel_requested_at: Mapped[float | None]
    owner: Mapped[str | None] = mapped_column(String(100))
    fence: Mapped[int] = mapped_column(default=0)
    """Grows with every claim; a worker's writes carry the fence of its claim."""
    lease_until: Mapped[float | None]
    run_after: Mapped[float] = mapped_column(default=0.0)
    """Not claimed before this time; set to now by whatever the job waits for."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Claims since the last finished step."""
    steps: Mapped[int] = mapped_column(default=0)
    environment: Mapped[dict[str, Any] | None]
    """Torch version, threads and CPU of the first claim; another one later makes the job not reproducible."""
    reproducible: Mapped[bool] = mapped_column(Boolean, default=True)
    created_at: Mapped[float] = mapped_column(default=now())
    updated_at: Mapped[float] = mapped_column(default=now())
    finished_at: Mapped[float | None]


class JobEvent(Base):
    """What happened in a job, in order: the source of server-sent events."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "id"),)
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(16))
    """`state`, `progress`, `sounding`, `generation`, `finalist`, `judged` or `warning`."""
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=now())


class Structure(Base):
    """Space + channels, whoever found it; candidates and results point here."""

    __tablename__ = "structures"
    __table_args__ = (Index(None, "space_key", "id"),)
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """`Space.digest(channels)`."""
    space_key: Mapped[str] = mapped_column(String(100))
    space: Mapped[dict[str, Any]]
    channels: Mapped[list[int]]
    flops: Mapped[int]
    parameters: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=now())


class StructureLatency(Base):
    """Predicted seconds of a structure on a device."""

    __tablename__ = "structure_latencies"
    structure_id: Mapped[str] = mapped_column(ForeignKey("structures.id", ondelete="CASCADE"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    prices: Mapped[str | None] = mapped_column(String(32))
    """Digest of the prices (`LatencyModel.digest`); None is a job's prediction that no table was asked about yet."""
    seconds: Mapped[float]
    """The median run's."""
    p90: Mapped[float | None]
    """None where the table does not tell it."""


class Pricing(Base):
    """How far the structures of a space are priced on a device with its current table."""

    __tablename__ = "pricings"
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    space_key: Mapped[str] = mapped_column(String(100), primary_key=True)
    source: Mapped[str] = mapped_column(String(200))
    """Table, its size and its fit when they were looked at."""
    prices: Mapped[str | None] = mapped_column(String(32))
    """Digest of the prices; None where the table lacks layers of the space."""
    structures: Mapped[int]
    """How many are done."""


class Skyband(Base):
    """What answers "best under one bound" without reading every candidate (`service.store.skybands`)."""

    __tablename__ = "skybands"
    space_key: Mapped[str] = mapped_column(String(100), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    cost: Mapped[str] = mapped_column(String(40), primary_key=True)
    """`flops`, `parameters`, or a latency: its name, with the device's id for the device."""
    prices: Mapped[str | None] = mapped_column(String(32))
    """Digest of the prices that the members' latencies are from."""
    upto: Mapped[int]
    """The last candidate that was looked at."""
    members: Mapped[bytes]
    """An array of `skybands.MEMBER`, the best first."""


class Candidate(Base):
    """A structure judged during one job's search."""

    __tablename__ = "candidates"
    __table_args__ = (
        UniqueConstraint("job_id", "generation", "position"),
        UniqueConstraint("job_id", "encoding_key"),
        # Covers the walk from the best accuracy down that answers "best under a budget" and the Pareto fronts.
        Index(
            "ix_candidates_best",
            "space_key",
            "dataset_id",
            "proxy_accuracy",
            "flops",
            "parameters",
            "structure_id",
            "id",
        ),
        Index(None, "space_key", "dataset_id", "flops"),
        Index(None, "space_key", "dataset_id", "id"),  # what came after a skyband was made
        Index(None, "structure_id"),
    )
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    structure_id: Mapped[str] = mapped_column(ForeignKey("structures.id"))
    space_key: Mapped[str] = mapped_column(String(100))
    """For what pruning methods judge, `<key>/<method>`: their accuracies are no proxies, and not ranked with them."""
    dataset_id: Mapped[str] = mapped_column(String(32))
    generation: Mapped[int]
    position: Mapped[int]
    encoding: Mapped[list[int]]
    encoding_key: Mapped[str] = mapped_column(String(200))
    """The genes joined by commas."""
    flops: Mapped[int]
    parameters: Mapped[int]
    latencies: Mapped[dict[str, Any]]
    """Name of a latency (`cost.latency_name`) → predicted seconds under the job's table and correction."""
    proxy_accuracy: Mapped[float]
    proxy_loss: Mapped[float]
    birth: Mapped[str] = mapped_column(String(16))
    """`random`, `mutation`, `crossover` or `enumeration`; `pruning` for what a pruning method judged on its way."""
    parents: Mapped[list[Any]]
    """Encoding keys of its parents."""
    pruned: Mapped[dict[str, Any] | None]
    """Of pruning methods: which method, what is kept of what, and a note; null for structures of a search."""


class Chunk(Base):
    """A part of a generation that one worker scores at a time; gone when its generation is told or its job ends."""

    __tablename__ = "chunks"
    __table_args__ = (
        UniqueConstraint("job_id", "batch", "position"),
        CheckConstraint("owner IS NULL OR lease_until IS NOT NULL", name="lease"),
    )
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    batch: Mapped[str] = mapped_column(String(64))
    """Digest of all that the scores of its generation depend on: encodings, PruningNet, environment."""
    position: Mapped[int]
    environment: Mapped[str] = mapped_column(Text)
    """What the scores are reproducible with, as canonical JSON; a worker with another one leaves the chunk alone."""
    encodings: Mapped[list[Any]]
    scores: Mapped[list[Any] | None]
    """[accuracy, loss] of each encoding, once it is done."""
    owner: Mapped[str | None] = mapped_column(String(100))
    fence: Mapped[int] = mapped_column(default=0)
    """Grows with every claim; scores are taken from the last one only."""
    lease_until: Mapped[float | None]


class Result(Base):
    """A structure that a job trained from scratch, and what came out."""

    __tablename__ = "results"
    __table_args__ = (UniqueConstraint("job_id", "method", "structure_id", "role"),)
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    structure_id: Mapped[str] = mapped_column(ForeignKey("structures.id"), index=True)
    dataset_id: Mapped[str] = mapped_column(String(32))
    role: Mapped[Role] = mapped_column(_enum(Role))
    method: Mapped[str] = mapped_column(String(16), default="metapruning")
    """What found it; baselines belong to the job's first method."""
    rank: Mapped[int] = mapped_column(default=0)
    """0 is the winner; further ones are runners-up that `retraining.top` asked for."""
    proxy_accuracy: Mapped[float | None]
    test_accuracy: Mapped[float]
    test_loss: Mapped[float]
    settings: Mapped[dict[str, Any]]
    predicted: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Name of a latency → predicted seconds."""
    measured: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Name of a latency → measured seconds of the whole network."""
    weights: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"))
    """`weights.safetensors`."""
    model: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"))
    """`model.onnx`."""
    masks: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"))
    """`masks.safetensors`, of methods that prune single weights."""
    pruned: Mapped[dict[str, Any] | None]
    """Of pruning methods: what is kept of what, and what the method says of its outcome."""
    recipe: Mapped[str | None] = mapped_column(String(64), index=True)
    """Digest of all that determines the outcome; None where the job changed machines, so that nobody takes it over."""
    reused: Mapped[bool] = mapped_column(Boolean, default=False)
    """Taken over from an earlier training by the same recipe."""
    created_at: Mapped[float] = mapped_column(default=now())


class Idempotency(Base):
    """An answered request; the same key again is answered from here."""

    __tablename__ = "idempotency"
    caller: Mapped[str] = mapped_column(String(32), primary_key=True)
    route: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_sha: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    response: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=now())
