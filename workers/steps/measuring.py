"""Whole networks on real devices: asked for, waited for, and held against the budget."""

from collections.abc import Collection, Mapping, Sequence
from math import inf
from statistics import median
from typing import Any

from sqlalchemy.orm import Session

from latency_profiler.cost import latency_name, split_latency
from latency_profiler.errors import MeasurementFailed, SecateursError
from service.store import devices, jobs, measurements
from service.store.models import Job
from service.store.session import snapshot, transaction
from workers.steps.context import Context

Measured = tuple[Sequence[int], Mapping[str, float]]
"""Channels of a network, and latency → seconds as far as devices have measured it."""
ROUNDS = 5
"""How many searches a job may make, each with the corrections of the measurements before it."""
SHY_ROUNDS = 2
"""In so many of them a winner that leaves budget unused is a reason to search on."""
SAFETY = 1.005
"""A corrected prediction lies this much above the measurement that corrected it."""
LEAST_PATIENCE = 120.0
"""Seconds for which networks are waited for that a search can do without, or more where they take longer."""
RUNS = 1000
"""Of one network in three visits, at most: a percentile takes 101 values of a slow one, each after two more runs."""


class BudgetBroken(SecateursError):
    """The winners that the search found break their budget when they are measured.

    Attributes:
        figures: one object per latency and round: budget, predicted and measured milliseconds.
    """

    def __init__(self, figures: Sequence[dict[str, Any]]) -> None:
        self.figures = list(figures)
        last = self.figures[-1]
        super().__init__(
            f"after {last['round'] + 1} searches the winner still breaks its budget when measured on {last['device']}: "
            f"it took {last['measured_ms']:.4g} ms, {last['max_ms']:.4g} ms are allowed"
        )


def patience(context: Context, job: Job, networks: Collection[Sequence[int]]) -> float:
    """Seconds for which networks of these channels are waited for: as long as devices that are there need for them."""
    names = {split_latency(name)[0] for name in context.constrained}
    with snapshot() as session:
        if not names or not all(devices.alive(session, devices.get(session, name)) for name in names):
            return LEAST_PATIENCE
    prices = [context.predict(job, channels) for channels in networks]
    return max(LEAST_PATIENCE, RUNS * sum(max(price[name] for name in context.constrained) for price in prices))


def look(
    session: Session, context: Context, names: Sequence[str], purpose: str, networks: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Structure id → latency → seconds, as far as devices have measured them; what lacks is asked for.

    Args:
        names: of latencies; one measurement tells all of a device.
        purpose: keeps this measurement apart from others of the same network.
        networks: structure id → channels.

    Raises:
        MeasurementFailed: a device could not run a network.
    """
    found: dict[str, dict[str, float]] = {structure_id: {} for structure_id in networks}
    items = [(context.space, channels, purpose) for channels in networks.values()]
    # The first request of a network stands, so that of a percentile, which takes more runs, comes first.
    for name, statistic in sorted(map(split_latency, names), key=lambda pair: pair[1], reverse=True):
        device = devices.get(session, name)
        keys = measurements.request_networks(session, device, items, statistic=statistic)
        for structure_id, key in zip(networks, keys, strict=True):
            seconds = measurements.network_seconds(session, device, key, statistic)
            if seconds is not None:
                found[structure_id][latency_name(name, statistic)] = seconds
    return found


def look_around(
    session: Session, context: Context, purpose: str, networks: Mapping[str, Sequence[int]], winners: Collection[str]
) -> tuple[dict[str, dict[str, float]], dict[tuple[str, str], str]]:
    """The same for all of the job's latencies, without what devices are unable to run.

    Returns:
        What `look` returns; and the reasons by structure id and latency.

    Raises:
        MeasurementFailed: a device that a constraint names could not run one of the `winners`.
    """
    found, unable = {structure_id: dict[str, float]() for structure_id in networks}, dict[tuple[str, str], str]()
    # As in `look`: the first request of a network stands, so that of a percentile comes first.
    for name in sorted(context.latencies, key=lambda name: split_latency(name)[1], reverse=True):
        for structure_id, channels in networks.items():
            try:
                found[structure_id] |= look(session, context, [name], purpose, {structure_id: channels})[structure_id]
            except MeasurementFailed as error:
                if name in context.constrained and structure_id in winners:
                    raise
                unable[structure_id, name] = str(error)
    return found, unable


def purpose(job: Job, name: str, again: bool | None = None) -> str:
    """What the measurements of this round are for; they are made once more, `again`, where `doubted`."""
    again = bool(job.memory.get("again")) if again is None else again
    return f"{name}{'-again' if again else ''}-{job.id}-{job.memory['round']}"


def doubted(context: Context, job: Job) -> bool:
    """Whether a broken budget shall be measured again before it is believed; once in a round.

    A device that is slow for some seconds was seen to break budgets by two thirds.
    """
    if job.memory.get("again"):
        return False
    with transaction() as session:
        jobs.save_step(session, context.claim, memory={**job.memory, "again": True, "since": None})
    return True


def tried(
    session: Session, context: Context, purpose: str, networks: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """The same as `look` for all constrained latencies, without the networks that a device could not run.

    Raises:
        MeasurementFailed: there is no other network.
    """
    found = dict[str, dict[str, float]]()
    for structure_id, channels in networks.items():
        try:
            found |= look(session, context, context.constrained, purpose, {structure_id: channels})
        except MeasurementFailed as error:
            failure = error
    if networks and not found:
        raise failure
    return found


def off(
    context: Context, measured: Mapping[str, float], least: float = 0.0, noise: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Latency → seconds that are allowed, where a measurement is above them.

    Args:
        least: share of the budget that one latency at least must reach; below it, no other bound being tight either,
            the prediction is too pessimistic and counts as off too.
        noise: latency → share by which another measurement may be longer, which must be allowed, too.
    """
    allowed = {str(bound.latency): bound.maximum for bound in context.constraints if bound.latency in measured}
    longest = {name: seconds * (1 + (noise or {}).get(name, 0.0)) for name, seconds in measured.items()}
    broken = {name: maximum for name, maximum in allowed.items() if longest[name] > maximum}
    shy = all(measured[name] < least * maximum for name, maximum in allowed.items())
    return broken or (allowed if shy else {})


def ratio(context: Context, job: Job, networks: Sequence[Measured], name: str) -> float:
    """Median share of predictions that measurements of a latency are; infinite where there is none."""
    ratios = [seconds[name] / context.predict(job, channels)[name] for channels, seconds in networks if name in seconds]
    return median(ratios) if ratios else inf


def corrected(
    context: Context, job: Job, networks: Sequence[Measured], allowed: Mapping[str, float], *, shy: bool = False
) -> dict[str, Any]:
    """The job's memory with the corrections that measurements ask for, for another round.

    Args:
        networks: best first.
        allowed: latency → seconds, of the latencies to correct.
        shy: whether prices are too high, as all networks together tell. Else they are too low, as those networks tell
            that break what is allowed with their noise; then no price falls.

    Raises:
        BudgetBroken: the rounds are used up.
    """
    memory = dict(job.memory)
    corrections, figures = dict(memory["corrections"]), list(memory.get("figures", []))
    for name, maximum in allowed.items():
        longer = 1 + memory.get("noise", {}).get(name, 0.0)
        known = [one for one in networks if name in one[1] and (shy or one[1][name] * longer > maximum)]
        channels, measured = known[0]
        growth = ratio(context, job, known, name)
        corrections[name] = corrections.get(name, 1.0) * SAFETY * (growth if shy else max(1.0, growth))
        figures.append(
            {"device": name, "round": memory["round"], "max_ms": maximum * 1000,
             "predicted_ms": context.predict(job, channels)[name] * 1000, "measured_ms": measured[name] * 1000}
        )  # fmt: skip
    if memory["round"] + 1 >= ROUNDS:
        raise BudgetBroken(figures)
    return memory | {
        "corrections": corrections, "figures": figures, "round": memory["round"] + 1, "again": False, "since": None,
        "checkpoint": None,
    }  # fmt: skip
