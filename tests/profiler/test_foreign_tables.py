"""What is taken of a table in the format of ProxylessNAS, and what is said of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from latency_profiler.errors import InvalidInput
from latency_profiler.foreign_tables import is_foreign, read_foreign
from latency_profiler.spaces.registry import get_space

SAMPLE = json.loads((Path(__file__).parent / "proxylessnas_table.json").read_text())
STEM = "Conv-input:224x224x3-output:112x112x32"


def test_single_layers_are_those_of_a_network_here() -> None:
    space = get_space("mobilenet_v2", 224, 1.0, 1000, free_last=True)
    channels = list(space.channels(space.largest))
    channels[0], channels[7], channels[-1] = 32, 320, 1280
    layers = space.layers(channels)
    foreign = read_foreign("phone", "sample", SAMPLE)
    assert list(foreign.table.entries) == [layers[0].key, layers[-3].key]
    assert [(one.seconds, one.count) for one in foreign.table.entries.values()] == [(0.0019375, 12), (0.002125, 12)]
    assert (foreign.table.device, foreign.table.fingerprint) == ("phone", "sample")


def test_blocks_are_listed_with_the_reason() -> None:
    skipped = read_foreign("phone", "sample", SAMPLE).skipped
    assert list(skipped) == list(SAMPLE)[2:]
    assert ["linear" in why for why in skipped.values()] == [True, False, False, False]
    assert ["expansion" in why for why in skipped.values()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("Conv-input:224x224x3-output:112x112", {"mean": 1.0}, "height x width"),
        ("Conv-input:0x0x3-output:112x112x32", {"mean": 1.0}, "height x width"),
        ("Conv-input:224x192x3-output:112x96x32", {"mean": 1.0}, "square"),
        ("Conv-input:224x224x3-output:100x100x32", {"mean": 1.0}, "no stride"),
        ("Conv_1-input:7x7x320-output:8x8x1280", {"mean": 1.0}, "no stride"),
        ("Swish-input:7x7x320-output:7x7x320", {"mean": 1.0}, "of this kind"),
        ("", {"mean": 1.0}, "of this kind"),
        ("Conv_1-input:7x7x320-output:7x7x1280", 3.0, "milliseconds"),
        ("Conv_1-input:7x7x320-output:7x7x1280", {}, "milliseconds"),
        ("Conv_1-input:7x7x320-output:7x7x1280", {"mean": float("nan")}, "milliseconds"),
        ("Conv_1-input:7x7x320-output:7x7x1280", {"mean": True}, "milliseconds"),
        ("Conv_1-input:7x7x320-output:7x7x1280", {"mean": 1.0, "count": "many"}, "measurements"),
    ],
)
def test_what_cannot_be_taken_is_said(key: str, value: Any, why: str) -> None:
    foreign = read_foreign("phone", "sample", {STEM: {"mean": 1.0}, key: value})
    assert list(foreign.skipped) == [key]
    assert why in foreign.skipped[key]
    assert len(foreign.table.entries) == 1


def test_nothing_of_use_is_an_error() -> None:
    for wrong in ({}, {"device": "x"}, [], None):
        assert not is_foreign(wrong)
        with pytest.raises(InvalidInput, match="ProxylessNAS"):
            read_foreign("phone", "sample", wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="none of the 1 keys"):
        read_foreign("phone", "sample", {"Logits-input:7x7x1280-output:1000": {"mean": 1.0}})
