"""What layers cost in a network: each term by its definition, and their weights found again in made-up networks."""

import numpy as np
import pytest

from latency_profiler.calibration import TERM_SETS, calibration_networks, fit_networks, parts_of
from latency_profiler.layers import Layer, Op
from latency_profiler.lookup_table import Entry, Fit, LatencyModel, LatencyTable, plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.terms import TERMS, in_network

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
    assert {name: term(layer) for name, term in TERMS.items()} == expected
    weights = dict.fromkeys(expected, 1.0)
    assert in_network(layer, 2.0, 3.0, weights) == pytest.approx(6.0 + sum(expected.values()))


def measured(fit: Fit, count: int = 48, noise: float = 0.003) -> list[tuple[tuple[float, ...], float]]:
    """Networks as a device would measure them that costs what the fit says."""
    prices, rng = table(), np.random.default_rng(1)
    channels = [channels for channels, _ in calibration_networks(SPACE, count, 1)]
    plain = [parts_of(prices, SPACE, one) for one in channels]
    prices.fits[SPACE.key] = fit
    return [
        (parts, prices.price(SPACE, one).seconds * rng.normal(1, noise))
        for parts, one in zip(plain, channels, strict=True)
    ]


def test_terms_that_a_device_has_are_found_and_lower_the_error() -> None:
    networks = measured(Fit(1e-5, 1.2, 0, 0, 0, 0, terms={"output_bytes": 3e-9}))
    line, terms = (fit_networks(networks[::2], networks[1::2], term_sets=sets) for sets in ((), TERM_SETS))
    assert line is not None and terms is not None  # noqa: PT018
    assert line.terms == {}
    assert sum(terms.terms.values()) == pytest.approx(3e-9, rel=0.2), "one layer's output is the next one's input"
    assert min(terms.terms.values()) > 0
    assert terms.mean_error < 0.01 < line.mean_error


def test_terms_that_do_not_help_are_left_out() -> None:
    networks = measured(Fit(1e-5, 1.2, 0, 0, 0, 0))
    fit = fit_networks(networks[::2], networks[1::2])
    assert fit is not None
    assert fit.terms == {}
    assert (fit.overhead, fit.slope) == (pytest.approx(1e-5, rel=0.2), pytest.approx(1.2, rel=0.02))


def test_a_model_with_terms_equals_the_table_to_the_last_bit_and_has_a_digest_of_its_own() -> None:
    prices = table()
    plain = LatencyModel(prices, SPACE)
    prices.fits[SPACE.key] = Fit(1e-5, 1.1, 0, 0, 0, 0, terms=dict.fromkeys(TERMS, 1e-9))
    model = LatencyModel(prices, SPACE)
    channels = [channels for channels, _ in calibration_networks(SPACE)]
    found = [prices.price(SPACE, one) for one in channels]
    assert model.seconds(np.array(channels)).tolist() == [price.seconds for price in found]
    assert model.digest != plain.digest
    for price in found:
        assert price.seconds == pytest.approx(price.overhead + sum(layer.seconds for layer in price.layers))


def test_no_term_makes_a_network_faster() -> None:
    """Networks that are faster the more bytes there are: the line has to do."""
    rng = np.random.default_rng(0)
    sums, inputs = rng.uniform(1.0, 2.0, 48), rng.uniform(0.0, 1.0, 48)
    rest = (0.0,) * (len(TERMS) - 1)
    for sign in (1, -1):
        networks = [((a, b, *rest), 2 * a + sign * b) for a, b in zip(sums.tolist(), inputs.tolist(), strict=True)]
        fit = fit_networks(networks[::2], networks[1::2])
        assert fit is not None
        assert (set(fit.terms), fit.slope > 0) == ({"input_bytes"} if sign > 0 else set(), True)
