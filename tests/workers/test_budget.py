import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_profiler.cost import Constraint, Metric, flops, layer_flops
from latency_profiler.errors import InfeasibleConstraint
from latency_profiler.lookup_table import Entry, LatencyTable, plan_layers
from latency_profiler.spaces.registry import get_space
from latency_profiler.spaces.space import Space
from workers.budget import Budget
from workers.sampling import numpy_generator, sample

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
    assert (found.std(axis=0) > 1).all()


def test_sampling_depends_on_its_generator_only() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, FULL / 8)], {}, {}, least_share=0.9)
    first, second = (budget.sample(20, numpy_generator(3, "draw", 7)) for _ in range(2))
    other = budget.sample(20, numpy_generator(4, "draw", 7))
    assert (first == second).all()
    assert not (first == other).all()


def test_sampling_an_empty_band_ends() -> None:
    def cost(genes: np.ndarray) -> np.ndarray:
        return np.where(genes.sum(axis=1) > 15, 2.0, 0.0)

    assert len(sample(cost, 0.9, 1.1, 13, 10, numpy_generator(0))) == 0


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
            table_of(SPACE).price(SPACE, SPACE.channels(SPACE.smallest)).seconds,
        ),
    ],
)
def test_infeasible_budgets_are_refused_with_the_range(constraint: Constraint, smallest: float | None) -> None:
    with pytest.raises(InfeasibleConstraint) as refused:
        Budget(SPACE, [constraint], {"d": table_of(SPACE)}, {})
    assert refused.value.asked == constraint.maximum
    assert refused.value.smallest > constraint.maximum
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


def test_a_loose_budget_leaves_only_near_full_structures_and_still_samples() -> None:
    budget = Budget(SPACE, [Constraint(Metric.FLOPS, 10 * FULL)], {}, {}, least_share=0.9)
    found = budget.sample(10, numpy_generator(0, "loose"))
    assert len(found) == 10
    assert (budget.costs(found).flops >= 0.9 * FULL).all()
