"""Unit removal: the order in which units are removed, if what reads them may compensate, and the damage.

damage(u) = tr(W_u (H^-1_uu)^-1 W_u^T)        W [O, I] reads the units, H [I, I] second moment of its inputs
W -= W_u (H^-1_uu)^-1 H^-1_u:                 the other columns rebuild what they can, by least squares
H^-1 -= H^-1_:u (H^-1_uu)^-1 H^-1_u:          optimal brain surgeon (Hassibi, Stork 1993) for blocks of
                                              columns, unit by unit (ZipLM: Kurtic, Frantar, Alistarh 2023)
Several readers are served at once: a unit's damage is the sum. Cost: U I^2 K for U units of K columns, mostly
in products of large matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tersor.maths.damping import damping

LATER = 16  # removals


class Reader(NamedTuple):
    """A weight that reads units, its rows scaled by the square root of their importance."""

    weight: Tensor  # [O, I]
    moment: Tensor  # H [I, I]
    columns: Tensor  # [U, K], int64: the columns of each unit
    samples: int = 1 << 62  # samples that the moment is of; without it as many as one wants


class Removal(NamedTuple):
    """Units in the order in which they are removed, and the damage after each."""

    order: Tensor  # [U], int64
    damage: Tensor  # [U + 1], float64; damage[n] after n removals, damage[0] = 0


def removal(readers: Sequence[Reader], units: int, least: int = 1) -> Removal:
    """Remove units until `least` are left; the rest of the order is by damage alone."""
    work = [Work(reader) for reader in readers]
    left = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    damage, total = [0.0], 0.0
    while len(order) < units - least:
        cost = torch.stack([each.cost() for each in work]).sum(0).masked_fill(~left, torch.inf)
        u = int(cost.argmin())
        total += max(float(cost[u]), 0.0)
        for each in work:
            each.remove(u)
        left[u] = False
        order.append(u)
        damage.append(total)
    cost = torch.stack([each.cost() for each in work]).sum(0)
    rest = left.nonzero()[:, 0]
    for u in rest[cost[rest].argsort(stable=True)].tolist():
        total += max(float(cost[u]), 0.0)
        order.append(u)
        damage.append(total)
    return Removal(torch.tensor(order), torch.tensor(damage, dtype=torch.float64))


class Work:
    """The running weight and inverse of one reader. H^-1 is updated for `LATER` removals at once: one product
    of matrices in place of many passes over it. H^-1 now is `inverse` - rows^T scaled."""

    def __init__(self, reader: Reader) -> None:
        h = reader.moment.double()
        h = (h + h.T) / 2  # of what is not symmetric, the inverse makes much more
        h = h + damping(h, reader.samples) * torch.eye(len(h), dtype=h.dtype)
        self.inverse = torch.linalg.inv(h)
        self.weight, self.columns = reader.weight.double().clone(), reader.columns
        self.own = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]  # [U, K, K], of now
        self.rows, self.scaled = h.new_zeros(0, len(h)), h.new_zeros(0, len(h))  # [R, I], [R, I]
        self.left = torch.ones(len(reader.columns), dtype=torch.bool)

    def cost(self) -> Tensor:
        """The damage of removing each unit, [U]; 0 for those that are gone."""
        columns, found = self.columns[self.left], self.weight.new_zeros(len(self.left))
        w = self.weight[:, columns].transpose(0, 1)  # [U left, O, K]
        found[self.left] = ((w @ torch.linalg.inv(self.own[self.left])) * w).sum((1, 2))
        return found

    def remove(self, u: int) -> None:
        at = self.columns[u]
        rows = self.inverse[at] - self.rows[:, at].T @ self.scaled  # [K, I]
        scaled = torch.linalg.inv(rows[:, at]) @ rows  # [K, I]
        self.weight -= self.weight[:, at] @ scaled
        self.weight[:, at] = 0
        self.own -= rows[:, self.columns].permute(1, 2, 0) @ scaled[:, self.columns].transpose(0, 1)
        self.left[u] = False
        self.rows, self.scaled = torch.cat([self.rows, rows]), torch.cat([self.scaled, scaled])
        if len(self.rows) >= LATER * len(at):
            self.inverse -= self.rows.T @ self.scaled
            self.rows, self.scaled = self.rows[:0], self.scaled[:0]
