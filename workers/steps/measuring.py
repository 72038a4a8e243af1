"""Whole networks on real devices: asked for, waited for, and held against the budget."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from latency_profiler.cost import Metric
from latency_profiler.errors import SecateursError
from service.store import devices, measurements
from service.store.models import Job
from workers.steps.context import Context

ROUNDS = 4
"""How often a measurement may send a job back to the search."""
SAFETY = 1.005
"""A corrected prediction lies this much above the measurement that corrected it."""


class BudgetBroken(SecateursError):
    """Every winner that the search found breaks its budget when it is measured.

    Attributes:
        figures: one object per device and round: budget, predicted and measured milliseconds.
    """

    def __init__(self, figures: Sequence[dict[str, Any]]) -> None:
        self.figures = list(figures)
        last = self.figures[-1]
        super().__init__(
            f"{len(self.figures)} winners in a row broke the budget when measured on {last['device']}: "
            f"the last one took {last['measured_ms']:.4g} ms, {last['max_ms']:.4g} ms are allowed"
        )


def look(
    session: Session, context: Context, names: Sequence[str], purpose: str, networks: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Structure id → device → seconds, as far as devices have measured them; what lacks is asked for.

    Args:
        purpose: keeps this measurement apart from others of the same network.
        networks: structure id → channels.

    Raises:
        MeasurementFailed: a device could not run a network.
    """
    found: dict[str, dict[str, float]] = {structure_id: {} for structure_id in networks}
    for name in names:
        device = devices.get(session, name)
        items = [(context.space, channels, purpose) for channels in networks.values()]
        keys = measurements.request_networks(session, device, items)
        for structure_id, key in zip(networks, keys, strict=True):
            seconds = measurements.network_seconds(session, device, key)
            if seconds is not None:
                found[structure_id][name] = seconds
    return found


def broken(context: Context, measured: Mapping[str, float]) -> dict[str, float]:
    """Device → seconds that are allowed, where a measurement is above them."""
    return {
        bound.device: bound.maximum
        for bound in context.constraints
        if bound.metric is Metric.LATENCY and bound.device and measured.get(bound.device, 0.0) > bound.maximum
    }


def corrected(
    context: Context, job: Job, channels: Sequence[int], measured: Mapping[str, float], allowed: Mapping[str, float]
) -> dict[str, Any]:
    """The job's memory with the correction that a broken budget asks for, ready for another round of search.

    Raises:
        BudgetBroken: the rounds are used up.
    """
    memory = dict(job.memory)
    predicted = context.budget(job).predict(channels)
    corrections, figures = dict(memory["corrections"]), list(memory.get("figures", []))
    for name, maximum in allowed.items():
        corrections[name] = corrections.get(name, 1.0) * SAFETY * measured[name] / predicted[name]
        figures.append(
            {"device": name, "round": memory["round"], "max_ms": maximum * 1000,
             "predicted_ms": predicted[name] * 1000, "measured_ms": measured[name] * 1000}
        )  # fmt: skip
    if memory["round"] + 1 >= ROUNDS:
        raise BudgetBroken(figures)
    evolution = dict(memory["evolution"])
    more = max(2, evolution["settings"]["generations"] // 3)
    evolution |= {"generations": evolution["generation"] + more, "exhausted": False}
    memory |= {
        "corrections": corrections, "figures": figures, "round": memory["round"] + 1, "evolution": evolution,
        "since": None, "queue": [], "checkpoint": None,
    }  # fmt: skip
    return memory
