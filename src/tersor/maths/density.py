"""Density: a probability model of integer codes that estimates the bits of a context-adaptive coder.

P(q[o, i] = 0) = sigmoid(z[o, i]),  z = common + row[o] + column[i]     nonzero codes: the sign takes one bit
P(|q| = 1), then P(|q| = 2), then a geometric tail                      the same for the whole tensor
cost           one sigmoid a code for each factor and sweep; gradient and bits take a few additions a code

A coder with contexts for the density of rows and columns comes close to this cost. Used as a penalty, it
empties rows and columns: as a row empties, its nonzero codes get more expensive and its zeros cheaper. Oktay
2019 (EPR) uses one density for each tensor.

`expected` is the mean bits of round(t + u), u uniform in [-1/2, 1/2): EPR's noise, integrated. It is linear
between two codes, so its slope at 0 < |t| < 1 is the whole cost of a nonzero code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LN2 = math.log(2)
PRIOR = (
    0.1  # precision of the normal prior on each factor, in nats: short rows and columns stay near the mean
)
STEP = 1.5  # largest change of a factor in one sweep: Newton's step overshoots for an empty row


class Density(NamedTuple):
    """Log odds of a zero as a sum of factors, and the cost of magnitudes, in nats."""

    common: Tensor  # [1, 1]
    row: Tensor  # [O, 1]
    column: Tensor  # [1, I]
    levels: (
        Tensor  # [3]: cost of |q| = 1 given q != 0; extra cost of |q| = 2; extra cost of each further level
    )

    @property
    def odds(self) -> Tensor:
        """Log odds of zero, [O, I]."""
        return self.common + self.row + self.column

    @property
    def first(self) -> Tensor:
        """Cost of a code of 1 or -1 minus the cost of a code of 0, in nats [O, I], clipped to 0 or more."""
        return (self.odds + (LN2 + self.levels[0])).clamp_min_(0)


def flat(codes: Tensor) -> Density:
    """An initial density for codes [O, I], all factors 0. Call `fit` before using it."""
    rows, columns = codes.shape
    new = codes.new_zeros
    return Density(
        new(1, 1, dtype=torch.float32), new(rows, 1, dtype=torch.float32),
        new(1, columns, dtype=torch.float32), torch.ones(3, device=codes.device),
    )  # fmt: skip


def fit(density: Density, codes: Tensor, sweeps: int = 1) -> Density:
    """Fit the density to codes [O, I] (integers of any dtype), starting from the given one.

    Each sweep takes one bounded Newton step in common, rows and columns towards the maximum a posteriori,
    with a normal prior on the factors and pseudo-counts of half a zero and half a nonzero code. A single row
    or column has only the common factor, since other factors would only memorize the codes.
    """
    used = (codes != 0).float()
    for _ in range(sweeps if codes.numel() else 0):
        density = density._replace(common=density.common + _common(density, used))
        if used.shape[0] > 1 and used.shape[1] > 1:
            density = density._replace(row=density.row + _factor(density, used, density.row, 1))
            density = density._replace(column=density.column + _factor(density, used, density.column, 0))
    return density._replace(levels=levels(codes.abs()))


def _common(density: Density, used: Tensor) -> Tensor:
    free = torch.sigmoid(-density.odds)  # probability of a nonzero code
    half = torch.sigmoid(-density.common)
    pull = (free - used).sum() + half - 0.5
    curve = (free * (1 - free)).sum() + half * (1 - half)
    return (pull / curve.clamp_min(1e-3)).clamp(-STEP, STEP)


def _factor(density: Density, used: Tensor, factor: Tensor, axis: int) -> Tensor:
    free = torch.sigmoid(-density.odds)
    pull = (free - used).sum(axis, keepdim=True) - PRIOR * factor
    curve = (free * (1 - free)).sum(axis, keepdim=True) + PRIOR
    return (pull / curve).clamp(-STEP, STEP)


def levels(size: Tensor) -> Tensor:
    """Costs of magnitudes in nats, [3], from counts plus 1/2. A higher level is never cheaper."""
    ones, more = (size == 1).sum() + 0.5, (size >= 2).sum() + 0.5
    steps = (size - 2).clamp_min(0).sum() + 0.5
    one, on = ones / (ones + more), steps / (steps + more)
    third = -on.log()
    return torch.stack(
        [-one.log(), (one.log() - (1 - one).log() - (1 - on).log()).clamp_min(0), third]
    ).float()


def bits(density: Density, codes: Tensor) -> Tensor:
    """Exact bits of codes [O, I] under the density, a scalar."""
    size = codes.abs().float()
    zero = F.softplus(torch.where(size > 0, density.odds, -density.odds)).sum()
    first, second, third = density.levels
    used, more = (size > 0).sum(), (size > 1).sum()
    return (zero + used * (LN2 + first) + more * second + (size - 2).clamp_min(0).sum() * third) / LN2


def expected(density: Density, exact: Tensor) -> Tensor:
    """Mean bits of round(exact + u), u uniform in [-1/2, 1/2), for codes before rounding [O, I]; a scalar."""
    size = exact.abs()
    empty = F.softplus(-density.odds).sum()
    part = size.clamp_max(1) * density.first
    part = part + (size - 1).clamp(0, 1) * density.levels[1] + (size - 2).clamp_min(0) * density.levels[2]
    return (empty + part.sum()) / LN2


def slopes(density: Density, exact: Tensor) -> Tensor:
    """Gradient of `expected` with respect to each code before rounding, [O, I], in bits."""
    size = exact.abs()
    slope = torch.where(size < 1, density.first, torch.where(size < 2, density.levels[1], density.levels[2]))
    return slope.mul_(exact.sign()).div_(LN2)
