"""A guess of which bred structures are worth judging, from those judged so far.

Judging a structure takes a thousand times as long as breeding one, and structures alike score alike: on a PruningNet's
candidates the rank correlation between guess and score is 0.87 after 40 of them and 0.93 after 100 (resnet20, digits,
1/8 of the FLOPs). Letters: n judged, m bred structures, g genes.
"""

import numpy as np
import numpy.typing as npt

from workers.sampling import Genes

Floats = npt.NDArray[np.float64]
NEAR = 0.5
"""Structures whose log widths lie so far apart (root mean square over genes) tell something of one another."""
NOISE = 0.3
"""How far a score is expected to be off its neighbours', beside a prior of one."""
DIGITS = 9


def guess(judged: Genes, badness: Floats, bred: Genes) -> Floats:
    """Expected badness (m,) of bred structures (m, g), as a rank from -1/2 (best) to 1/2 among the judged (n, g).

    Kernel ridge regression on the logarithms of widths, with a linear and a Gaussian kernel. Rounded, so that the order
    does not hang on the last bit.
    """
    widths = _log_widths(judged)
    middle = widths.mean(axis=0)
    known, asked = widths - middle, _log_widths(bred) - middle
    ranks = np.argsort(np.argsort(badness, kind="stable"), kind="stable") / max(1, len(badness) - 1) - 0.5
    weights = np.linalg.solve(_alike(known, known) + NOISE * np.eye(len(known)), ranks)
    return np.asarray(np.round(_alike(asked, known) @ weights, DIGITS), dtype=np.float64)


def _log_widths(encodings: Genes) -> Floats:
    return np.log((10 + 3 * encodings) / 100)


def _alike(one: Floats, other: Floats) -> Floats:
    products = one @ other.T
    apart = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * products
    genes = one.shape[1]
    alike: Floats = np.exp(-apart / (2 * genes * NEAR**2)) + products / genes
    return alike
