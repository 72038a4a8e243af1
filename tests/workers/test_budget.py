from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_profiler.cost import Constraint, Metric, flops, layer_flops, parameters
from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.layers import Layer
from latency_profiler.lookup_table import Entry, LatencyModel, LatencyTable
from latency_profiler.planning import plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from service.submission import check_feasible
from workers.budget import Budget
from workers.sampling import LEAST_WIDTH, Genes, least_choices, numpy_generator, sample

SPACE = get_space("mobilenet_v1", 32, 0.5, 10, free_last=True)
FULL = flops(SPACE.layers(SPACE.channels(SPACE.largest)))


def table_of(space: Space, per_flop: float = 1e-9) -> LatencyTable:
    table = LatencyTable("d", "f")
    for layer in plan_layers(space, 6):
        table.add(Entry(layer, per_flop * (layer_flops(layer) + 500 * layer.c_out)))
    return table


@pytest.mark.parametrize("share", [1 / 30, 1 / 8, 1 / 4, 1 / 2, 0.95])
def test_every_sampled_structure_uses_the_budget_and_keeps_it(share: float) -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, share * FULL)], {}, {}, least_share=0.97)
    found = budget.sample(50, numpy_generator(1, "test"))
    counted = [flops(SPACE.layers(SPACE.channels(encoding))) for encoding in found.tolist()]
    assert len(found) == 50
    assert all(0.97 * share * FULL <= count <= share * FULL for count in counted)
    assert len(set(map(tuple, found.tolist()))) > 25
    assert (found.std(axis=0) > (1 if share > 0.1 else 0.8)).all()  # hardly anything is wide enough at 1/30


def test_sampling_depends_on_its_generator_only() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 8)], {}, {}, least_share=0.9)
    first, second = (budget.sample(20, numpy_generator(3, "draw", 7)) for _ in range(2))
    other = budget.sample(20, numpy_generator(4, "draw", 7))
    assert (first == second).all()
    assert not (first == other).all()


@pytest.mark.parametrize("share", [1 / 8, 1 / 2])
def test_no_layer_of_a_random_structure_is_nearly_empty(share: float) -> None:
    space = get_space("mobilenet_v2", 32, 0.5, 10, free_last=True)
    full = flops(space.layers(space.channels(space.largest)))
    budget = Budget(space, [Constraint(Metric.FLOPS, share * full)], {}, {}, least_share=0.97)
    channels = budget.channels(budget.sample(64, numpy_generator(2, "least")))
    assert len(channels) == 64
    assert channels.min() == LEAST_WIDTH


def test_layers_are_widened_where_hardly_anything_that_is_drawn_has_enough_channels() -> None:
    space = get_space("mobilenet_v2", 32, 0.5, 10, free_last=True)
    least = flops(space.layers(space.channels(least_choices(np.array(space.choices)).tolist())))
    budget = Budget(space, [Constraint(Metric.FLOPS, 1.1 * least)], {}, {}, least_share=0.97)
    channels = budget.channels(budget.sample(64, numpy_generator(2, "scarce")))
    assert len(channels) == 64
    assert channels.min() == LEAST_WIDTH
    assert len(np.unique(channels, axis=0)) > 50


def test_published_candidates_have_uniform_genes_where_such_are_feasible() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 3)], {}, {}, fills=False)
    found = budget.sample(200, numpy_generator(5, "uniform"))
    assert int(budget.feasible(found).sum()) == 200
    assert np.median(budget.tightness(found)) > 0.8, "most of what is feasible is hardly so"
    assert len(set(found[:, 0].tolist())) > len(set(SPACE.choices[0])), "also those that give equal widths"
    tight = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 30)], {}, {}, fills=False)
    assert len(tight.sample(20, numpy_generator(5, "uniform"))) == 20, "as others are drawn"
    scarce = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 9)], {}, {}, fills=False)
    uniform = scarce._drawn_uniformly(200, numpy_generator(5, "uniform"))
    found = scarce.sample(200, numpy_generator(5, "uniform"))
    assert 10 < len(uniform) < 100
    assert found[: len(uniform)].tolist() == uniform.tolist(), "those that there are come first"
    assert int(scarce.feasible(found).sum()) == 200


def test_published_genes_of_resnet50_are_drawn_from_the_middle() -> None:
    space = get_space("resnet50", 32, 0.25, 10, free_last=False)
    full = flops(space.layers(space.channels(space.largest)))
    budget = Budget(space, [Constraint(Metric.FLOPS, 0.5 * full, 0.47 * full)], {}, {}, fills=False)
    found = budget.sample(50, numpy_generator(5, "uniform"))
    assert (len(found), found.min(), found.max()) == (50, 12, 23)


def test_a_budget_below_the_least_widths_is_sampled_all_the_same() -> None:
    smallest = flops(SPACE.layers(SPACE.channels(SPACE.smallest)))
    least = flops(SPACE.layers(SPACE.channels(least_choices(np.array(SPACE.choices)).tolist())))
    tight = Budget(SPACE, [Constraint(Metric.FLOPS, (smallest + least) / 2)], {}, {})
    assert smallest < least
    assert len(tight.sample(8, numpy_generator(0, "tight"))) > 0


def test_a_margin_that_leaves_nothing_of_a_range_is_infeasible() -> None:
    table = table_of(SPACE)
    seconds = table.price(SPACE, SPACE.channels([15] * 14)).seconds
    with pytest.raises(InfeasibleConstraint):
        Budget(SPACE, [Constraint(Metric.LATENCY, seconds, 1.01 * seconds, "d")], {"d": table}, {})


def test_sampling_an_empty_band_ends() -> None:
    def cost(genes: np.ndarray) -> np.ndarray:
        return np.where(genes.sum(axis=1) > 15, 2.0, 0.0)

    assert len(sample(cost, 0.9, 1.1, [0.0] * 13, 10, numpy_generator(0))) == 0


def test_several_constraints_hold_at_once_and_the_tightest_is_used() -> None:
    table = table_of(SPACE)
    seconds = table.price(SPACE, SPACE.channels([15] * 14)).seconds
    bounds = [Constraint(Metric.FLOPS, 3e6), Constraint(Metric.LATENCY, 0.9 * seconds, 0.0, "d")]
    budget = Budget(SPACE, bounds, {"d": table}, {}, least_share=0.95)
    found = budget.sample(30, numpy_generator(0, "both"))
    costs = budget.costs(found)
    assert len(found) == 30
    assert (costs.flops <= 3e6).all()
    assert (costs.seconds["d"] <= 0.9 * seconds).all()
    assert (np.maximum(costs.flops / 3e6, costs.seconds["d"] / (0.9 * seconds)) >= 0.95).all()


def test_a_correction_scales_predictions() -> None:
    table, encodings = table_of(SPACE), np.array([SPACE.largest, SPACE.smallest])
    plain = Budget(SPACE, [Constraint(Metric.FLOPS, FULL)], {"d": table}, {})
    corrected = Budget(SPACE, [Constraint(Metric.FLOPS, FULL)], {"d": table}, {"d": 1.25})
    assert corrected.costs(encodings).seconds["d"] == pytest.approx(1.25 * plain.costs(encodings).seconds["d"])
    channels = SPACE.channels(SPACE.largest)
    assert corrected.predict(channels)["d"] == pytest.approx(1.25 * table.price(SPACE, channels).seconds)


@pytest.mark.parametrize(
    ("constraint", "smallest"),
    [
        (Constraint(Metric.FLOPS, 1000), flops(SPACE.layers(SPACE.channels(SPACE.smallest)))),
        (Constraint(Metric.PARAMETERS, 10), None),
        (
            Constraint(Metric.LATENCY, 1e-9, 0.0, "d"),
            1000 * table_of(SPACE).price(SPACE, SPACE.channels(SPACE.smallest)).seconds,
        ),
    ],
)
def test_infeasible_budgets_are_refused_with_the_range(constraint: Constraint, smallest: float | None) -> None:
    with pytest.raises(InfeasibleConstraint) as refused:
        Budget(SPACE, [constraint], {"d": table_of(SPACE)}, {})
    unit = 1000 if constraint.metric is Metric.LATENCY else 1
    assert refused.value.asked == pytest.approx(unit * constraint.maximum)
    assert refused.value.smallest > refused.value.asked
    if smallest is not None:
        assert refused.value.smallest == pytest.approx(smallest)


def test_a_lower_bound_above_the_largest_structure_is_refused() -> None:
    with pytest.raises(InfeasibleConstraint):
        Budget(SPACE, [Constraint(Metric.FLOPS, 10 * FULL, 2 * FULL)], {}, {})


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.03, 1.0))
def test_the_uniform_network_is_the_largest_within_the_budget(share: float) -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, share * FULL)], {}, {})
    uniform = budget.uniform()
    ratio = max(width / slot.base for width, slot in zip(uniform, SPACE.slots, strict=True))
    assert flops(SPACE.layers(uniform)) <= share * FULL
    following = next((c for r in range(1, 600) if (c := SPACE.uniform(ratio + r / 512)) != uniform), None)
    if following is not None and ratio < 1:
        assert flops(SPACE.layers(following)) > share * FULL


def test_the_uniform_network_may_be_the_smallest_structure() -> None:
    space = get_space("resnet20", 32, 0.5, 10, free_last=True)
    smallest = space.channels(space.smallest)  # no width is a tenth of its base, rounded down as they are
    assert Budget(space, [Constraint(Metric.FLOPS, flops(space.layers(smallest)))], {}, {}).uniform() == smallest


def test_a_loose_budget_leaves_only_near_full_structures_and_still_samples() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, 10 * FULL)], {}, {}, least_share=0.9)
    found = budget.sample(10, numpy_generator(0, "loose"))
    assert len(found) == 10
    assert (budget.costs(found).flops >= 0.9 * FULL).all()


@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 1 / 2])
def test_samples_cover_the_genes_and_do_not_collapse(share: float) -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, share * FULL)], {}, {}, least_share=0.97)
    found = budget.sample(1000, numpy_generator(2, "coverage"))
    assert len(set(map(tuple, found.tolist()))) > 950
    widths = budget.channels(found) / budget.channels(np.array([SPACE.largest]))
    assert (widths.std(axis=0) > 0.1).all()
    for gene, choices in enumerate(SPACE.choices):
        assert len(np.unique(found[:, gene])) > 0.54 * len(set(choices))
        assert np.unique(found[:, gene], return_counts=True)[1].max() < 0.4 * len(found)
    differ = (found[:200, None] != found[None, :200]).mean()
    assert differ > 0.85
    correlations = np.corrcoef(found.T) - np.eye(found.shape[1])
    assert np.abs(correlations).max() < 0.85  # neighbours in depth are alike


def test_samples_hold_structures_that_are_wide_early_and_such_that_are_wide_late() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 8)], {}, {}, least_share=0.97)
    found = budget.sample(500, numpy_generator(2, "profiles"))
    half = found.shape[1] // 2
    lead = found[:, :half].mean(axis=1) - found[:, half:].mean(axis=1)
    assert (lead > 6).mean() > 0.1
    assert (lead < -6).mean() > 0.08
    assert (np.abs(lead) < 2).mean() > 0.1


def test_repair_brings_structures_into_the_budget_and_changes_little() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 8)], {}, {}, least_share=0.97)
    found = budget.sample(200, numpy_generator(3, "repair"))
    assert (budget.repair(found, numpy_generator(0)) == found).all()
    mutated = found.copy()
    mutated[:, 5] = (mutated[:, 5] + 6) % 31
    repaired = budget.repair(mutated, numpy_generator(0))
    assert budget.feasible(mutated).mean() < 0.5
    assert budget.feasible(repaired).mean() > 0.65
    assert np.abs(repaired - mutated).mean() < 2
    assert (repaired == budget.repair(mutated, numpy_generator(0))).all()


def test_equal_widths_are_sampled_as_one_encoding() -> None:
    narrow = get_space("mobilenet_v1", 8, 0.1, 10, free_last=True)
    budget = Budget(narrow, [Constraint(Metric.FLOPS, 20_000)], {}, {})
    found = budget.sample(100, numpy_generator(0)).tolist()
    assert all(narrow.encoding(narrow.channels(one)) == tuple(one) for one in found)


def test_everything_is_what_a_full_enumeration_finds() -> None:
    narrow = get_space("mobilenet_v1", 8, 0.1, 10, free_last=True)
    smallest = flops(narrow.layers(narrow.channels(narrow.smallest)))
    bounds = [Constraint(Metric.FLOPS, 1.02 * smallest, 1.005 * smallest), Constraint(Metric.PARAMETERS, 1e6)]
    budget = Budget(narrow, bounds, {}, {})
    everything = budget.everything(1000)
    assert everything is not None
    firsts = [sorted({widths.index(width) for width in widths})[:4] for widths in narrow.choices]
    grid = np.array(list(product(*(choices if len(choices) < 4 else choices[:2] for choices in firsts))))
    expected = set(map(tuple, grid[budget.feasible(grid)].tolist()))
    assert budget.feasible(everything).all()
    assert len(set(map(tuple, everything.tolist()))) == len(everything) > 10
    assert expected <= set(map(tuple, everything.tolist()))
    assert len(expected) > 10
    assert budget.everything(len(everything)) is not None
    assert budget.everything(len(everything) - 1) is None


def test_a_space_that_is_not_small_is_given_up_at_once() -> None:
    for least in (0.0, 0.97):
        assert Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 8)], {}, {}, least).everything(1000) is None


def test_uniform_networks_at_shares_of_the_budget() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 2)], {}, {})
    counts = [flops(SPACE.layers(budget.uniform(of))) for of in (0.0, 0.25, 0.5, 1.0)]
    assert counts == sorted(set(counts))
    assert all(count <= of * FULL / 2 for count, of in zip(counts[1:], (0.25, 0.5, 1.0), strict=True))
    assert budget.uniform(1.0) == budget.uniform()


@pytest.mark.parametrize("drawing", [True, False])
@pytest.mark.parametrize(("share", "empty"), [(1.0, False), (0.2, True)])
def test_a_budget_is_empty_where_nothing_is_drawn_and_nothing_enumerated(
    drawing: bool, share: float, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many multiply-adds need more than a fifth of the parameters."""
    space = get_space("lenet_300_100", 8, 0.1, 10, free_last=True)
    whole = space.layers(space.channels(space.largest))
    wide = Constraint(Metric.FLOPS, flops(whole), 0.9 * flops(whole))
    budget = Budget(space, [wide, Constraint(Metric.PARAMETERS, share * parameters(whole))], {}, {})
    monkeypatch.setattr("workers.budget.DRAWN", 10)
    assert (budget.everything(10) is None) is not empty, "more than are drawn at a time"
    if not drawing:
        monkeypatch.setattr(budget, "sample", lambda count, rng: np.empty((0, len(space.genes)), dtype=np.int64))
    assert budget.empty(0) is empty


def odd(space: Space) -> LatencyTable:
    """Widths that are no multiple of 8 take ten times as long there, as with some runtimes' depthwise kernels."""

    def seconds(layer: Layer) -> float:
        return 1e-6 * (layer.c_out + 10) * (10 if layer.c_out % 8 else 1)

    return LatencyTable("odd", "f" * 64, {layer.key: Entry(layer, seconds(layer)) for layer in plan_layers(space)})


def of_odd(share: float, fills: bool = True) -> Budget:
    """A share of the whole network's milliseconds on such a device."""
    table = odd(SPACE)
    whole = table.price(SPACE, SPACE.channels(SPACE.largest)).seconds
    return Budget(SPACE, [Constraint(Metric.LATENCY, share * whole, device="odd")], {"odd": table}, {}, 0.97, fills)


@pytest.mark.parametrize("fills", [True, False])
def test_bounds_that_no_structure_of_the_ladder_holds_together_are_searched_all_the_same(fills: bool) -> None:
    """What is fast there is wide, and what has few multiply-adds is slow: each bound alone can be held."""
    table, model = odd(SPACE), LatencyModel(odd(SPACE), SPACE)
    fastest = table.price(SPACE, SPACE.channels(model.fastest)).seconds
    fewest = flops(SPACE.layers(SPACE.channels(SPACE.smallest)))
    bounds = [Constraint(Metric.FLOPS, 1.05 * fewest), Constraint(Metric.LATENCY, 1.02 * fastest, device="odd")]
    budget = Budget(SPACE, bounds, {"odd": table}, {}, fills=fills)
    assert budget.tightness(np.array(SPACE.ladder)).min() > 1
    assert len(budget.sample(4, numpy_generator(0, "joint"))) == 0


def test_bounds_on_two_devices_that_contradict_each_other_are_answered_after_some_hundred_structures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one device wide layers are slow, on the other narrow ones; structures were looked for for an hour."""
    wide, filled = table_of(SPACE), list[int]()
    narrow = LatencyTable(
        "n", "f", {key: replace(one, seconds=1e-3 / one.layer.c_in) for key, one in wide.entries.items()}
    )
    tables = {"d": wide, "n": narrow}
    least = {
        name: table.price(SPACE, SPACE.channels(LatencyModel(table, SPACE).fastest)).seconds
        for name, table in tables.items()
    }

    def within(times: float) -> Budget:
        return Budget(
            SPACE, [Constraint(Metric.LATENCY, times * least[name], device=name) for name in tables], tables, {}
        )

    def counted(self: Budget, genes: Genes, rng: np.random.Generator) -> Genes:
        filled.append(len(genes))
        return genes

    assert not within(20).empty(0)
    monkeypatch.setattr(Budget, "_filled", counted)
    assert within(1.05).empty(0)
    assert 300 < sum(filled) < 1000


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_within_milliseconds_structures_are_as_wide_as_is_free(share: float) -> None:
    filled, plain = of_odd(share), of_odd(share, fills=False)
    wide = filled.sample(64, numpy_generator(0, "free"))
    narrow = np.concatenate([plain.sample(256, numpy_generator(seed, "free")) for seed in range(4)])
    assert len(wide) >= 40
    assert len(narrow), "hardly anything that is not filled is fast enough: of a half only one in so many draws"
    assert filled.feasible(wide).all()
    assert np.median(filled.costs(wide).flops) > 2 * np.median(plain.costs(narrow).flops)
    tightness = filled.tightness(wide)
    assert (tightness <= 1).all()
    for gene in range(wide.shape[1]):  # none can be wider and no slower
        for choice in range(31):
            wider = wide.copy()
            wider[:, gene] = np.maximum(wide[:, gene], choice)
            changed = (wider != wide).any(axis=1)
            assert (filled.tightness(wider)[changed] > 0.9 * tightness[changed]).all()
    assert len(np.unique(wide, axis=0)) > 0.6 * len(wide), "and they are not all the same"
    assert filled.sample(64, numpy_generator(0, "free")).tolist() == wide.tolist()


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet20"])
def test_hardly_any_filled_structure_is_refused(name: str) -> None:
    """Filled ones may stay below the asked share of the budget: nothing in them can be wider."""
    space = get_space(name, 32, 0.5, 10, free_last=True)
    table = odd(space)
    whole = table.price(space, space.channels(space.largest)).seconds
    bound = Constraint(Metric.LATENCY, 0.9 * whole, device="odd")
    budget = Budget(space, [bound], {"odd": table}, {}, 0.97)
    random = numpy_generator(0).integers(0, 31, (100, len(space.genes)))
    assert budget.feasible(budget.repair(random, numpy_generator(1))).mean() > 0.9
    assert len(budget.sample(50, numpy_generator(2))) == 50


def test_a_range_of_milliseconds_keeps_its_cheap_end() -> None:
    table = table_of(SPACE)
    whole = table.price(SPACE, SPACE.channels(SPACE.largest)).seconds
    bound = Constraint(Metric.LATENCY, whole, 0.3 * whole, device="d")
    budget = Budget(SPACE, [bound], {"d": table}, {})
    low, middle, high = np.quantile(budget.tightness(budget.sample(200, numpy_generator(0))), (0.1, 0.5, 0.9))
    assert low < 0.45
    assert 0.5 < middle < 0.8
    assert high > 0.85


def test_filling_never_narrows_a_gene_that_is_within_the_budget() -> None:
    budget = of_odd(0.7)
    drawn = budget.sample(32, numpy_generator(3))
    again = budget.repair(drawn, numpy_generator(4))
    assert (again >= drawn).all(axis=1).mean() > 0.9
    assert (budget.costs(again).flops >= budget.costs(drawn).flops).mean() > 0.9


def test_multiply_adds_leave_nothing_to_fill() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 4)], {}, {}, 0.97)
    drawn = budget.sample(50, numpy_generator(1))
    assert (budget.repair(drawn, numpy_generator(2)) == drawn).all()


def test_a_budget_that_the_whole_network_keeps_is_answered_with_it() -> None:
    budget = of_odd(1.5)
    assert budget.uniform() == SPACE.channels(SPACE.largest)
    flops_of = budget.costs(budget.sample(20, numpy_generator(0))).flops
    assert np.median(flops_of) > 0.9 * FULL


def test_the_uniform_network_of_an_odd_device_is_the_widest_that_is_fast_enough() -> None:
    budget = of_odd(0.7)
    table, [bound] = odd(SPACE), budget.constraints
    within = [
        channels
        for share in range(100, 1001)
        if table.price(SPACE, channels := SPACE.uniform(share / 1000)).seconds <= bound.maximum
    ]
    assert flops(SPACE.layers(budget.uniform())) >= max(flops(SPACE.layers(channels)) for channels in within)
    assert budget.allows(budget.uniform())


def test_all_of_a_small_space_are_found_where_wider_may_be_faster() -> None:
    small = get_space("lenet_300_100", 8, 0.1, 10, free_last=True)
    table = odd(small)
    firsts = [sorted({widths.index(width) for width in widths}) for widths in small.choices]
    grid = np.array(list(product(*firsts)))
    prices = [table.price(small, small.channels(genes)).seconds for genes in grid.tolist()]
    bound = Constraint(Metric.LATENCY, float(np.median(prices)), device="odd")
    budget = Budget(small, [bound], {"odd": table}, {})
    everything = budget.everything(1000)
    assert everything is not None
    feasible = grid[budget.feasible(grid)]
    assert sorted(everything.tolist()) == sorted(feasible.tolist())
    assert 10 < len(feasible) < len(grid)


def test_a_device_on_which_the_smallest_is_not_the_fastest_has_a_budget() -> None:
    space = SPACE
    table = odd(space)
    prices = [table.price(space, space.channels(genes)).seconds for genes in space.ladder]
    asked = (min(prices) + prices[0]) / 2
    assert min(prices) < asked < prices[0]
    bound = Constraint(Metric.LATENCY, asked, device="odd")
    check_feasible(space, bound, table)
    drawn = Budget(space, [bound], {"odd": table}, {}).sample(8, np.random.default_rng(0))
    assert len(drawn)
    assert all(table.price(space, space.channels(genes)).seconds <= asked for genes in drawn.tolist())
    fastest = table.price(space, space.channels(LatencyModel(table, space).fastest)).seconds
    assert fastest < 0.9 * min(prices), "no uniform network is as fast"
    tight = Constraint(Metric.LATENCY, 1.05 * fastest, device="odd")
    check_feasible(space, tight, table)
    assert len(Budget(space, [tight], {"odd": table}, {}).sample(8, np.random.default_rng(0)))
    for within in (
        Constraint(Metric.LATENCY, 0.99 * fastest, device="odd"),
        Constraint(Metric.LATENCY, 1e-6, device="odd"),
    ):
        with pytest.raises(InfeasibleConstraint, match="latency_ms within"):
            check_feasible(space, within, table)
        with pytest.raises(InfeasibleConstraint):
            Budget(space, [within], {"odd": table}, {})
