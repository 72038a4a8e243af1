"""What layers cost in a network: each term by its definition, and their weights found again in made-up networks."""

import numpy as np
import pytest

from latency_profiler.calibration import (
    PENALTIES,
    Parts,
    calibration_networks,
    fit_networks,
    fit_percentile,
    parts_of,
    sum_of_layers,
)
from latency_profiler.layers import Layer, Op
from latency_profiler.lookup_table import Entry, Fit, LatencyModel, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.terms import BYTES, in_network, is_term, terms_of

SPACE = get_space("mobilenet_v1", 16, 0.5, 10, True)
CONV = Layer(Op.CONV, 16, 24, size=8, kernel=3, stride=2, padding=1, norm=True)
DEPTHWISE = Layer(Op.DEPTHWISE, 12, 12, size=8, kernel=3, padding=1, norm=True)
LINEAR = Layer(Op.LINEAR, 20, 10, size=1)


def table() -> LatencyTable:
    layers = plan_layers(SPACE, 3)
    entries = {layer.key: Entry(layer, 1e-6 * (2 + 0.01 * layer.c_in + 0.003 * layer.c_out)) for layer in layers}
    return LatencyTable("bench", "f" * 64, entries)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (CONV, {"input_bytes": 4096, "output_bytes": 1536, "weight_bytes": 4 * (16 * 24 * 9 + 2 * 24)}),
        (DEPTHWISE, {"input_bytes": 3072, "output_bytes": 3072, "weight_bytes": 4 * (12 * 9 + 2 * 12)}),
        (LINEAR, {"input_bytes": 80, "output_bytes": 40, "weight_bytes": 4 * 210}),
    ],
)
def test_terms_by_their_definitions(layer: Layer, expected: dict[str, float]) -> None:
    assert terms_of(layer, 2.0) == expected | {layer.family: 2.0}
    weights = dict.fromkeys(expected, 1.0) | {layer.family: 0.5, "linear-of-another-kind": 7.0}
    assert in_network(layer, 2.0, 3.0, weights) == pytest.approx(6.0 + 1.0 + sum(expected.values()))
    assert all(map(is_term, weights))
    assert not is_term("convolution")


def measured(fit: Fit, count: int = 48, noise: float = 0.003) -> list[tuple[Parts, float]]:
    """Networks as a device would measure them that costs what the fit says."""
    prices, rng = table(), np.random.default_rng(1)
    channels = [channels for channels, _ in calibration_networks(SPACE, count, 1)]
    plain = [parts_of(prices, SPACE, one) for one in channels]
    prices.fits[SPACE.key] = fit
    return [
        (parts, prices.price(SPACE, one).seconds * rng.normal(1, noise))
        for parts, one in zip(plain, channels, strict=True)
    ]


def test_the_parts_of_a_network_are_sums_over_its_layers() -> None:
    prices, channels = table(), SPACE.channels(SPACE.largest)
    parts = parts_of(prices, SPACE, channels)
    layers = SPACE.layers(channels)
    assert sum_of_layers(parts) == pytest.approx(sum(prices.layer(layer).seconds for layer in layers))
    assert parts.keys() == BYTES.keys() | {layer.family for layer in layers}
    assert parts["weight_bytes"] == sum(terms_of(layer, 0.0)["weight_bytes"] for layer in layers)


def test_terms_that_a_device_has_are_found_and_lower_the_error() -> None:
    networks = measured(Fit(1e-5, 1.2, 0, 0, 0, 0, terms={"weight_bytes": 2e-10, DEPTHWISE.family: 0.9}))
    line, found = (fit_networks(networks[::2], networks[1::2], penalties=tried) for tried in ((), PENALTIES))
    assert line is not None and found is not None  # noqa: PT018
    assert line.terms == {}
    assert min(found.terms.values()) > 0
    assert found.mean_error < 0.01 < line.mean_error


def test_terms_that_do_not_help_are_left_out() -> None:
    networks = measured(Fit(1e-5, 1.2, 0, 0, 0, 0))
    fit = fit_networks(networks[::2], networks[1::2])
    assert fit is not None
    assert fit.terms == {}
    assert (fit.overhead, fit.slope) == (pytest.approx(1e-5, rel=0.2), pytest.approx(1.2, rel=0.02))


def test_a_percentile_costs_beyond_the_median_what_its_runs_take_and_never_less() -> None:
    networks = measured(Fit(1e-5, 1.2, 0, 0, 0, 0))
    median = fit_networks(networks[::2], networks[1::2])
    assert median is not None
    least = min(seconds for _, seconds in networks)
    slow = [(parts, least + 1.1 * seconds) for parts, seconds in networks]
    tail = fit_percentile(median, slow[::2], slow[1::2])
    assert tail is not None
    assert tail.overhead - median.overhead == pytest.approx(least, rel=0.1)
    assert tail.slope == pytest.approx(1.1 * median.slope, rel=0.02)
    assert tail.mean_error < 0.01
    lower = fit_percentile(median, [(parts, 0.8 * seconds) for parts, seconds in networks[::2]], networks[1::2])
    assert lower is not None
    assert (lower.overhead, lower.slope, lower.terms) == (median.overhead, median.slope, median.terms)
    assert fit_percentile(median, [], []) is None


def test_a_model_with_terms_equals_the_table_to_the_last_bit_and_has_a_digest_of_its_own() -> None:
    prices = table()
    plain = LatencyModel(prices, SPACE)
    prices.fits[SPACE.key] = Fit(1e-5, 1.1, 0, 0, 0, 0, terms=dict.fromkeys(BYTES, 1e-9) | {DEPTHWISE.family: 0.3})
    model = LatencyModel(prices, SPACE)
    channels = [channels for channels, _ in calibration_networks(SPACE)]
    found = [prices.price(SPACE, one) for one in channels]
    assert model.seconds(np.array(channels)).tolist() == [price.seconds for price in found]
    assert model.digest != plain.digest
    for price in found:
        assert price.seconds == pytest.approx(price.overhead + sum(layer.seconds for layer in price.layers))


@pytest.mark.parametrize("sign", [1, -1])
def test_no_term_makes_a_network_faster(sign: int) -> None:
    """Bytes that make networks faster count nothing."""
    rng = np.random.default_rng(0)
    sums, inputs = rng.uniform(1.0, 2.0, 48), rng.uniform(0.0, 1.0, 48)
    parts = [{"linear": a, "input_bytes": b} for a, b in zip(sums.tolist(), inputs.tolist(), strict=True)]
    networks = [(one, 2 * one["linear"] + sign * one["input_bytes"]) for one in parts]
    fit = fit_networks(networks[::2], networks[1::2])
    assert fit is not None
    assert (fit.terms.get("input_bytes", 0.0) > 0.5) == (sign > 0)
    assert min([fit.slope, *fit.terms.values()]) > 0


def test_no_family_of_layers_is_free() -> None:
    """Layers that cost a network nothing are priced at half of what the others are: a search would take them all."""
    rng = np.random.default_rng(0)
    parts = [dict(zip(("linear", "conv", "depthwise"), rng.uniform(1, 2, 3).tolist(), strict=True)) for _ in range(48)]
    networks = [(one, one["linear"] + one["depthwise"]) for one in parts]
    fit = fit_networks(networks[::2], networks[1::2])
    assert fit is not None
    slopes = {name: fit.slope + fit.terms.get(name, 0.0) for name in parts[0]}
    assert min(slopes, key=lambda name: slopes[name]) == "conv"
    assert slopes["conv"] == fit.slope > 0.25 * max(slopes.values())
