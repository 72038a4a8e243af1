"""The order in which layers are measured: what is missing when only some of them are."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from latency_profiler.cost import layer_flops
from latency_profiler.errors import MissingLatencies
from latency_profiler.layers import Layer, Op
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.planning import _errors, _halved, by_expected_error, plan_layers, refinement, sampled
from latency_profiler.runtimes.base import Settings
from latency_profiler.runtimes.simulated import Simulated
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space

SPACE = get_space("mobilenet_v1", 32, 0.5, 10, free_last=True)
NARROW = get_space("resnet20", 8, 1.0, 10, free_last=True)


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
    ends = {
        unit.at(unit.source.at(i), unit.target.at(j)).key
        for unit, i, j in product(SPACE.units, (0, 30), (0, 30))
        if not unit.tied
    }
    assert ends <= {layer.key for layer in ordered[: len(layers) // 2]}
    assert by_expected_error(SPACE, layers) == ordered != by_expected_error(SPACE, layers, seed=1)


def test_larger_layers_and_wider_gaps_come_first() -> None:
    family = "conv-k1s1p0-4x4-bn-relu"
    ordered = [layer for layer in by_expected_error(SPACE, plan_layers(SPACE)) if layer.family == family]
    half = len(ordered) // 2
    assert len(ordered) > 100
    assert np.mean([*map(layer_flops, ordered[:half])]) > 1.2 * np.mean([*map(layer_flops, ordered[half:])])


def test_a_part_of_the_layers_prices_better_than_as_many_in_the_plans_order() -> None:
    layers = plan_layers(SPACE, 14)
    ordered = by_expected_error(SPACE, layers)
    errors = [error(ordered[: int(share * len(layers))]) for share in (0.25, 0.5, 0.75, 1.0)]
    assert error(layers[: int(0.75 * len(layers))]) == float("inf")
    assert errors[0] < 0.2
    assert errors == sorted(errors, reverse=True)


def measured(layers: list[Layer], seconds: Callable[[Layer], float]) -> LatencyTable:
    return LatencyTable("d", "f", {layer.key: Entry(layer, seconds(layer)) for layer in layers})


def refined(seconds: Callable[[Layer], float], points: int = 10, most: int = 10_000) -> tuple[list[Layer], int]:
    """The layers of a grid and all that it is refined by, and in how many rounds."""
    layers, rounds = plan_layers(SPACE, points), 0
    while new := refinement(SPACE, points, measured(layers, seconds), most):
        assert not set(new) & set(layers)
        layers, rounds = layers + new, rounds + 1
    return layers, rounds


def test_lines_need_no_more_points() -> None:
    assert refined(lambda layer: 1e-6 * (3 + layer.c_in + 2 * layer.c_out)) == (plan_layers(SPACE, 10), 0)


def test_around_a_step_gaps_are_halved_until_it_is_between_two_choices() -> None:
    family, step = "conv-k1s1p0-4x4-bn-relu", 190

    def seconds(layer: Layer) -> float:
        return 1e-5 * (1 + (layer.family == family and layer.c_out >= step))

    layers, rounds = refined(seconds)
    assert rounds >= 2
    unit = next(one for one in SPACE.units if one.at(1, 1).family == family and one.source.base == one.target.base)
    for width in unit.target.widths():
        priced = measured(layers, seconds).layer(unit.at(117, width)).seconds
        assert priced == pytest.approx(seconds(unit.at(117, width)), rel=1e-6) or abs(width - step) <= 8, width
    others = {layer for layer in layers if layer.family != family}
    assert others == {layer for layer in plan_layers(SPACE, 10) if layer.family != family}, "only where it matters"


def test_refined_grids_price_better_than_finer_ones_of_more_layers() -> None:
    device = Simulated(Settings())
    for points, finer in ((8, 10), (8, 12), (10, 12)):
        layers, _ = refined(device._layer_seconds, points)
        more = plan_layers(SPACE, finer)
        assert len(layers) < len(more)
        assert error(layers) < error(more)
    assert error(layers) < error(plan_layers(SPACE, 10))


@pytest.mark.parametrize("points", [4, 6, 10, 16])
def test_grids_have_the_ends_and_even_and_odd_widths_of_all_parts(points: int) -> None:
    for slot in {unit.target for unit in (*SPACE.units, *NARROW.units) if not unit.tied}:
        choices = sampled(slot, points)
        assert choices == sorted(set(choices))
        assert len(choices) <= points
        assert {0, 30} <= set(choices)
        evenness = [math.gcd(slot.at(choice), 32) for choice in range(31)]
        for part in np.array_split(range(31), (points - 2) // 2):
            grid, whole = ({evenness[choice] for choice in some} for some in (set(part) & set(choices), part))
            assert {min(whole), max(whole)} <= grid
    assert sampled(SPACE.units[0].target, 31) == sampled(SPACE.units[0].target, None) == list(range(31))


def blocked(layer: Layer) -> float:
    """A kernel for inputs of multiples of 4 and outputs of multiples of 16, which is thrice as fast with both."""
    slow = 3 if layer.op is Op.CONV and (layer.c_in % 4 or layer.c_out % 16) else 1
    return 1e-6 * slow * (5 + layer.c_in * layer.c_out / 400)


def by_fours(layer: Layer) -> float:
    """One that is six times as fast with inputs of multiples of 4."""
    return 1e-6 * (1 if layer.c_in % 4 == 0 else 6) * (1 + layer.c_in / 40 + layer.c_out / 40)


@pytest.mark.parametrize("kind", ["even", "odd", "any"])
@pytest.mark.parametrize(("space", "kernel"), [(SPACE, blocked), (NARROW, by_fours)])
def test_a_grid_prices_the_structures_that_a_search_picks(
    space: Space, kernel: Callable[[Layer], float], kind: str
) -> None:
    """Off by a quarter without widths that kernels are made for, or without others, or without telling them apart."""
    table, rng, errors = measured(plan_layers(space, 10), kernel), np.random.default_rng(0), []
    fits = {"even": lambda width: width % 16 == 0, "odd": lambda width: width % 4 != 0, "any": lambda _: True}[kind]
    for _ in range(50):
        widths = [[width for width in slot.widths() if fits(width)] for slot in space.genes]
        channels = [int(rng.choice(some or [slot.base])) for some, slot in zip(widths, space.genes, strict=True)]
        exact = sum(map(kernel, space.layers(channels)))
        errors.append(abs(table.price(space, channels).seconds / exact - 1))
    assert np.mean(errors) < 0.05


def test_gaps_are_halved_by_widths_of_the_same_kind() -> None:
    """A kernel for multiples of 8 outputs with a step at 350, another for the others with one at 250."""
    family = "conv-k1s1p0-2x2-bn-relu"

    def seconds(layer: Layer) -> float:
        step, slow = (350, 1) if layer.c_out % 8 == 0 else (250, 3)
        return 1e-6 * slow * (20 + layer.c_out) * (2 if layer.family == family and layer.c_out >= step else 1)

    grid = plan_layers(SPACE, 10)
    table = measured(grid, seconds)
    assert table.alignments(family)[1] == 8
    found = [layer.c_out for layer in refinement(SPACE, 10, table, 10_000) if layer.family == family]
    known = sorted({layer.c_out for layer in grid if layer.family == family})
    for aligned, step in ((True, 350), (False, 250)):
        kind = [width for width in known if (width % 8 == 0) == aligned]
        low, high = max(width for width in kind if width < step), min(width for width in kind if width >= step)
        assert any(low < width < high and (width % 8 == 0) == aligned for width in found), (aligned, low, high)


def stepped(layer: Layer) -> float:
    """Twice the time from 60 outputs up."""
    return 1e-6 * (10 + layer.c_in + layer.c_out) * (2 if layer.c_out >= 60 else 1)


def test_refinement_is_limited_and_needs_a_measured_grid() -> None:
    table = measured(plan_layers(SPACE, 4), stepped)
    every = refinement(SPACE, 4, table, 10_000)
    assert len(every) > 10
    assert refinement(SPACE, 4, table, len(every)) == every
    assert refinement(SPACE, 4, table, 0) == []
    for most in range(1, len(every), 7):
        some = refinement(SPACE, 4, table, most)
        assert len(some) <= most
        assert set(some) <= set(every)
    with pytest.raises(MissingLatencies):
        refinement(SPACE, 4, LatencyTable("d", "f"), 10)


def test_around_a_layer_that_could_not_be_measured_nothing_is_refined() -> None:
    planned = plan_layers(SPACE, 4)
    families = {layer.family for layer in refinement(SPACE, 4, measured(planned, stepped), 10_000)}
    assert "conv-k1s1p0-2x2-bn-relu" in families
    lost = next(layer for layer in planned if layer.family == "conv-k1s1p0-2x2-bn-relu")
    rest = measured([layer for layer in planned if layer != lost], stepped)
    spoiled = {
        unit.kind
        for unit in SPACE.units
        if unit.at(1, 1).family == lost.family
        and lost.c_in in unit.source.widths()
        and lost.c_out in unit.target.widths()
    }
    found = set(refinement(SPACE, 4, rest, 10_000))
    assert spoiled
    for unit in SPACE.units:
        if unit.kind in spoiled:
            assert found.isdisjoint({unit.at(i, j) for i in unit.source.widths() for j in unit.target.widths()})


def test_errors_of_gaps() -> None:
    """Seconds at 1, 2, 4 and 5 channels: the line from 1 to 4 has 4 at 2, that from 2 to 5 has 14 / 3 at 4."""
    found = _errors(np.array([1.0, 2.0, 4.0, 5.0]), np.array([[3.0], [4.0], [6.0], [5.0]]))
    assert found == pytest.approx([0.0, 4 / 3, 4 / 3])
    assert _errors(np.array([3.0]), np.array([[1.0, 2.0]])).shape == (0,)
    assert _errors(np.array([3.0, 4.0]), np.array([[1.0, 2.0], [1.0, 9.0]])).tolist() == [0.0]
