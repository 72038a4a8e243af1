"""What a table shows of a device."""

from dataclasses import replace

import pytest

from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.lookup_table import Entry, LatencyTable
from latency_profiler.survey import SLOWEST, Covered, Slow, survey

CONV = Layer(Op.CONV, 10, 20, 8, 3, 1, 1, Activation.RELU, norm=True)
POOL = Layer(Op.GLOBAL_POOL, 20, 20, 8, 8, 8)


def test_a_survey_counts_what_is_there() -> None:
    layers = [replace(CONV, c_in=width) for width in range(1, 31)]
    entries = [Entry(layer, 1e-5 * layer.c_in) for layer in layers] + [Entry(POOL, 1e-6)]
    seen = survey(LatencyTable("bench", "f", {one.layer.key: one for one in entries}))
    assert len(seen.slowest) == SLOWEST
    assert seen.slowest[0] == Slow(layers[-1].key, pytest.approx(0.3))
    conv, pool = seen.operators
    assert (conv.op, conv.layers, pool.op, pool.ms_per_multiply_add) == (Op.CONV, 30, Op.GLOBAL_POOL, None)
    assert conv.ms_per_multiply_add == pytest.approx(0.01 / (20 * 64 * 9))
    assert seen.coverage == (Covered(CONV.family, 30, (1, 30), (20, 20)), Covered(POOL.family, 1, (20, 20), (20, 20)))


def test_an_empty_table_shows_nothing() -> None:
    seen = survey(LatencyTable("bench", "f"))
    assert (seen.slowest, seen.operators, seen.coverage) == ((), (), ())
