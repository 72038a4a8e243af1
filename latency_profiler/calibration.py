"""From the sum of layers to a network's latency: which whole networks are measured, and the fit through them.

A network is not the sum of its layers: the runtime adds a fixed overhead per run, and layers that follow each other
share caches. Both are calibrated per space on whole networks; others that the fit has not seen say how good it is.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from latency_profiler.lookup_table import Fit, Floats
from latency_profiler.spaces.space import CHOICES, Space

FITTED, HELD_OUT = "fit", "held_out"
"""Purposes of a measured network."""
NETWORKS_PER_PURPOSE = 8
JITTER = 5
"""Most choices that a gene lies away from its network's mean."""


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


def fit_networks(fitted: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]]) -> Fit | None:
    """Overhead and slope by least squares of the relative errors, and how well they do on held-out networks.

    Args:
        fitted: pairs (sum of layers, measured), in seconds.
        held_out: the same, of networks that the fit must not see.

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
    errors = np.abs(overhead + slope * totals - seconds) / seconds
    return Fit(float(overhead), float(slope), len(fitted), len(held_out), float(errors.mean()), float(errors.max()))


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    array = np.asarray(pairs, dtype=np.float64)
    return array[:, 0], array[:, 1]
