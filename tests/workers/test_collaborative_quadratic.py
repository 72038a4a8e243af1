from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.pruners.quadratic import Floats, Quadratic, choose, relax, split, swap

FEW = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def correlated(seed: int, c: int, rank: int | None = None) -> Quadratic:
    """u and S of channels that share some causes, as a Gram matrix of `rank` rows."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(rank or 2 * c, c)) + random.normal(size=(rank or 2 * c, 1)) * random.normal(size=c)
    return Quadratic(0.3 * random.normal(size=c), rows.T @ rows / len(rows))


def mask(c: int, kept: tuple[int, ...]) -> Floats:
    ones = np.zeros(c)
    ones[list(kept)] = 1.0
    return ones


def best(quadratic: Quadratic, count: int) -> float:
    """By looking at every choice."""
    c = len(quadratic.u)
    return min(quadratic.change(mask(c, kept)) for kept in combinations(range(c), count))


@FEW
@given(seeds, st.integers(1, 12))
def test_the_problem_is_that_of_a_graph_that_loses_nodes_and_edges(seed: int, c: int) -> None:
    """Invariant 3, up to the loss of removing everything."""
    q = correlated(seed, c)
    random = np.random.default_rng(seed)
    nodes, edges = q.u - q.s.sum(1) + np.diag(q.s) / 2, np.triu(q.s, 1)
    for kept in random.integers(0, 2, (5, c)).astype(float):
        assert q.change(kept) == pytest.approx(nodes @ kept + kept @ edges @ kept + q.change(np.zeros(c)), abs=1e-9)


@FEW
@given(seeds, st.data())
def test_rounded_and_swapped_lie_between_optimum_and_nothing_better(seed: int, data: st.DataObject) -> None:
    """Invariants 6 and 9."""
    c = data.draw(st.integers(2, 10))
    count = data.draw(st.integers(1, c - 1))
    q = correlated(seed, c, rank=data.draw(st.sampled_from([None, 1, 3])))
    choice, optimum, slack = choose(q, count), best(q, count), 1e-7 * q.scale
    assert choice.relaxed - slack <= optimum <= choice.change + 1e-12 <= choice.rounded + 2e-12
    assert choice.change == pytest.approx(q.change(mask(c, choice.kept)), abs=1e-12)
    assert len(choice.kept) == len(set(choice.kept)) == count
    assert list(choice.kept) == sorted(choice.kept)


def test_swaps_find_the_optimum_where_rounding_and_the_diagonal_miss_it() -> None:
    """Invariant 6 in numbers: how often each is optimal, of 100 problems."""
    problems = [(correlated(seed, 10), 5) for seed in range(100)]
    rounded = swapped = diagonal = 0
    for q, count in problems:
        choice, optimum = choose(q, count), best(q, count) + 1e-9
        rounded += choice.rounded <= optimum
        swapped += choice.change <= optimum
        diagonal += q.change(mask(10, choose(q.diagonal(), count).kept)) <= optimum
    assert diagonal < rounded < swapped
    assert swapped >= 95


@FEW
@given(seeds, st.integers(2, 40))
def test_without_joint_effects_the_cheapest_channels_go(seed: int, c: int) -> None:
    """Invariant 7."""
    q, count = correlated(seed, c).diagonal(), max(1, c // 3)
    cost = np.diag(q.s) / 2 - q.u
    assert choose(q, count).kept == tuple(sorted(np.argsort(-cost, kind="stable")[:count].tolist()))
    linear = Quadratic(q.u, np.zeros_like(q.s))
    assert choose(linear, count).kept == tuple(sorted(np.argsort(q.u, kind="stable")[:count].tolist()))


def test_of_two_channels_that_do_the_same_one_stays() -> None:
    """Invariant 8: each alone is the cheapest to remove, but both together cost four times as much as one."""
    s = np.diag([0.9, 0.9, 1.0, 1.0])
    s[0, 1] = s[1, 0] = 0.9
    twins = Quadratic(np.zeros(4), s)
    assert twins.change(mask(4, (2, 3))) == pytest.approx(4 * twins.change(mask(4, (1, 2, 3))))
    assert choose(twins.diagonal(), 2).kept == (2, 3)
    kept = choose(twins, 2).kept
    assert len({0, 1} & set(kept)) == 1
    assert twins.change(mask(4, kept)) == pytest.approx(best(twins, 2))


@pytest.mark.parametrize("c", [1, 2, 16, 64, 128])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_relaxation_is_feasible_and_optimal(c: int, rank: int | None) -> None:
    """Invariant 9: 0 <= b <= 1, sum b = p, and a multiplier that fits all channels; the same again."""
    q, count = correlated(c, c, rank), max(1, c // 2)
    found = relax([q], np.ones(c), count)
    b = found.kept
    assert abs(b.sum() - count) < 1e-9
    assert (b >= 0).all()
    assert (b <= 1).all()
    gradient = q.gradient(b) / q.scale
    if 0 < count < c:
        inside = (b > 1e-5) & (b < 1 - 1e-5)
        level = np.median(gradient[inside]) if inside.any() else (gradient[b > 0.5].max() + gradient[b < 0.5].min()) / 2
        assert (np.abs(gradient - level)[inside] < 1e-5).all()
        assert (gradient[b > 1 - 1e-5] < level + 1e-5).all()
        assert (gradient[b < 1e-5] > level - 1e-5).all()
    assert -1e-9 <= found.gap / q.scale < 1e-6
    assert found.iterations < 20
    assert (relax([q], np.ones(c), count).kept == b).all()


@FEW
@given(seeds, st.integers(2, 12))
def test_swaps_only_ever_gain(seed: int, c: int) -> None:
    q, random = correlated(seed, c), np.random.default_rng(seed)
    start = mask(c, tuple(random.permutation(c)[: c // 2]))
    after, swaps = swap(q, start)
    assert after.sum() == start.sum()
    assert (q.change(after) < q.change(start)) == (swaps > 0)
    again, more = swap(q, after)
    assert more == 0
    assert (again == after).all()


@FEW
@given(seeds, st.integers(2, 12))
def test_the_order_of_channels_means_nothing(seed: int, c: int) -> None:
    """Invariant 2, of the solver."""
    q, count = correlated(seed, c), max(1, c // 2)
    order = np.random.default_rng(seed).permutation(c)
    moved = choose(Quadratic(q.u[order], q.s[np.ix_(order, order)]), count)
    assert moved.change == pytest.approx(choose(q, count).change, rel=1e-6, abs=1e-9)
    assert set(order[list(moved.kept)].tolist()) == set(choose(q, count).kept)


def test_ties_keep_the_first_channels_and_dead_ones_go_first() -> None:
    assert choose(Quadratic(np.zeros(6), np.eye(6)), 4).kept == (0, 1, 2, 3)
    assert choose(Quadratic(np.zeros(6), np.zeros((6, 6))), 2).kept == (0, 1)
    assert choose(Quadratic(np.zeros(6), np.diag([0.0, 1, 0, 1, 1, 1])), 4).kept == (1, 3, 4, 5)
    everything = choose(correlated(0, 5), 5)
    assert everything.kept == (0, 1, 2, 3, 4)
    assert everything.change == everything.relaxed == 0.0


def test_scaling_the_loss() -> None:
    """Invariant 11: a curvature that grows as the loss does leaves the choice; an empirical Fisher matrix may not."""
    q = Quadratic(np.array([-1.0, 0.0]), np.diag([1.0, 2.5]))
    assert choose(q, 1).kept == choose(Quadratic(10 * q.u, 10 * q.s), 1).kept == (0,)
    assert choose(Quadratic(10 * q.u, 100 * q.s), 1).kept == (1,)


@FEW
@given(seeds, st.floats(0.2, 0.9))
def test_several_parts_share_one_knapsack(seed: int, share: float) -> None:
    """At the optimum what a cost buys is the same in every part; a part alone at what it got gets no better."""
    parts = [correlated(seed, 5), correlated(seed + 1, 8), correlated(seed + 2, 3)]
    costs = np.repeat(np.random.default_rng(seed).uniform(0.1, 3.0, 3), [5, 8, 3])
    found = relax(parts, costs, share * costs.sum())
    assert found.kept @ costs == pytest.approx(share * costs.sum(), rel=1e-9)
    scale = max(part.scale for part in parts)
    assert -1e-9 <= found.gap / scale < 1e-5
    for part, kept in zip(parts, split(found.kept, parts), strict=True):
        if 1e-3 < kept.sum() < len(kept) - 1e-3:
            alone = relax([part], np.ones(len(kept)), float(kept.sum()))
            assert part.change(kept) == pytest.approx(part.change(alone.kept), abs=1e-5 * scale)
