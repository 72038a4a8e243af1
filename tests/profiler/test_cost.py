"""Counts of many structures at once, and constraints."""

import numpy as np
import pytest

from latency_profiler.cost import Constraint, CostModel, Metric, authors_flops, flops, parameters
from latency_profiler.layers import Activation, Layer, Op
from latency_profiler.spaces.registry import SPACES, get_space


@pytest.mark.parametrize("name", sorted(SPACES))
@pytest.mark.parametrize("size", [8, 32, 224])
def test_cost_model_equals_the_sum_of_layers(name: str, size: int) -> None:
    space = get_space(name, size, 0.5, 10, free_last=True)
    genes = np.random.default_rng(size).integers(0, 31, (20, len(space.genes)))
    channels = np.array([space.channels(row.tolist()) for row in genes])
    model = CostModel(space)
    layers = [space.layers(row.tolist()) for row in channels]
    assert model.flops(channels).tolist() == [flops(one) for one in layers]
    assert model.parameters(channels).tolist() == [parameters(one) for one in layers]


def test_counts_are_the_closed_formulas() -> None:
    """c_in 3, c_out 8, 5×5 kernel, stride 2, padding 2 on 7×7: the output is 4×4."""
    conv = Layer(Op.CONV, 3, 8, 7, 5, 2, 2, Activation.RELU, norm=True)
    assert conv.out_size == 4
    assert flops([conv]) == 4 * 4 * 8 * 3 * 25
    assert parameters([conv]) == 8 * 3 * 25 + 2 * 8
    depthwise = Layer(Op.DEPTHWISE, 6, 6, 9, 3, 1, 1, norm=True)
    assert flops([depthwise]) == 9 * 9 * 6 * 9
    assert parameters([depthwise]) == 6 * 9 + 2 * 6
    linear = Layer(Op.LINEAR, 12, 10, 1)
    assert (flops([linear]), parameters([linear])) == (120, 130)
    assert flops([Layer(Op.MAX_POOL, 4, 4, 8, 2, 2), Layer(Op.GLOBAL_POOL, 4, 4, 8, 8, 8)]) == 0


def test_the_authors_count_adds_what_their_hooks_see() -> None:
    """VGG's ReLU modules count and its poolings' windows, MobileNet's functional ReLUs do not."""
    vgg = get_space("vgg16", 8, 0.25, 10)
    channels = vgg.channels(vgg.largest)
    layers = vgg.layers(channels)
    elements = sum(layer.c_out * layer.out_size**2 for layer in layers if layer.norm)
    windows = sum(layer.c_out * layer.out_size**2 * 4 for layer in layers if layer.op is Op.MAX_POOL)
    assert authors_flops(vgg, channels) == flops(layers) + 10 + 2 * elements + windows


def test_constraint_holds_its_bounds() -> None:
    constraint = Constraint(Metric.FLOPS, 10, 5)
    assert [constraint.allows(value) for value in (4.9, 5, 10, 10.1)] == [False, True, True, False]
