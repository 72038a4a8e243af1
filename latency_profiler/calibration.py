"""From the sum of layers to a network's latency: which whole networks are measured, and the fit through them.

A network is not the sum of its layers: the runtime adds a fixed overhead per run, and layers that follow each other
share caches (`terms`). All this is calibrated per space on whole networks; others that the fit has not seen
say how good it is, and whether the table is trusted (`judge`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np

from latency_profiler.lookup_table import Fit, Floats, LatencyTable
from latency_profiler.spaces.space import CHOICES, Space
from latency_profiler.terms import BYTES, terms_of

Parts = Mapping[str, float]
"""Name of a term → its sum over the layers of a network."""
Penalties = tuple[float, float]
"""Of the squared weights of bytes, in units of what each weighs in the fitted networks, and of the squared distances of
families' slopes from a common one, in units of what a family weighs on average."""

FITTED, HELD_OUT, REPEATED = "fit", "held_out", "repeated"
"""Purposes of a measured network; held-out ones are measured once more, later, for the noise floor."""
NETWORKS = {FITTED: 64, HELD_OUT: 8}
"""How many are measured."""
JITTER = 5
"""Most choices that a gene lies away from its network's mean."""
MOST_MEAN_ERROR, MOST_MAX_ERROR = 0.03, 0.09
"""Errors of a trusted table: below the best that is published for tables of layers (4.7 % and 9.7 %), so that a budget
loses little to the safety margin."""
LEAST_HELD_OUT = 8
"""Networks without which errors are anecdotes: fewer would leave parts of the cost range unseen."""
PENALTIES: tuple[Penalties, ...] = tuple(product((1e-3, 1e-1, 1e2), (1e-3, 1e-2, 1e-1, 1.0, 1e2)))
"""From hardly any to so much that there might as well be no such term."""
LEAST_SLOPE = 0.5
"""Every family's slope is this share of the common one at least: or a search would find layers that are free."""
FOLDS = 8
LEAST_GAIN = 0.05
"""Share by which terms must lower the error on networks that were left out, or there are none."""
LEAST_ERROR = 1e-3
"""By this much at least: where a line is as good as exact, terms fit the rounding."""
MOST_MARGIN = 0.1
"""A wider distance from the budget would only waste it: what is left is corrected by measuring the winner."""


class Trust(StrEnum):
    """Whether a table's prices of a space hold."""

    TRUSTED = "trusted"
    """Errors on held-out networks are within the limits."""
    UNTRUSTED = "untrusted"
    """They are not, or are not known."""
    STALE = "stale"
    """The device is no longer what it was when the table was measured."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a table's prices of a space.

    `margin` is the share of a budget that a search keeps free, and `noise` the share by which two measurements of one
    network differ: the first one of a winner keeps that free, so that the next ones hold the budget, too.
    """

    trust: Trust
    reason: str | None
    margin: float
    noise: float = 0.0


def judge(fit: Fit | None, stale: str | None = None, drift: float = 0.0) -> Verdict:
    """How far prices are to be trusted.

    The margin is the mean error, and what is just trusted where no error is known; a stale table's adds the drift by
    which the device has become slower. It makes most first winners hold; the measurement of each decides.

    Args:
        fit: of the space, None where no networks were measured.
        stale: why the table no longer holds.
        drift: by what share its canaries took longer when they were measured last.
    """
    if fit is None:
        doubt: str | None = "no whole networks were measured, so its error is not known"
    elif fit.held_out < LEAST_HELD_OUT:
        doubt = f"only {fit.held_out} held-out networks were measured; {LEAST_HELD_OUT} are needed"
    elif fit.mean_error > MOST_MEAN_ERROR or fit.max_error > MOST_MAX_ERROR:
        doubt = (
            f"held-out networks are off by {fit.mean_error:.1%} on average and {fit.max_error:.1%} at most; "
            f"{MOST_MEAN_ERROR:.0%} and {MOST_MAX_ERROR:.0%} are trusted"
        )
    else:
        doubt = None
    error = MOST_MEAN_ERROR if fit is None else fit.mean_error
    margin = min(MOST_MARGIN, error + (max(0.0, drift) if stale else 0.0))
    noise = min(MOST_MARGIN, fit.noise_floor or 0.0) if fit else 0.0
    if stale:
        return Verdict(Trust.STALE, stale, margin, noise)
    return Verdict(Trust.UNTRUSTED if doubt else Trust.TRUSTED, doubt, margin, noise)


def calibration_networks(
    space: Space, fitted: int = NETWORKS[FITTED], held_out: int = NETWORKS[HELD_OUT]
) -> list[tuple[tuple[int, ...], str]]:
    """Channels and purpose of the networks that a space is calibrated on: the same ones on every device.

    Independent random genes would all land in the middle of the FLOPs range, where they say nothing about overhead
    and slope. So the networks' mean widths are spread evenly from the smallest to the largest, and genes are random
    around them; the held-out ones are spread among those to fit.
    """
    seed = int.from_bytes(hashlib.sha256(space.key.encode()).digest()[:8], "big")
    generator = np.random.default_rng(seed)
    networks: dict[tuple[int, ...], str] = {}
    count = fitted + held_out
    for i, mean in enumerate(np.linspace(0, CHOICES - 1, count)):
        genes = np.rint(mean + generator.uniform(-JITTER, JITTER, len(space.genes))).clip(0, CHOICES - 1)
        channels = space.channels([int(gene) for gene in genes])
        kept_out = (i + 1) * held_out // count > i * held_out // count
        networks.setdefault(channels, HELD_OUT if kept_out else FITTED)
    return sorted(networks.items(), key=lambda network: network[1])


def parts_of(table: LatencyTable, space: Space, channels: Sequence[int]) -> Parts:
    """What a network's latency is weighed from: the sum over its layers of each of their terms (`terms_of`).

    The terms that are families of layers are together the sum of its layers' seconds.

    Raises:
        MissingLatencies: a layer cannot be priced.
    """
    parts: dict[str, float] = defaultdict(float)
    for layer in space.layers(channels):
        for name, value in terms_of(layer, table.layer(layer).seconds).items():
            parts[name] += value
    return dict(parts)


def sum_of_layers(parts: Parts) -> float:
    """Seconds of a network's layers together, by themselves."""
    return sum(value for name, value in parts.items() if name not in BYTES)


def fit_networks(
    fitted: Sequence[tuple[Parts, float]],
    held_out: Sequence[tuple[Parts, float]],
    repeated: Sequence[tuple[float, float]] = (),
    penalties: Sequence[Penalties] = PENALTIES,
) -> Fit | None:
    """Overhead, slope and terms by least squares of the relative errors, and how well they do on held-out networks.

    How strongly the terms are drawn to 0 is decided by cross-validation over the fitted networks; there are none where
    they do not lower its error, and none has a weight below 0.

    Args:
        fitted: pairs (`parts_of`, measured seconds).
        held_out: the same, of networks that the fit must not see.
        repeated: pairs (measured, measured again), in seconds.
        penalties: to try; without any there is a line.

    Returns:
        None where the networks determine no line: fewer than two different sums, no held-out network, or a slope
        that is not positive.
    """
    if len({sum_of_layers(parts) for parts, _ in fitted}) < 2 or not held_out:
        return None
    families = sorted({name for parts, _ in [*fitted, *held_out] for name in parts} - BYTES.keys())
    design, _ = _design(fitted, families)
    weights = _solve(design, _choose(design, penalties))
    return _judged(weights, families, len(fitted), held_out, repeated) if weights[1] > 0 else None


def fit_percentile(
    median: Fit,
    fitted: Sequence[tuple[Parts, float]],
    held_out: Sequence[tuple[Parts, float]],
    repeated: Sequence[tuple[float, float]] = (),
) -> Fit | None:
    """The fit of a percentile: the median's, and an overhead and a slope besides that are not negative.

    What makes one run in ten slow happens to the machine and not to a layer. So few weights are told by few networks,
    and no network's percentile is priced below its median.

    Args:
        median: of the same networks.
        fitted, held_out, repeated: as `fit_networks` has them, with the percentile's seconds.

    Returns:
        None where no percentiles are known.
    """
    from scipy.optimize import nnls  # here, because agents do without it

    if not fitted or not held_out:
        return None
    families = sorted(median.terms.keys() - BYTES.keys())
    design, _ = _design(fitted, families)
    weights = np.array([median.overhead, median.slope, *(median.terms.get(one, 0.0) for one in (*BYTES, *families))])
    sizes = np.linalg.norm(design[:, :2], axis=0)
    weights[:2] += nnls(design[:, :2] / sizes, 1 - design @ weights)[0] / sizes
    return _judged(weights, families, len(fitted), held_out, repeated)


def _judged(
    weights: Floats, families: Sequence[str], fitted_on: int,
    held_out: Sequence[tuple[Parts, float]], repeated: Sequence[tuple[float, float]],
) -> Fit:  # fmt: skip
    """A fit of these weights (`_solve`), and how well it does on held-out networks."""
    design, seconds = _design(held_out, families)
    predicted = seconds * (design @ weights)
    errors = (predicted - seconds) / seconds
    off = np.abs(errors)
    overhead, slope, *terms = weights.tolist()
    return Fit(
        overhead, slope, fitted_on, len(held_out), float(off.mean()), float(off.max()),
        within_5=float((off <= 0.05).mean()), within_10=float((off <= 0.1).mean()),
        spearman=_rank_correlation(predicted, seconds), bias=float(errors.mean()), noise_floor=_noise(repeated),
        terms={name: weight for name, weight in zip([*BYTES, *families], terms, strict=True) if weight},
    )  # fmt: skip


def _choose(design: Floats, penalties: Sequence[Penalties]) -> Penalties | None:
    """The penalties that predict left-out networks best; None where a line does as well."""
    line = _left_out(design, None)
    tried = [(_left_out(design, one), one) for one in penalties if _solve(design, one)[1] > 0]
    error, best = min(tried, default=(line, None))
    return best if line - error > max(LEAST_GAIN * line, LEAST_ERROR) else None


def _left_out(design: Floats, penalties: Penalties | None) -> float:
    """Root of the mean squared error on networks that were left out in turn, a fold at a time."""
    at = np.arange(len(design)) % FOLDS
    folds = [at == fold for fold in range(min(FOLDS, len(design)))]
    errors = [design[fold] @ _solve(design[~fold], penalties) - 1 for fold in folds]
    return float(np.sqrt(np.square(np.concatenate(errors)).mean()))


def _solve(design: Floats, penalties: Penalties | None) -> Floats:
    """Weights of the columns, by least squares to 1: overhead, slope, terms.

    Without penalties there is a line. With them no term is negative; families have slopes of their own, which are drawn
    to the one that would be best for all together, and not below `LEAST_SLOPE` of it.
    """
    target, count = np.ones(len(design)), len(BYTES)
    if penalties is None:
        line, *_ = np.linalg.lstsq(design[:, :2], target, rcond=None)
        return np.append(line, np.zeros(design.shape[1] - 2))
    weighs = np.linalg.norm(design, axis=0)[1:]
    weighs[1 + count :] = weighs[0] / (len(weighs) - 1 - count)  # alike, so that a slope of little weight cannot roam
    _, *strengths = np.sqrt(np.repeat([0.0, *penalties], (1, count, len(weighs) - 1 - count))) * weighs
    _, slope, *_ = _ridge(design[:, : 2 + count], target, np.array([0.0, *strengths[:count]]))
    least = LEAST_SLOPE * slope
    drawn_to = np.where(np.arange(len(strengths)) < count, 0.0, slope - least)
    columns = np.column_stack([design[:, 0], design[:, 2:]])
    overhead, *terms = _ridge(columns, target - least * design[:, 1], np.array(strengths), drawn_to)
    return np.array([overhead, least, *terms])


def _ridge(design: Floats, target: Floats, strengths: Floats, drawn_to: Floats | float = 0.0) -> Floats:
    """Weights by least squares, of the columns behind the first not negative, and each drawn to a value."""
    from scipy.optimize import nnls  # here, because agents do without it

    # The first column stands twice, with both signs. Each strength is a row under the design.
    free, drawn = design[:, :1], design[:, 1:]
    rows = np.block([[free, -free, drawn], [np.zeros((len(strengths), 2)), np.diag(strengths)]])
    sizes = np.linalg.norm(rows, axis=0)
    sizes[sizes == 0] = 1.0
    up, down, *weights = nnls(rows / sizes, np.append(target, strengths * drawn_to))[0] / sizes
    return np.array([up - down, *weights])


def _design(networks: Sequence[tuple[Parts, float]], families: Sequence[str]) -> tuple[Floats, Floats]:
    """Relative to its seconds, every network's 1, sum, bytes and families (networks, 2 + terms); and the seconds."""
    seconds = np.array([measured for _, measured in networks])
    parts = [[1.0, sum_of_layers(one), *(one.get(name, 0.0) for name in (*BYTES, *families))] for one, _ in networks]
    return np.array(parts) / seconds[:, None], seconds


def _rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's coefficient; None where all of one are equal. Equal values share the mean of their ranks."""
    ranks = [np.searchsorted(np.sort(z), z) + np.searchsorted(np.sort(z), z, "right") for z in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _noise(repeated: Sequence[tuple[float, float]]) -> float | None:
    if not repeated:
        return None
    first, again = np.array(repeated).T
    return float((np.abs(again - first) / first).mean())
