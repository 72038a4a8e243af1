"""From the sum of layers to a network's latency: which whole networks are measured, and the fit through them.

A network is not the sum of its layers: the runtime adds a fixed overhead per run, and layers that follow each other
share caches. Both are calibrated per space on whole networks; others that the fit has not seen say how good it is, and
whether the table is trusted (`judge`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from latency_profiler.lookup_table import Fit, Floats
from latency_profiler.spaces.space import CHOICES, Space

FITTED, HELD_OUT, REPEATED = "fit", "held_out", "repeated"
"""Purposes of a measured network; held-out ones are measured once more, later, for the noise floor."""
NETWORKS_PER_PURPOSE = 8
JITTER = 5
"""Most choices that a gene lies away from its network's mean."""
MOST_MEAN_ERROR, MOST_MAX_ERROR = 0.03, 0.09
"""Errors of a trusted table: below the best that is published for tables of layers (4.7 % and 9.7 %), so that a budget
loses little to the safety margin."""
LEAST_HELD_OUT = 8
"""Networks without which errors are anecdotes: fewer would leave parts of the cost range unseen."""
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
    """What to think of a table's prices of a space; `margin` is the share of a budget that a search keeps free."""

    trust: Trust
    reason: str | None
    margin: float


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
    if stale:
        return Verdict(Trust.STALE, stale, margin)
    return Verdict(Trust.UNTRUSTED if doubt else Trust.TRUSTED, doubt, margin)


def calibration_networks(space: Space, per_purpose: int = NETWORKS_PER_PURPOSE) -> list[tuple[tuple[int, ...], str]]:
    """Channels and purpose of the networks that a space is calibrated on: the same ones on every device.

    Independent random genes would all land in the middle of the FLOPs range, where they say nothing about overhead
    and slope. So the networks' mean widths are spread evenly from the smallest to the largest, and genes are random
    around them; the networks to fit and the held-out ones alternate.
    """
    seed = int.from_bytes(hashlib.sha256(space.key.encode()).digest()[:8], "big")
    generator = np.random.default_rng(seed)
    networks: dict[tuple[int, ...], str] = {}
    for i, mean in enumerate(np.linspace(0, CHOICES - 1, 2 * per_purpose)):
        genes = np.rint(mean + generator.uniform(-JITTER, JITTER, len(space.genes))).clip(0, CHOICES - 1)
        channels = space.channels([int(gene) for gene in genes])
        networks.setdefault(channels, FITTED if i % 2 == 0 else HELD_OUT)
    return sorted(networks.items(), key=lambda network: network[1])


def fit_networks(
    fitted: Sequence[tuple[float, float]],
    held_out: Sequence[tuple[float, float]],
    repeated: Sequence[tuple[float, float]] = (),
) -> Fit | None:
    """Overhead and slope by least squares of the relative errors, and how well they do on held-out networks.

    Args:
        fitted: pairs (sum of layers, measured), in seconds.
        held_out: the same, of networks that the fit must not see.
        repeated: pairs (measured, measured again).

    Returns:
        None where the networks determine no line: fewer than two different sums, no held-out network, or a slope
        that is not positive.
    """
    if len({total for total, _ in fitted}) < 2 or not held_out:
        return None
    totals, seconds = _columns(fitted)
    design = np.stack([1 / seconds, totals / seconds], axis=1)  # (networks, 2)
    (overhead, slope), *_ = np.linalg.lstsq(design, np.ones(len(seconds)), rcond=None)
    if slope <= 0:
        return None
    totals, seconds = _columns(held_out)
    predicted = overhead + slope * totals
    errors = (predicted - seconds) / seconds
    off = np.abs(errors)
    return Fit(
        float(overhead), float(slope), len(fitted), len(held_out), float(off.mean()), float(off.max()),
        within_5=float((off <= 0.05).mean()), within_10=float((off <= 0.1).mean()),
        spearman=_rank_correlation(predicted, seconds), bias=float(errors.mean()), noise_floor=_noise(repeated),
    )  # fmt: skip


def _rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's coefficient; None where all of one are equal. Equal values share the mean of their ranks."""
    ranks = [np.searchsorted(np.sort(z), z) + np.searchsorted(np.sort(z), z, "right") for z in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _noise(repeated: Sequence[tuple[float, float]]) -> float | None:
    if not repeated:
        return None
    first, again = _columns(repeated)
    return float((np.abs(again - first) / first).mean())


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    array = np.asarray(pairs, dtype=np.float64)
    return array[:, 0], array[:, 1]
