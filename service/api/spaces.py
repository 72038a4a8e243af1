"""What can be searched, and what a structure costs."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field, model_validator

from latency_profiler.cost import Statistic, flops, parameters
from latency_profiler.errors import NotFound
from latency_profiler.quote import quote
from latency_profiler.spaces.registry import SPACES, get_space
from latency_profiler.spaces.space import CHOICES, LARGEST_WIDTH, Slot, Space
from service.api.auth import require
from service.api.problems import responses
from service.choices import LastLayer
from service.fields import Model, Name
from service.store import measurements
from service.store.session import snapshot

router = APIRouter(prefix="/spaces", tags=["spaces"], dependencies=[Depends(require("read"))])


class Widths(BaseModel):
    """A width that layers share, with the channel numbers that it can take; a fixed one takes its base."""

    name: str
    base: int
    choices: list[int]


class Extreme(BaseModel):
    """The smallest or the largest structure."""

    encoding: list[int]
    channels: list[int]
    flops: int
    parameters: int


class SpaceSummary(BaseModel):
    """A space by its name; its size depends on the image size, width and classes that are asked for."""

    name: str
    genes: int
    choices: int


class SpaceDetail(BaseModel):
    """A space: one gene per free width."""

    name: str
    key: str
    image_size: int
    width: float
    classes: int
    last_layer: LastLayer
    genes: list[Widths]
    fixed: list[Widths]
    smallest: Extreme
    largest: Extreme


class SpaceList(BaseModel):
    """All spaces."""

    items: list[SpaceSummary]
    next: None = None


class PriceRequest(Model):
    """A structure of the space in the path, by its encoding or its channels, and the devices to price it on."""

    encoding: Annotated[list[Annotated[int, Field(ge=0, lt=CHOICES)]], Field(max_length=500)] | None = None
    channels: Annotated[list[Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]], Field(max_length=500)] | None = None
    image_size: Annotated[int, Field(ge=8, le=512)] = 224
    width: Annotated[float, Field(ge=0.05, le=4)] = 1.0
    classes: Annotated[int, Field(ge=2, le=100_000)] = 1000
    last_layer: LastLayer = "fixed"
    devices: Annotated[list[Name], Field(max_length=20, default_factory=list)]
    statistic: Statistic = Statistic.P50
    """Of the whole network's runs; layers have the median's milliseconds in any case."""

    @model_validator(mode="after")
    def _one_description(self) -> "PriceRequest":
        if (self.encoding is None) == (self.channels is None):
            raise ValueError("give either an encoding or channels")
        return self


class LayerPrice(BaseModel):
    """One layer; milliseconds, share of the layers' sum and whether it was interpolated are per device."""

    name: str
    key: str
    op: str
    c_in: int
    c_out: int
    size: int
    out_size: int
    kernel: int
    stride: int
    padding: int
    activation: str
    norm: bool
    residual: bool
    flops: int
    parameters: int
    latency_ms: dict[str, float] = {}
    share: dict[str, float] = {}
    interpolated: dict[str, bool] = {}
    error: dict[str, float | None] = {}
    """About the share by which interpolation is off; null where too few layers were measured to tell."""


class PriceQuote(BaseModel):
    """What a structure costs; latencies are per device, `overhead_ms` is the part that no layer accounts for."""

    space: str
    image_size: int
    width: float
    classes: int
    encoding: list[int] | None
    channels: list[int]
    flops: int
    authors_flops: int
    parameters: int
    layers: list[LayerPrice]
    latency_ms: dict[str, float] = {}
    overhead_ms: dict[str, float] = {}
    interpolated: dict[str, int] = {}
    interpolation_error: dict[str, float | None] = {}
    """About the share of the layers' sum by which interpolation is off, if all are off to the same side."""


@router.get("")
def list_spaces() -> SpaceList:
    """All spaces."""
    genes = {name: len(get_space(name).genes) for name in sorted(SPACES)}
    return SpaceList(items=[SpaceSummary(name=name, genes=count, choices=CHOICES) for name, count in genes.items()])


@router.get("/{space}", responses=responses(404))
def read_space(
    space: Name,
    image_size: Annotated[int, Query(ge=8, le=512)] = 224,
    width: Annotated[float, Query(ge=0.05, le=4, allow_inf_nan=False)] = 1.0,
    classes: Annotated[int, Query(ge=2, le=100_000)] = 1000,
    last_layer: LastLayer = "fixed",
) -> SpaceDetail:
    """One space: its genes, and the smallest and largest cost."""
    _known(space)
    found = get_space(space, image_size, width, classes, last_layer == "free")
    return SpaceDetail(
        name=found.name, key=found.key, image_size=image_size, width=width, classes=classes, last_layer=last_layer,
        genes=[_widths(slot, choices) for slot, choices in zip(found.genes, found.choices, strict=True)],
        fixed=[_widths(slot, [slot.base]) for slot in found.fixed],
        smallest=_extreme(found, found.smallest), largest=_extreme(found, found.largest),
    )  # fmt: skip


@router.post("/{space}/price", responses=responses(404, 409))
def price(space: Name, request: PriceRequest) -> PriceQuote:
    """Costs of one structure, layer by layer; a device whose table cannot tell them is answered by 409."""
    _known(space)
    found = get_space(space, request.image_size, request.width, request.classes, request.last_layer == "free")
    channels = (
        found.channels(request.encoding) if request.encoding is not None else found.complete(request.channels or [])
    )
    answer = quote(found, channels, encoding=request.encoding)
    for layer, node in zip(answer["layers"], found.nodes(channels), strict=True):
        layer["out_size"] = node.layer.out_size
    for device in dict.fromkeys(request.devices):
        _add_latency(answer, found, channels, device, request.statistic)
    return PriceQuote.model_validate(answer)


def _add_latency(
    answer: dict[str, Any], space: Space, channels: Sequence[int], device: str, statistic: Statistic
) -> None:
    """Write one device's figures beside those of the others."""
    with snapshot() as session:
        table = measurements.pricing_table(session, device, space, statistic)
    priced = quote(space, channels, table)
    for name in ("latency_ms", "overhead_ms", "interpolated", "interpolation_error"):
        answer.setdefault(name, {})[device] = priced[name]
    for layer, figures in zip(answer["layers"], priced["layers"], strict=True):
        for name in ("latency_ms", "share", "interpolated", "error"):
            layer.setdefault(name, {})[device] = figures[name]


def _known(space: str) -> None:
    """A space in the path that does not exist is not found, rather than invalid."""
    if space not in SPACES:
        raise NotFound("space", space, sorted(SPACES))


def _widths(slot: Slot, choices: Sequence[int]) -> Widths:
    return Widths(name=slot.name, base=slot.base, choices=list(choices))


def _extreme(space: Space, encoding: Sequence[int]) -> Extreme:
    channels = space.channels(encoding)
    layers = space.layers(channels)
    return Extreme(encoding=list(encoding), channels=list(channels), flops=flops(layers), parameters=parameters(layers))
