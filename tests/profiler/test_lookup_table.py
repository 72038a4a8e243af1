"""Prices from measured layers: sums, interpolation, what is missing, and the vectorised form."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from latency_profiler.cost import layer_flops
from latency_profiler.errors import InvalidInput, MissingLatencies
from latency_profiler.interpolation import Family, alignments_of
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.lookup_table import Entry, Fit, LatencyModel, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.quote import quote
from latency_profiler.spaces.registry import SPACES, get_space
from latency_profiler.spaces.space import Space

CONV = Layer(Op.CONV, 10, 20, 8, 3, 1, 1, Activation.RELU, norm=True)


def seconds(layer: Layer) -> float:
    """Bilinear in the widths, as interpolation assumes."""
    return 1e-9 * (1000 + layer_flops(layer) + 7 * layer.c_in + 11 * layer.c_out)


def table(layers: list[Layer]) -> LatencyTable:
    return LatencyTable("bench", "f" * 64, {layer.key: Entry(layer, seconds(layer)) for layer in layers})


def random_channels(space: Space, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([space.channels(rng.integers(0, 31, len(space.genes)).tolist()) for _ in range(count)])


@pytest.mark.parametrize("name", sorted(SPACES))
@pytest.mark.parametrize("size", [8, 32])
def test_a_sampled_plan_prices_every_structure(name: str, size: int) -> None:
    space = get_space(name, size, 0.5, 10, free_last=True)
    planned = plan_layers(space, 4)
    assert len(planned) == len({layer.key for layer in planned})
    prices = table(planned)
    for row in random_channels(space, 20).tolist():
        price = prices.price(space, row)
        exact = sum(map(seconds, space.layers(row)))
        assert price.seconds == pytest.approx(exact, rel=1e-9), "the device is bilinear, so interpolation is exact"
    assert prices.missing(space.layers(space.uniform(0.43))) == []


def test_a_full_plan_interpolates_nothing() -> None:
    space = get_space("mobilenet_v1", 8, 0.25, 10)
    prices = table(plan_layers(space))
    for row in random_channels(space, 20).tolist():
        assert prices.price(space, row).interpolated == 0


def test_layers_of_one_width_are_always_planned_in_full() -> None:
    space = get_space("mobilenet_v1", 32, 0.5, 10)
    sampled, full = plan_layers(space, 3), plan_layers(space)
    assert {one for one in sampled if one.op is Op.DEPTHWISE} == {one for one in full if one.op is Op.DEPTHWISE}
    assert len(sampled) < len(full) / 5


def test_interpolation_is_marked_and_stays_inside_its_cell() -> None:
    corners = [replace(CONV, c_in=i, c_out=o) for i in (8, 16) for o in (16, 32)]
    prices = table(corners)
    assert prices.layer(corners[0]).interpolated is False
    inside = prices.layer(CONV)
    assert inside.interpolated is True
    assert inside.seconds == pytest.approx(seconds(CONV))
    for outside in (replace(CONV, c_in=7), replace(CONV, c_in=17), replace(CONV, c_out=33)):
        with pytest.raises(MissingLatencies, match="profile the space") as caught:
            prices.layer(outside)
        assert caught.value.keys == (outside.key,)


def test_another_family_is_no_neighbour() -> None:
    corners = [replace(CONV, c_in=i, c_out=o) for i in (8, 16) for o in (16, 32)]
    assert table(corners).missing([replace(CONV, size=9), replace(CONV, activation=Activation.RELU6), CONV]) == [
        replace(CONV, size=9).key, replace(CONV, activation=Activation.RELU6).key,
    ]  # fmt: skip


def test_layers_of_one_width_are_interpolated_along_the_diagonal() -> None:
    depthwise = Layer(Op.DEPTHWISE, 12, 12, 8, 3, 1, 1, Activation.RELU, norm=True)
    prices = table([replace(depthwise, c_in=c, c_out=c) for c in (8, 16)])
    assert prices.layer(depthwise).seconds == pytest.approx(seconds(depthwise))


@pytest.mark.parametrize("alignment", [4, 8, 16])
def test_widths_that_a_kernel_is_made_for_are_interpolated_among_their_like(alignment: int) -> None:
    """Other widths take twenty times as long; 160 lies between 153 and 161, and 321 between 312 and 327."""
    depthwise = Layer(Op.DEPTHWISE, 1, 1, 8, 3, 1, 1, Activation.RELU, norm=True)

    def took(width: int) -> float:
        return 1e-7 * (10 + width) * (1 if width % alignment == 0 else 20)

    slots = [256 * (10 + 3 * i) // 100 for i in range(31)] + [512 * (10 + 3 * i) // 100 for i in range(31)]
    measured = [replace(depthwise, c_in=width, c_out=width) for width in {*slots, 48, 96, 112, 272, 400}]
    prices = LatencyTable("d", "f", {layer.key: Entry(layer, took(layer.c_in)) for layer in measured})
    for width in (96, 160, 162, 321, 320, 336, 400):
        price = prices.layer(replace(depthwise, c_in=width, c_out=width)).seconds
        assert price == pytest.approx(took(width)), width


def along(points: dict[int, float], width: int) -> float:
    """Price of a depthwise layer of which some widths are measured."""
    depthwise = Layer(Op.DEPTHWISE, 1, 1, 8, 3, 1, 1, Activation.RELU, norm=True)
    layers = {wide: replace(depthwise, c_in=wide, c_out=wide) for wide in points}
    prices = LatencyTable("d", "f", {layers[wide].key: Entry(layers[wide], took) for wide, took in points.items()})
    return prices.layer(replace(depthwise, c_in=width, c_out=width)).seconds


def test_beside_one_width_of_the_kind_a_layer_takes_in_proportion() -> None:
    """Between 3 and 5 it would take 80: 4 is the multiple of 4 that is next to 8."""
    assert along({3: 60.0, 5: 100.0, 7: 140.0, 8: 16.0, 9: 180.0}, 4) == pytest.approx(8.0)


def test_where_no_width_is_of_the_kind_any_is_better_than_none() -> None:
    assert along({4: 8.0, 8: 16.0, 12: 24.0}, 6) == pytest.approx(12.0)
    assert along({3: 60.0, 5: 100.0, 7: 140.0}, 4) == pytest.approx(80.0)


def test_where_no_cell_is_of_the_kind_any_cell_is_better_than_the_diagonal() -> None:
    """Multiples of 16 are a third as slow; of them only the ends are measured, and only with themselves."""
    family = Family()
    for c_in, c_out in product(range(25, 257, 21), range(25, 257, 21)):
        family.add((c_in, c_out), 3.0 * c_in * c_out)
    for width in (16, 32, 48, 256):
        family.add((width, width), 1.0 * width * width)
    assert 16 in family.alignments
    assert family.interpolate(160, 160) == pytest.approx(3.0 * 160 * 160)


def test_the_smallest_cell_around_a_layer_counts() -> None:
    family = Family()
    for c_in, c_out in product((8, 16, 64), (8, 16, 64)):
        family.add((c_in, c_out), float(c_in**2 * c_out))
    assert family.interpolate(12, 12) == pytest.approx((8**2 + 16**2) / 2 * 12)


def test_a_cell_of_nearer_inputs_may_be_larger_than_one_of_others() -> None:
    family = Family()
    for c_in, c_out in [*product((4, 6), (2, 8)), *product((3, 8), (4, 6))]:  # 3 x 7 and 6 x 3 widths
        family.add((c_in, c_out), 1.0 if c_in in (4, 6) else 2.0)
    assert family.interpolate(5, 5) == 2.0
    family.add((4, 4), 1.0)
    family.add((6, 4), 1.0)
    family.add((4, 6), 1.0)
    family.add((6, 6), 1.0)
    assert family.interpolate(5, 5) == 1.0
    assert family.interpolate(5, 10) is None
    family.add((4, 12), 1.0)
    family.add((6, 12), 1.0)
    assert family.interpolate(5, 10) == 1.0


def test_noise_is_no_alignment() -> None:
    rng = np.random.default_rng(0)
    points = {(i, o): (50 + i + o) * float(rng.normal(1, 0.03)) for i in range(25, 257, 21) for o in range(24, 257, 8)}
    assert alignments_of(points) == (1, 1)
    assert alignments_of({point: took * (3 if point[1] % 16 else 1) for point, took in points.items()}) == (1, 16)
    assert alignments_of({}) == alignments_of({(8, 16): 1.0}) == alignments_of({(8, 8): 1.0, (16, 16): 2.0}) == (1, 1)


def test_a_missing_layer_is_an_error_and_named() -> None:
    space = get_space("resnet20", 32, 1.0, 10)
    layers = list(dict.fromkeys(space.layers(space.channels(space.largest))))
    prices = table(layers[:-2])
    with pytest.raises(MissingLatencies) as caught:
        prices.price(space, space.channels(space.largest))
    assert set(caught.value.keys) == {layers[-1].key, layers[-2].key}


def test_equal_layers_count_wherever_they_stand() -> None:
    space = get_space("resnet20", 32, 1.0, 10)
    layers = space.layers(space.channels(space.largest))
    assert len(set(layers)) < len(layers)
    price = table(list(set(layers))).price(space, space.channels(space.largest))
    assert len(price.layers) == len(layers)
    assert price.seconds == pytest.approx(sum(map(seconds, layers)))


def test_a_fit_is_overhead_and_slope() -> None:
    space = get_space("resnet20", 32, 1.0, 10)
    prices = table(plan_layers(space, 4))
    channels = space.channels(space.largest)
    plain = prices.price(space, channels).seconds
    prices.fits[space.key] = Fit(2e-5, 0.9, 8, 8, 0.01, 0.02)
    price = prices.price(space, channels)
    assert (price.seconds, price.overhead) == (pytest.approx(2e-5 + 0.9 * plain), 2e-5)
    other = get_space("resnet20", 32, 1.0, 100)
    before = table(plan_layers(other, 4)).price(other, channels).seconds
    prices.entries |= table(plan_layers(other, 4)).entries
    assert LatencyTable("bench", "f", prices.entries, prices.fits).price(other, channels).seconds == before


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet20", "vgg16"])
@pytest.mark.parametrize("fitted", [False, True])
def test_latency_model_equals_the_table_to_the_last_bit(name: str, fitted: bool) -> None:
    space = get_space(name, 8, 0.25, 10, free_last=True)
    prices = table(plan_layers(space, 4))
    if fitted:
        prices.fits[space.key] = Fit(1.234e-5, 0.987, 8, 8, 0.01, 0.02)
    channels = random_channels(space, 30)
    assert LatencyModel(prices, space).seconds(channels).tolist() == [
        prices.price(space, row).seconds for row in channels.tolist()
    ]


def test_tables_survive_json_and_are_checked() -> None:
    prices = table(plan_layers(get_space("resnet20", 32, 1.0, 10), 3))
    prices.add(Entry(CONV, 1e-5, 1e-7, 9, False))
    prices.fits["space"] = Fit(1e-5, 0.9, 8, 8, 0.01, 0.02)
    data = json.loads(json.dumps(prices.to_json()))
    copy = LatencyTable.from_json(data)
    assert copy == prices
    assert copy.to_json() == data
    for wrong in (0.0, -1.0, 1e9):
        data["entries"][0]["seconds"] = wrong
        with pytest.raises(InvalidInput, match="above 0"):
            LatencyTable.from_json(data)
    with pytest.raises(InvalidInput, match="not a lookup table"):
        LatencyTable.from_json({"device": "bench"})
    prices.fits["space"] = Fit(1e-5, 0.9, 8, 8, 0.01, 0.02, terms={"moonlight": 1.0})
    with pytest.raises(InvalidInput, match="unknown terms of a fit: moonlight"):
        LatencyTable.from_json(prices.to_json())


@pytest.mark.parametrize("free", [True, False])
def test_what_was_fitted_holds_for_the_same_networks_whether_their_last_layer_is_free_or_fixed(free: bool) -> None:
    fitted, other = (get_space("resnet20", 8, 1.0, 10, free_last) for free_last in (free, not free))
    prices = table(plan_layers(fitted))
    plain = prices.price(other, other.channels(other.largest)).seconds
    prices.fits[fitted.key] = Fit(2e-5, 0.9, 8, 8, 0.01, 0.02)
    assert prices.price(other, other.channels(other.largest)).seconds == pytest.approx(2e-5 + 0.9 * plain)
    channels = random_channels(other, 5)
    slow = [prices.price(other, row).seconds for row in channels.tolist()]
    assert LatencyModel(prices, other).seconds(channels).tolist() == slow
    prices.fits[other.key] = Fit(1e-3, 1.0, 8, 8, 0.01, 0.02)
    assert prices.price(other, other.channels(other.largest)).seconds == pytest.approx(1e-3 + plain), (
        "its own comes first"
    )


@pytest.mark.parametrize("alignment", [1, 8])
def test_interpolated_layers_say_how_far_they_are_off(alignment: int) -> None:
    """On a curved surface, with steps that must not count as errors, as much as they are, and not three times it."""

    def seconds_at(layer: Layer) -> float:
        step = 1.0 if layer.c_out % alignment == 0 else 3.0
        return step * 1e-6 * (layer.c_in + 5) ** 0.5 * (layer.c_out + 9) ** 0.7

    widths = [2, 5, 8, 13, 16, 27, 32, 45, 48, 61, 64]
    prices = LatencyTable("bench", "f")
    for c_in, c_out in product(widths, widths):
        layer = replace(CONV, c_in=c_in, c_out=c_out)
        prices.add(Entry(layer, seconds_at(layer)))
    between = [replace(CONV, c_in=c_in, c_out=c_out) for c_in, c_out in product(range(3, 64, 3), range(9, 60, 4))]
    between = [layer for layer in between if layer.key not in prices.entries]
    off = [abs(prices.layer(layer).seconds / seconds_at(layer) - 1) for layer in between]
    [error] = {prices.error(layer) for layer in between}
    assert error is not None
    assert np.mean(off) < error < 10 * np.mean(off)
    assert prices.error(replace(CONV, c_in=2, c_out=5)) == 0.0
    assert prices.error(replace(CONV, c_in=2, c_out=5, size=99)) is None


def test_layers_of_one_width_say_it_too_and_few_points_say_nothing() -> None:
    depthwise = Layer(Op.DEPTHWISE, 8, 8, 8, 3, 1, 1, Activation.RELU, norm=True)
    prices = LatencyTable("bench", "f")
    for width in (8, 16, 32):
        assert prices.error(depthwise) == (0.0 if prices.entries else None)
        layer = replace(depthwise, c_in=width, c_out=width)
        prices.add(Entry(layer, 1e-6 * width**2))
    between = replace(depthwise, c_in=24, c_out=24)
    assert prices.error(between) == pytest.approx((8**2 + (32**2 - 8**2) / 3) / 16**2 - 1)
    lone = LatencyTable("bench", "f", dict(list(prices.entries.items())[1:]))
    assert lone.layer(between).interpolated
    assert lone.error(between) is None


@pytest.mark.parametrize("curved", ["c_in", "c_out"])
def test_either_width_can_make_interpolation_err(curved: str) -> None:
    prices = LatencyTable("bench", "f")
    for c_in, c_out in product((8, 16, 24, 32), repeat=2):
        layer = replace(CONV, c_in=c_in, c_out=c_out)
        prices.add(Entry(layer, 1e-6 * (c_in + c_out + getattr(layer, curved) ** 2)))
    error = prices.error(replace(CONV, c_in=9, c_out=9))
    assert error is not None
    assert 0.05 < error < 0.2


def test_a_network_is_off_by_the_shares_of_its_layers() -> None:
    space = get_space("resnet20", 8, 1.0, 10, free_last=True)
    prices = table(plan_layers(space, 10))
    priced = quote(space, random_channels(space, 1)[0].tolist(), prices)
    assert priced["interpolated"]
    off = sum(layer["share"] * layer["error"] for layer in priced["layers"])
    assert priced["interpolation_error"] == pytest.approx(off, abs=1e-12)
