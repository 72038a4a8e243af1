"""One structure and all that it costs, as JSON: what `secateurs price` prints, with or without a server."""

from collections.abc import Sequence
from typing import Any

from latency_profiler import cost
from latency_profiler.errors import InvalidChannels
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import LatencyTable
from latency_profiler.spaces.space import Space


def quote(
    space: Space, channels: Sequence[int], table: LatencyTable | None = None, encoding: Sequence[int] | None = None
) -> dict[str, Any]:
    """Costs of a structure; with a table also its latency, and each layer's milliseconds and share of their sum.

    Interpolated layers have an error, about the share by which they are off (None where nothing tells), and so has the
    sum: as if all were off to the same side.

    The answer's encoding is the given one, else the canonical one; None for widths that are no choices of the space.

    Raises:
        InvalidChannels: channels that the space cannot hold.
        MissingLatencies: the table lacks layers of the structure.
    """
    channels = space.complete(channels)
    nodes = space.nodes(channels)
    layers = [node.layer for node in nodes]
    priced: dict[str, Any] = {
        "space": space.name,
        "image_size": space.image_size,
        "width": space.width,
        "classes": space.classes,
        "encoding": _encoding(space, channels) if encoding is None else list(encoding),
        "channels": list(channels),
        "flops": cost.flops(layers),
        "authors_flops": cost.authors_flops(space, channels),
        "parameters": cost.parameters(layers),
        "layers": [_layer(node.name, node.layer) for node in nodes],
    }
    return priced if table is None else priced | _latency(space, channels, table, priced["layers"])


def _encoding(space: Space, channels: Sequence[int]) -> list[int] | None:
    try:
        return list(space.encoding(channels))
    except InvalidChannels:
        return None


def _layer(name: str, layer: Layer) -> dict[str, Any]:
    counts = {"flops": cost.layer_flops(layer), "parameters": cost.layer_parameters(layer)}
    return {"name": name, "key": layer.key, **layer.to_json(), **counts}


def _latency(
    space: Space, channels: Sequence[int], table: LatencyTable, layers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    price = table.price(space, channels)
    total = sum(layer.seconds for layer in price.layers)
    latencies = [
        {
            "latency_ms": layer.seconds * 1000,
            "share": layer.seconds / total if total else 0.0,
            "interpolated": layer.interpolated,
            "error": table.error(layer.layer),
        }
        for layer in price.layers
    ]
    return {
        "device": table.device,
        "latency_ms": price.seconds * 1000,
        "overhead_ms": price.overhead * 1000,
        "interpolated": price.interpolated,
        "interpolation_error": _error(latencies),
        "layers": [layer | latency for layer, latency in zip(layers, latencies, strict=True)],
    }


def _error(layers: Sequence[dict[str, Any]]) -> float | None:
    """The share by which the layers' sum is off if all are off to the same side; None where one's error is unknown."""
    errors = [layer["error"] * layer["share"] for layer in layers if layer["error"] is not None]
    return sum(errors) if len(errors) == len(layers) else None
