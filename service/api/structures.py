"""What was found, across all jobs: the best under a budget, fronts, and files to take away."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from latency_profiler.cost import Statistic, latency_name
from latency_profiler.errors import InvalidChannels, InvalidInput, NotFound
from latency_profiler.spaces.registry import SPACES, get_space
from latency_profiler.spaces.space import Space, width_text
from service.api.auth import require
from service.api.jobs import SpaceKey
from service.api.problems import responses
from service.choices import Method
from service.fields import ID, Name
from service.store import datasets, structures
from service.store.blobs import blob_path
from service.store.models import Candidate, Result, Role, Structure
from service.store.results import METAPRUNING, milliseconds
from service.store.session import snapshot
from service.store.structures import Budget

router = APIRouter(prefix="/structures", tags=["structures"], dependencies=[Depends(require("read"))])
StructureId = Annotated[str, Path(max_length=64, pattern=r"^[0-9a-z]+$")]
Count = Annotated[int | None, Query(ge=0, lt=2**63)]
Bound = Annotated[float, Field(gt=0, le=1e6)]
ImageSize = Annotated[int | None, Query(ge=8, le=512)]
Width = Annotated[float | None, Query(ge=0.05, le=4)]
Dataset = Annotated[Name, Query()]
Artifact = Literal["structure.json", "weights.safetensors", "masks.safetensors", "model.onnx"]
MEDIA_TYPES = {
    "structure.json": "application/json",
    "weights.safetensors": "application/octet-stream",
    "masks.safetensors": "application/octet-stream",
    "model.onnx": "application/octet-stream",
}


class StructureFacts(BaseModel):
    """A structure: a space with channel numbers. `encoding` is null where they are no choices of the space."""

    structure_id: str
    space: str
    space_key: str
    image_size: int
    width: float
    classes: int
    channels: list[int]
    encoding: list[int] | None
    flops: int
    parameters: int
    predicted_ms: dict[str, float]
    """Device → milliseconds of the median run that its lookup table predicts; `DEVICE:p90` where it tells that, too."""


class FoundStructure(StructureFacts):
    """Where it was found, and what came out where it was trained from scratch; else these fields are null."""

    job_id: str
    generation: int | None
    role: Role | None
    method: Method
    proxy_accuracy: float | None
    test_accuracy: float | None
    measured_ms: dict[str, float]
    """By the job that trained it, and for a bound that was asked for now as the device's current table has it."""
    pruned: dict[str, Any] | None
    """Of a method that prunes single weights: `kept` of them and `sparse_flops`, which dense runtimes do not gain from:
    `flops` and `measured_ms` are those of the dense tensors."""


class FoundList(BaseModel):
    """The best structures, the best first."""

    items: list[FoundStructure]
    next: None = None


class Front(BaseModel):
    """No structure that was found is both cheaper and more accurate than one of these; the cheapest first."""

    metric: str
    device: str | None
    items: list[FoundStructure]


class Sighting(BaseModel):
    """A search that has judged the structure."""

    job_id: str
    dataset: str
    generation: int
    proxy_accuracy: float


class Trained(BaseModel):
    """A training from scratch of the structure; `artifacts` are the files that it left."""

    job_id: str
    role: Role
    method: Method
    pruned: dict[str, Any] | None
    proxy_accuracy: float | None
    test_accuracy: float
    test_loss: float
    predicted_ms: dict[str, float]
    measured_ms: dict[str, float]
    reused: bool
    """Taken over from an earlier training of exactly the same."""
    artifacts: list[str]


class StructureRead(StructureFacts):
    """One structure with all that is known of it."""

    sightings: list[Sighting]
    results: list[Trained]
    artifacts: dict[str, str]
    """Name → address."""


@router.get("/best", responses=responses(404))
def best(
    space: SpaceKey,
    dataset: Dataset,
    max_flops: Count = None,
    max_parameters: Count = None,
    max_sparse_flops: Count = None,
    max_kept: Count = None,
    method: Annotated[list[Method] | None, Query(max_length=4)] = None,
    device: Annotated[list[Name] | None, Query(max_length=8)] = None,
    max_latency_ms: Annotated[list[Bound] | None, Query(max_length=8)] = None,
    statistic: Statistic = Statistic.P50,
    image_size: ImageSize = None,
    width: Width = None,
    accuracy: Literal["proxy", "test"] = "proxy",
    limit: Annotated[int, Query(ge=1, le=200)] = 10,
) -> FoundList:
    """The most accurate structures within all bounds; each `device` has its `max_latency_ms` at the same place.

    Latencies are those of the median run, or with `statistic` of nine of ten runs: measured ones of a network that the
    device's current table has as a whole (the last one, where there are several), else predicted ones.

    `proxy` ranks every candidate by its accuracy with PruningNet's weights. `test` ranks what was trained, of each
    structure the best of each method, side by side; only there can `method`, `max_sparse_flops` and `max_kept` (weights
    that are not zero; dense networks keep all) be asked for.
    """
    only_tested = (max_sparse_flops, max_kept, method) != (None, None, None)
    if only_tested and accuracy != "test":
        raise InvalidInput("method, max_sparse_flops and max_kept are about trained networks: ask with accuracy=test")
    bounds = _pairs(device or [], max_latency_ms or [])
    with snapshot() as session:
        dataset_id = datasets.get(session, dataset).id
        ids = structures.device_ids(session, list(bounds))
        latencies = {latency_name(ids[name], statistic): ms / 1000 for name, ms in bounds.items()}
        budget = Budget(max_flops, max_parameters, latencies)
        keys = _keys(structures.searched_spaces(session, dataset_id), space, image_size, width)
        if accuracy == "test":
            sparse = structures.Sparse(max_sparse_flops, max_kept)
            tested = structures.best_results(session, keys, dataset_id, budget, limit, sparse, method)
            items = _show_tested(session, tested)
        else:
            hits = structures.best_candidates(session, keys, dataset_id, budget, limit)
            found = {hit.structure_id: hit.found for hit in hits}
            items = _show(session, list(found), found, dataset_id)
        measured = structures.measured(session, [item.structure_id for item in items], latencies)
    shown = {latency_name(id_, statistic): latency_name(name, statistic) for name, id_ in ids.items()}
    for item in items:
        seconds = measured.get(item.structure_id, {})
        item.measured_ms |= milliseconds({shown[latency]: took for latency, took in seconds.items()})
    return FoundList(items=items)


@router.get("/pareto", responses=responses(404))
def pareto(
    space: SpaceKey,
    dataset: Dataset,
    metric: Literal["flops", "parameters"] | None = None,
    device: Annotated[Name | None, Query()] = None,
    statistic: Statistic = Statistic.P50,
    image_size: ImageSize = None,
    width: Width = None,
) -> Front:
    """The front of proxy accuracy against FLOPs, parameters, or predicted latency on a device (its `statistic`)."""
    if metric is not None and device is not None:
        raise InvalidInput("give either a metric (flops or parameters) or a device, not both")
    with snapshot() as session:
        dataset_id = datasets.get(session, dataset).id
        ids = structures.device_ids(session, [device] if device else [])
        keys = _keys(structures.searched_spaces(session, dataset_id), space, image_size, width)
        cost = latency_name(ids[device], statistic) if device else metric or "flops"
        points = structures.front(session, keys, dataset_id, cost)
        found = {point.structure_id: point.found for point in points}
        shown = "latency" if device else cost
        return Front(metric=shown, device=device, items=_show(session, list(found), found, dataset_id))


@router.get("/{structure}", responses=responses(404))
def read_structure(structure: StructureId) -> StructureRead:
    """One structure."""
    with snapshot() as session:
        row = structures.get(session, structure)
        latencies = structures.latencies(session, [row.id])[row.id]
        sightings = structures.sightings(session, row.id)
        results = structures.results(session, [row.id])[row.id]
    names = ["structure.json", *dict.fromkeys(name for result in results for name in _files(result))]
    return StructureRead(
        **_facts(row, latencies),
        sightings=[
            Sighting(job_id=one.job_id, dataset=name, generation=one.generation, proxy_accuracy=one.proxy_accuracy)
            for one, name in sightings
        ],
        results=[_trained(result) for result in results],
        artifacts={name: f"/v1/structures/{row.id}/artifacts/{name}" for name in names},
    )


@router.get("/{structure}/artifacts/{artifact}", response_class=Response, responses=responses(404))
def read_artifact(
    structure: StructureId,
    artifact: Artifact,
    job: Annotated[str | None, Query(max_length=64, pattern=ID)] = None,
    method: Method | None = None,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> Response:
    """A file of a structure: of the named job and method, else of the training with the best test accuracy."""
    with snapshot() as session:
        row = structures.get(session, structure)
        results = structures.results(session, [row.id])[row.id]
    headers = {"Content-Disposition": f'attachment; filename="{structure}-{artifact}"'}
    if artifact == "structure.json":
        return Response(json.dumps(_facts(row, {}), indent=1), media_type=MEDIA_TYPES[artifact], headers=headers)
    chosen = (one for one in results if job in (None, one.job_id) and method in (None, one.method))
    files = (_files(result).get(artifact) for result in chosen)
    digest = next(filter(None, files), None)
    if digest is None or not blob_path(digest).is_file():
        raise NotFound("artifact", artifact)
    headers["ETag"] = f'"{digest}"'
    if headers["ETag"] in (if_none_match or ""):
        return Response(status_code=304, headers=headers)
    return FileResponse(blob_path(digest), media_type=MEDIA_TYPES[artifact], headers=headers)


def _pairs(devices: Sequence[str], bounds: Sequence[float]) -> dict[str, float]:
    if len(devices) != len(bounds) or len(set(devices)) != len(devices):
        raise InvalidInput("give one max_latency_ms for each device: device=NAME&max_latency_ms=0.8")
    return dict(zip(devices, bounds, strict=True))


def _keys(searched: Sequence[str], space: str, image_size: int | None, width: float | None) -> list[str]:
    """The searched spaces that a name (or a whole key) and the filters mean."""
    if "@" not in space and space not in SPACES:
        raise NotFound("space", space, sorted(SPACES))
    keys = [key for key in searched if space in (key, key.partition("@")[0])]
    size = None if image_size is None else f"@{image_size}x"
    scale = None if width is None else f"x{width_text(width)}/"
    return [key for key in keys if (size is None or size in key) and (scale is None or scale in key)]


def _show(session: Any, ids: Sequence[str], found: dict[str, int], dataset_id: str) -> list[FoundStructure]:
    """Structures with what is known of them on one dataset; `found` says as which candidate each was found."""
    rows = structures.by_id(session, ids)
    latencies = structures.latencies(session, ids)
    candidates = structures.candidates(session, list(found.values()))
    results = structures.results(session, ids, dataset_id)
    return [_found(rows[i], latencies[i], candidates.get(found.get(i, -1)), results[i]) for i in ids]


def _show_tested(session: Any, tested: Sequence[Result]) -> list[FoundStructure]:
    ids = [result.structure_id for result in tested]
    rows, latencies = structures.by_id(session, ids), structures.latencies(session, ids)
    return [_found(rows[one.structure_id], latencies[one.structure_id], None, [one]) for one in tested]


def _found(
    row: Structure, latencies: dict[str, float], candidate: Candidate | None, results: Sequence[Result]
) -> FoundStructure:
    tested = results[0] if results else None
    source = candidate or tested
    assert source is not None
    return FoundStructure(
        **_facts(row, latencies),
        job_id=source.job_id,
        generation=candidate.generation if candidate else None,
        role=tested.role if tested else None,
        method=cast(Method, tested.method if tested else METAPRUNING),
        pruned=tested.pruned if tested else None,
        proxy_accuracy=source.proxy_accuracy,
        test_accuracy=tested.test_accuracy if tested else None,
        measured_ms=milliseconds(tested.measured) if tested else {},
    )


def _facts(row: Structure, latencies: dict[str, float]) -> dict[str, Any]:
    space = get_space(**row.space)
    return {
        "structure_id": row.id, "space": space.name, "space_key": row.space_key, "image_size": space.image_size,
        "width": space.width, "classes": space.classes, "channels": row.channels,
        "encoding": _encoding(space, row.channels), "flops": row.flops, "parameters": row.parameters,
        "predicted_ms": milliseconds(latencies),
    }  # fmt: skip


def _encoding(space: Space, channels: Sequence[int]) -> list[int] | None:
    try:
        return list(space.encoding(channels))
    except InvalidChannels:
        return None


def _trained(result: Result) -> Trained:
    return Trained(
        job_id=result.job_id, role=result.role, method=cast(Method, result.method), pruned=result.pruned,
        proxy_accuracy=result.proxy_accuracy,
        test_accuracy=result.test_accuracy, test_loss=result.test_loss, predicted_ms=milliseconds(result.predicted),
        measured_ms=milliseconds(result.measured), reused=result.reused, artifacts=list(_files(result)),
    )  # fmt: skip


def _files(result: Result) -> dict[str, str]:
    """Name → digest of the files that a training left."""
    files = {"weights.safetensors": result.weights, "masks.safetensors": result.masks, "model.onnx": result.model}
    return {name: digest for name, digest in files.items() if digest is not None}
