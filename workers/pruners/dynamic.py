"""Dynamic sparse training: masks that change while a network is trained (SET, RigL).

Each layer keeps its number of entries. At an exchange the active ones of least magnitude go, and as many of those that
were inactive come, with value 0: random ones in SET, those with the largest gradient in RigL.

How many entries a layer has follows from its shape (c_out, c_in, k, k). Its density is proportional to
(c_in + c_out) / (c_in c_out) under `er` (SET's Erdos-Renyi graph), and to the sum of the shape over its product under
`erk` (RigL). SET's epsilon = 20 fixes the factor; here the allowance does.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from workers.pruners.allowance import Allowance, largest
from workers.pruners.masks import Masks

Densities = Literal["erk", "er", "uniform"]


def layer_counts(shapes: Mapping[str, tuple[int, ...]], allowance: Allowance, densities: Densities) -> dict[str, int]:
    """Entries that each layer keeps; together just what is allowed, as far as whole entries can.

    A layer that would have more than all of its entries is dense, and the factor is solved again for the others.
    """
    raw = {name: _raw(shape, densities) for name, shape in shapes.items()}
    dense: set[str] = set()
    for _ in shapes:
        factor = _factor(raw, allowance, dense)
        over = {name for name in raw if name not in dense and factor * raw[name] > 1}
        dense |= over
        if not over:
            break
    exact = {n: allowance.sizes[n] * (1.0 if n in dense else min(1.0, factor * raw[n])) for n in raw}
    return _rounded(exact, allowance)


def _raw(shape: tuple[int, ...], densities: Densities) -> float:
    match densities:
        case "erk":
            return sum(shape) / math.prod(shape)
        case "er":
            return sum(shape[:2]) / math.prod(shape[:2])
        case "uniform":
            return 1.0


def _factor(raw: Mapping[str, float], allowance: Allowance, dense: set[str]) -> float:
    """What densities are multiplied by, so that the layers that are not dense share what these leave."""
    counted = {name: allowance.sizes[name] * allowance.prices[name] for name in raw}
    left = allowance.maximum - sum(counted[name] for name in dense)
    others = sum(counted[name] * raw[name] for name in raw if name not in dense)
    return max(0.0, left) / others if others else 0.0


def _rounded(exact: Mapping[str, float], allowance: Allowance) -> dict[str, int]:
    """Whole numbers: all down, then one up each in the order of what was cut off, for as long as that is allowed."""
    counts = {name: math.floor(count) for name, count in exact.items()}
    left = allowance.maximum - sum(counts[name] * allowance.prices[name] for name in counts)
    for name in sorted(counts, key=lambda name: counts[name] - exact[name]):
        if counts[name] < allowance.sizes[name] and allowance.prices[name] <= left:
            counts[name] += 1
            left -= allowance.prices[name]
    return counts


def starting_masks(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Masks:
    """In each layer the entries with the largest scores; random scores give a random mask."""
    return {name: largest(score, counts[name]) for name, score in scores.items()}


def exchanged(magnitudes: Tensor, mask: Tensor, growth: Tensor, share: float) -> Tensor:
    """The mask after an exchange of a share of its entries, rounded down; at most as many as there are inactive ones.

    Args:
        growth: scores of entries; of the inactive ones those with the largest come.
    """
    active = int(mask.sum())
    count = min(int(share * active), mask.numel() - active)
    stay = largest(torch.where(mask, magnitudes, -torch.inf), active - count)
    come = largest(torch.where(mask, -torch.inf, growth), count)
    return stay | come


def cosine(share: float, iteration: int, end: int) -> float:
    """A share that falls to zero at `end` along half a cosine (RigL, section 3)."""
    return share / 2 * (1 + math.cos(math.pi * min(iteration, end) / end))
