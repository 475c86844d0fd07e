"""LowRank: a product of two thin factors.

w[o, ...] = sum_r left[o, r] * right[r, ...]        Denil 2013, Denton 2014 (SVD)
stored  R * (O + I) numbers instead of O * I; the factors are forms, so they can be masked or quantized
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tersor.dtypes import FLOATS
from tersor.forms.form import Fact, Facts, Form, Moments, Shape, demand

TERMS = 32  # multiplications that cost as much as an element of another form, about


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Form):
    """left [O, R] times right [R, ...]; right keeps the other axes of the weight."""

    name: ClassVar[str] = "lowrank"
    inner: ClassVar[tuple[str, ...]] = ("left", "right")
    rows: ClassVar[int | None] = 0
    left: Form
    right: Form

    def decode(self, keep: Tensor | None = None) -> Tensor:
        return torch.tensordot(self.left.decode(), self.right.decode(), dims=1)

    def take(self, axis: int, index: Tensor) -> LowRank:
        if axis % len(self.shape) == 0:
            return self.replace(left=self.left.take(0, index))
        return self.replace(right=self.right.take(axis, index))

    @property
    def shape(self) -> Shape:
        return (self.left.shape[0], *self.right.shape[1:])

    def work(self, facts: Facts) -> int:
        return prod(facts["left"].shape) * prod(facts["right"].shape[1:]) // TERMS

    def weigh(self, rows: Tensor | None, columns: Tensor | None) -> tuple[Moments, ...]:
        """(F, R H R^T) for the left factor, (L^T F L, H) for the right one. (F, None) and (None, H) if the
        moments do not have the sizes of these rows and columns."""
        left, right = self.left.decode().float(), self.right.decode().float().flatten(1)
        sizes = ((rows, len(left)), (columns, right.shape[1]))
        if not all(moment is None or len(moment) == size for moment, size in sizes):
            return (rows, None), (None, columns)
        return (rows, through(right, columns)), (through(left.T, rows), columns)

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        left, right = facts["left"], facts["right"]
        fine = len(left.shape) == 2 and len(right.shape) >= 1 and left.shape[1] == right.shape[0]
        demand(fine, f"a product of {list(left.shape)} and {list(right.shape)}")
        alike = left.dtype is right.dtype and left.dtype in FLOATS
        demand(alike, f"factors of {left.dtype}, {right.dtype}")
        return Fact((left.shape[0], *right.shape[1:]), left.dtype)


def through(side: Tensor, moment: Tensor | None) -> Tensor:
    """side M side^T for a moment M that is full, diagonal or None; float64, since it is of the 4th power."""
    side = side.double()
    if moment is None:
        return side @ side.T
    moment = moment.double()
    return side @ moment @ side.T if moment.ndim == 2 else (side * moment) @ side.T
