"""Theorem 1 of Interspace Pruning, as a computation: a trained basis never approximates worse than the standard one.

U (m, n) holds all flattened filters of the layers that share a basis, as columns. Standard pruning keeps the s entries
of largest magnitude: the best ||U - R|| with s non-zeros in R. Interspace pruning may choose F (m, m) too, in
||U - F R||. Here the places of the non-zeros stay those of standard pruning, and F and R are improved in turns, each by
least squares, from F = I and R = U at the kept places. So no turn can raise the error, and the first one lowers it
unless every column is kept or pruned as a whole: the gradient at F = I is -2 (U - R) R^T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import torch
from torch import Tensor

from workers.pruners.allowance import largest
from workers.pruners.filter_bases import InterspaceNetwork

TURNS = 30


@dataclass(frozen=True, slots=True)
class Approximation:
    """How well sparse filters stand for the dense ones, with the same number of non-zeros at the same places."""

    basis: str
    filters: int
    """Columns of U."""
    kept: int
    """Non-zeros of R."""
    standard: float
    """||U - R||, Frobenius."""
    interspace: float
    """||U - F R||, Frobenius; never above `standard`."""


def errors(u: Tensor, mask: Tensor, turns: int = TURNS) -> list[float]:
    """||U - F R|| at F = I, and after each turn, for U (m, n) and the places of R's non-zeros (m, n)."""
    u = u.double()
    basis, found = torch.eye(len(u), dtype=torch.float64, device=u.device), []
    coefficients = u * mask
    found.append(_distance(u, coefficients))
    for _ in range(turns):
        basis = torch.linalg.lstsq(coefficients.T, u.T, driver="gelsd").solution.T
        coefficients = _coefficients(u, basis, mask)
        found.append(_distance(u, basis @ coefficients))
    return found


def chance_of_no_gain(m: int, n: int, s: int) -> Fraction:
    """Delta: the probability that s places of (m, n) are whole columns, where alone nothing can be gained.

    The printed form is not known; this one is derived: C(n, s / m) of the C(m n, s) equally likely supports.
    """
    return Fraction(comb(n, s // m), comb(m * n, s)) if s % m == 0 else Fraction(0)


@torch.no_grad()
def approximations(network: InterspaceNetwork, rate: float, turns: int = TURNS) -> list[Approximation]:
    """The theorem on a network's own filters, basis by basis, at a pruning rate in each."""
    found = []
    for group, members in _members(network).items():
        u = torch.cat([network.weight(i).flatten(2).flatten(0, 1) for i in members]).T
        kept = round((1 - rate) * u.numel())
        course = errors(u, largest(u.abs(), kept), turns)
        found.append(Approximation(group, u.shape[1], kept, course[0], course[-1]))
    return found


def _members(network: InterspaceNetwork) -> Mapping[str, list[int]]:
    members: dict[str, list[int]] = {}
    for i, group in network.groups.items():
        members.setdefault(group, []).append(i)
    return members


def _coefficients(u: Tensor, basis: Tensor, mask: Tensor) -> Tensor:
    """R (m, n): each column by least squares on the basis filters that it may use."""
    used = basis * mask.T[:, None, :]  # (n, m, m): column k's filters, zero where it has no coefficient
    solved: Tensor = (torch.linalg.pinv(used) @ u.T[..., None]).squeeze(-1)
    return solved.T * mask


def _distance(u: Tensor, approximation: Tensor) -> float:
    return float(torch.linalg.matrix_norm(u - approximation))
