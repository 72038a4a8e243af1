"""The order in which layers are measured: what is missing when only some of them are."""

import numpy as np
import pytest

from latency_profiler.cost import layer_flops
from latency_profiler.errors import MissingLatencies
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, LatencyTable, plan_layers
from latency_profiler.planning import _halved, by_expected_error
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from latency_profiler.spaces.registry import get_space

SPACE = get_space("mobilenet_v1", 32, 0.5, 10, free_last=True)


def error(layers: list[Layer], networks: int = 30) -> float:
    """Mean error of random networks priced from these layers on a simulated device; infinite where some are missing."""
    device, rng = Simulated(Settings()), np.random.default_rng(0)
    table = LatencyTable("d", "f")
    for layer in layers:
        table.add(Entry(layer, device._layer_seconds(layer)))
    errors = []
    for _ in range(networks):
        channels = SPACE.channels(rng.integers(0, 31, len(SPACE.genes)).tolist())
        exact = sum(map(device._layer_seconds, SPACE.layers(channels)))
        try:
            errors.append(abs(table.price(SPACE, channels).seconds / exact - 1))
        except MissingLatencies:
            return float("inf")
    return float(np.mean(errors))


@pytest.mark.parametrize(
    ("widths", "levels"),
    [
        ([], {}), ([7], {7: 0}), ([1, 9], {1: 0, 9: 0}), ([1, 2, 3], {1: 0, 2: 1, 3: 0}),
        ([0, 1, 2, 3, 4], {0: 0, 4: 0, 2: 1, 1: 2, 3: 2}),
        ([0, 1, 2, 3, 4, 5], {0: 0, 5: 0, 2: 1, 1: 2, 3: 2, 4: 3}),
    ],
)  # fmt: skip
def test_levels_are_how_often_the_range_was_halved(widths: list[int], levels: dict[int, int]) -> None:
    assert _halved(widths) == levels


@pytest.mark.parametrize("points", [3, 6, 31])
def test_all_layers_come_once_and_the_corners_first(points: int) -> None:
    layers = plan_layers(SPACE, points)
    ordered = by_expected_error(SPACE, layers)
    assert sorted(map(str, ordered)) == sorted(map(str, layers))
    corners = [layer.key for layer in plan_layers(SPACE, 2) if layer in set(layers)]
    ends = {key for key in corners if not key.startswith(("depthwise", "global"))}
    assert ends <= {layer.key for layer in ordered[: len(layers) // 2]}
    assert by_expected_error(SPACE, layers) == ordered != by_expected_error(SPACE, layers, seed=1)


def test_larger_layers_and_wider_gaps_come_first() -> None:
    family = "conv-k1s1p0-4x4-bn-relu"
    ordered = [layer for layer in by_expected_error(SPACE, plan_layers(SPACE)) if layer.family == family]
    half = len(ordered) // 2
    assert len(ordered) > 100
    assert np.mean([*map(layer_flops, ordered[:half])]) > 1.2 * np.mean([*map(layer_flops, ordered[half:])])


def test_a_part_of_the_layers_prices_better_than_as_many_in_the_plans_order() -> None:
    layers = plan_layers(SPACE, 9)
    ordered = by_expected_error(SPACE, layers)
    errors = [error(ordered[: int(share * len(layers))]) for share in (0.25, 0.5, 0.75, 1.0)]
    assert error(layers[: int(0.75 * len(layers))]) == float("inf")
    assert errors[0] < 0.2
    assert errors == sorted(errors, reverse=True)
