"""A winner's first measurement leaves room for the next one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from latency_profiler.cost import Constraint, Metric
from latency_profiler.spaces.registry import get_space
from workers.budget import Budget
from workers.steps.context import Context, search_margins
from workers.steps.measuring import off
from workers.steps.searching import _has_room

CONTEXT = cast("Context", SimpleNamespace(constraints=[Constraint(Metric.LATENCY, 1e-3, device="bench")]))


@pytest.mark.parametrize(("seconds", "broken"), [(0.97e-3, False), (0.99e-3, True), (1.01e-3, True)])
def test_a_measurement_must_hold_the_budget_with_its_noise(seconds: float, broken: bool) -> None:
    noisy: dict[str, Any] = off(CONTEXT, {"bench": seconds}, noise={"bench": 0.02})
    assert noisy == ({"bench": 1e-3} if broken else {})


@pytest.mark.parametrize(("seconds", "broken"), [(0.99e-3, False), (1.01e-3, True)])
def test_without_noise_the_budget_itself_decides(seconds: float, broken: bool) -> None:
    assert off(CONTEXT, {"bench": seconds}) == ({"bench": 1e-3} if broken else {})


SPACE = get_space("mobilenet_v1", 8, 0.25, 10, free_last=True)


@pytest.mark.parametrize(("most", "room"), [(1e5, True), (1e12, True), (1.0, False)])
def test_a_shy_winner_is_searched_past_only_where_something_may_be_found(most: float, room: bool) -> None:
    """Where corrections have left nothing within the budget, the winner that holds it is what there is."""

    def search_budget(memory: dict[str, Any]) -> Budget:
        return Budget(SPACE, [Constraint(Metric.FLOPS, memory["most"])], {}, {}, least_share=0.95)

    context = cast("Context", SimpleNamespace(spec=SimpleNamespace(seed=0), search_budget=search_budget))
    assert _has_room(context, {"most": most}) is room


def test_a_search_keeps_free_of_a_sounded_latency_only_what_measurements_differ_by() -> None:
    memory = {"margins": {"a": 0.08, "b": 0.05}, "noise": {"a": 0.02, "b": 0.01}, "corrections": {"a": 0.97}}
    assert search_margins(memory) == {"a": 0.02, "b": 0.05}
