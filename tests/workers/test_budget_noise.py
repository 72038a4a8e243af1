"""A winner's first measurement leaves room for the next one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from latency_profiler.cost import Constraint, Metric
from workers.steps.context import Context
from workers.steps.measuring import off

CONTEXT = cast("Context", SimpleNamespace(constraints=[Constraint(Metric.LATENCY, 1e-3, device="bench")]))


@pytest.mark.parametrize(("seconds", "broken"), [(0.97e-3, False), (0.99e-3, True), (1.01e-3, True)])
def test_a_measurement_must_hold_the_budget_with_its_noise(seconds: float, broken: bool) -> None:
    noisy: dict[str, Any] = off(CONTEXT, {"bench": seconds}, noise={"bench": 0.02})
    assert noisy == ({"bench": 1e-3} if broken else {})


@pytest.mark.parametrize(("seconds", "broken"), [(0.99e-3, False), (1.01e-3, True)])
def test_without_noise_the_budget_itself_decides(seconds: float, broken: bool) -> None:
    assert off(CONTEXT, {"bench": seconds}) == ({"bench": 1e-3} if broken else {})
