"""LowRank: a product of two thin factors.

w[o, ...] = sum_r left[o, r] * right[r, ...]        Denil 2013, Denton 2014 (SVD)
stored  R * (O + I) numbers in place of O * I; the factors are forms, so they can be masked or quantized again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.forms.form import Form


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Form):
    """left [O, R] times right [R, ...]; right keeps the other axes of the weight."""

    name: ClassVar[str] = "lowrank"
    left: Form
    right: Form

    def decode(self, keep: Tensor | None = None) -> Tensor:
        return torch.tensordot(self.left.decode(), self.right.decode(), dims=1)

    def take(self, axis: int, index: Tensor) -> LowRank:
        if axis % len(self.shape) == 0:
            return self.replace(left=self.left.take(0, index))
        return self.replace(right=self.right.take(axis, index))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], *self.right.shape[1:])
