"""Invariant 7: Theorem 1's inequality, by least squares in turns from F = I."""

from fractions import Fraction
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from latency_profiler.spaces.registry import get_space
from workers.datasets import generator
from workers.pruners.allowance import largest
from workers.pruners.filter_bases import Bases, InterspaceNetwork
from workers.pruners.sparse_coding import approximations, chance_of_no_gain, errors

TINY = 1e-11


def normal(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=generator(seed, m, n))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("m", "n", "s"), [(4, 12, 7), (9, 40, 36), (9, 6, 20), (9, 200, 900), (25, 30, 100)])
def test_a_turn_never_raises_the_error_and_the_first_lowers_it(m: int, n: int, s: int, seed: int) -> None:
    u = normal(m, n, seed)
    for scores in (u.abs(), torch.rand(m, n, generator=generator(seed))):  # the largest entries, and any others
        course = errors(u, largest(scores, s), 10)
        assert course[0] == pytest.approx(float((u * ~largest(scores, s)).norm()))
        assert all(after <= before + TINY for before, after in pairwise(course))
        assert course[1] < course[0] * (1 - 1e-6)


def test_whole_columns_leave_nothing_to_gain() -> None:
    u = normal(9, 20)
    mask = torch.zeros(9, 20, dtype=torch.bool)
    mask[:, ::3] = True
    course = errors(u, mask, 5)
    assert course == pytest.approx([course[0]] * 6, rel=1e-9)
    mask[0, 1] = True  # one entry of a pruned column
    course = errors(u, mask, 5)
    assert course[1] < course[0] * (1 - 1e-6)


def test_a_basis_of_one_filter_is_a_factor() -> None:
    """Why 1x1 kernels have no basis."""
    course = errors(normal(1, 30), largest(normal(1, 30).abs(), 10), 5)
    assert course == pytest.approx([course[0]] * 6, rel=1e-9)


@pytest.mark.parametrize(("rate", "gain"), [(0.5, 4.22 / 5.69), (0.9, 12.15 / 14.20), (0.97, 16.58 / 17.79)])
def test_the_gain_is_as_large_as_was_computed_elsewhere(rate: float, gain: float) -> None:
    """Section 3 of the specification, for one normal matrix (9, 40); here means over four others."""
    drawn = [normal(9, 40, seed) for seed in range(4)]
    courses = [errors(u, largest(u.abs(), round((1 - rate) * u.numel()))) for u in drawn]
    assert sum(course[-1] / course[0] for course in courses) / 4 == pytest.approx(gain, abs=0.03)


def test_the_chance_of_no_gain_is_a_count_of_supports() -> None:
    assert chance_of_no_gain(2, 5, 4) == Fraction(1, 21)
    for m, n, s in ((2, 5, 4), (3, 3, 6), (2, 4, 3)):
        supports = list(combinations(range(m * n), s))
        whole = sum(
            all(sum(place // m == column for place in one) in (0, m) for column in range(n)) for one in supports
        )
        assert chance_of_no_gain(m, n, s) == Fraction(whole, len(supports))
    assert chance_of_no_gain(9, 64 * 64, 9 * 400) < Fraction(1, 10**300)


@pytest.mark.parametrize("bases", [Bases("fine"), Bases("medium", initialisation="orthonormal")])
def test_a_network_s_filters_gain(bases: Bases) -> None:
    space = get_space("resnet20", 8, 0.25, 4)
    network = InterspaceNetwork(space, space.uniform(1.0), 0, bases)
    found = approximations(network, 0.9, 5)
    assert [one.basis for one in found] == list(network.bases)
    assert all(one.interspace < one.standard for one in found)
    assert sum(one.filters for one in found) == sum(network.weight(i)[:, :, 0, 0].numel() for i in network.groups)
    assert all(one.kept == round(0.1 * 9 * one.filters) for one in found)
