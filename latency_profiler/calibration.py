"""From the sum of layers to a network's latency: which whole networks are measured, and the fit through them.

A network is not the sum of its layers: the runtime adds a fixed overhead per run, and layers that follow each other
share caches (`terms`). All this is calibrated per space on whole networks; others that the fit has not seen
say how good it is, and whether the table is trusted (`judge`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import numpy as np

from latency_profiler.lookup_table import Fit, Floats, LatencyTable
from latency_profiler.spaces.space import CHOICES, Space
from latency_profiler.terms import TERMS

Parts = tuple[float, ...]

FITTED, HELD_OUT, REPEATED = "fit", "held_out", "repeated"
"""Purposes of a measured network; held-out ones are measured once more, later, for the noise floor."""
NETWORKS = {FITTED: 32, HELD_OUT: 8}
"""How many are measured."""
JITTER = 5
"""Most choices that a gene lies away from its network's mean."""
MOST_MEAN_ERROR, MOST_MAX_ERROR = 0.03, 0.09
"""Errors of a trusted table: below the best that is published for tables of layers (4.7 % and 9.7 %), so that a budget
loses little to the safety margin."""
LEAST_HELD_OUT = 8
"""Networks without which errors are anecdotes: fewer would leave parts of the cost range unseen."""
TERM_SETS = tuple(terms for count in range(1, len(TERMS) + 1) for terms in combinations(TERMS, count))
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of a network's weight: how strongly the terms are drawn to 0 (ridge regression)."""
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
    """What a network's latency is weighed from: the sum of its layers alone, and that of each of `TERMS`.

    Raises:
        MissingLatencies: a layer cannot be priced.
    """
    alone = [table.layer(layer) for layer in space.layers(channels)]
    terms = (sum(term(price.layer) for price in alone) for term in TERMS.values())
    return (sum(price.seconds for price in alone), *terms)


def fit_networks(
    fitted: Sequence[tuple[Parts, float]],
    held_out: Sequence[tuple[Parts, float]],
    repeated: Sequence[tuple[float, float]] = (),
    term_sets: Sequence[Sequence[str]] = TERM_SETS,
) -> Fit | None:
    """Overhead, slope and terms by least squares of the relative errors, and how well they do on held-out networks.

    Which terms there are, and how strongly they are drawn to 0, is decided by cross-validation over the fitted
    networks; there are none where they do not lower its error, and none with a weight below 0.

    Args:
        fitted: pairs (`parts_of`, measured seconds).
        held_out: the same, of networks that the fit must not see.
        repeated: pairs (measured, measured again), in seconds.
        term_sets: terms to try together.

    Returns:
        None where the networks determine no line: fewer than two different sums, no held-out network, or a slope
        that is not positive.
    """
    if len({parts[0] for parts, _ in fitted}) < 2 or not held_out:
        return None
    design, seconds = _design(fitted)
    chosen, penalty = _choose(design, term_sets)
    weights = _solve(design[:, _columns(chosen)], penalty)
    overhead, slope, *terms = weights.tolist()
    if slope <= 0:
        return None
    design, seconds = _design(held_out)
    predicted = seconds * (design[:, _columns(chosen)] @ weights)
    errors = (predicted - seconds) / seconds
    off = np.abs(errors)
    return Fit(
        overhead, slope, len(fitted), len(held_out), float(off.mean()), float(off.max()),
        within_5=float((off <= 0.05).mean()), within_10=float((off <= 0.1).mean()),
        spearman=_rank_correlation(predicted, seconds), bias=float(errors.mean()), noise_floor=_noise(repeated),
        terms={name: weight for name, weight in zip(chosen, terms, strict=True) if weight},
    )  # fmt: skip


def _choose(design: Floats, term_sets: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], float]:
    """The terms that predict left-out networks best, and their penalty; none where a line does as well."""
    line = _left_out(design[:, _columns(())], 0.0)
    tried = [
        (_left_out(design[:, _columns(terms)], penalty), tuple(terms), penalty)
        for terms in term_sets
        for penalty in PENALTIES
        if (_solve(design[:, _columns(terms)], penalty)[1:] >= 0).all()
    ]
    error, terms, penalty = min(tried, key=lambda one: one[0], default=(line, (), 0.0))
    return (terms, penalty) if line - error > max(LEAST_GAIN * line, LEAST_ERROR) else ((), 0.0)


def _left_out(design: Floats, penalty: float) -> float:
    """Root of the mean squared error on networks that were left out in turn, a fold at a time."""
    at = np.arange(len(design)) % FOLDS
    folds = [at == fold for fold in range(min(FOLDS, len(design)))]
    errors = [design[fold] @ _solve(design[~fold], penalty) - 1 for fold in folds]
    return float(np.sqrt(np.square(np.concatenate(errors)).mean()))


def _solve(design: Floats, penalty: float) -> Floats:
    """Weights of the columns by ridge regression to 1; overhead and slope, the first two, are free."""
    norms = np.linalg.norm(design, axis=0)
    sizes = np.where(norms > 0, norms, 1.0)
    scaled = design / sizes
    free = np.arange(scaled.shape[1]) < 2
    rows = np.sqrt(np.where(free, 0.0, penalty)) * np.eye(scaled.shape[1])
    target = np.concatenate([np.ones(len(scaled)), np.zeros(len(rows))])
    weights, *_ = np.linalg.lstsq(np.concatenate([scaled, rows]), target, rcond=None)
    return np.asarray(weights / sizes)


def _design(networks: Sequence[tuple[Parts, float]]) -> tuple[Floats, Floats]:
    """Relative to its seconds, every network's 1, sum and terms (networks, 2 + terms); and the seconds."""
    seconds = np.array([measured for _, measured in networks])
    parts = np.array([parts for parts, _ in networks])
    return np.column_stack([np.ones(len(seconds)), parts]) / seconds[:, None], seconds


def _columns(terms: Sequence[str]) -> list[int]:
    """Columns of the design: overhead, slope, and these terms."""
    names = list(TERMS)
    return [0, 1, *(2 + names.index(term) for term in terms)]


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
