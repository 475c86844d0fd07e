"""Affine: small integers on a uniform grid.

w[o, i] = (codes[o, i] - zero[o]) * scale[o]      one grid per tensor [1, 1], channel [O, 1]
                                                  or group of inputs [O, G]
stored  `bits` per weight before coding, 32 bits per scale, 16 per zero point; symmetric grids have no zero
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.dtypes import INTEGERS
from tersor.forms.dense import Dense
from tersor.forms.form import Fact, Facts, Form, Shape, demand, from_rows, to_rows
from tersor.forms.ongrid import OnGrid
from tersor.maths.uniform_grid import dequantize


@dataclass(frozen=True, eq=False, repr=False)
class Affine(OnGrid):
    """Integer codes with a scale, and with a zero point if the grid is not symmetric."""

    name: ClassVar[str] = "affine"
    aligned: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Form  # int8 or int16, the shape of the weight
    scale: Form  # float, [1, 1], [O, 1] or [O, G]
    zero: Form | None = None  # integer, shaped like scale
    bits: int = 8
    group: int = 0  # inputs per group, along the flattened row; 0: the whole row, or `runs` or `member`
    axis: int = 0  # the axis of rows
    runs: tuple[int, ...] = ()
    member: Form | None = None

    def decode(self, keep: Tensor | None = None) -> Tensor:
        codes = self.codes.decode(keep)
        zero = None if self.zero is None else self.zero.decode()
        rows = dequantize(to_rows(codes, self.axis), self.scale.decode(), zero, self.grouping)
        return from_rows(rows, tuple(codes.shape), self.axis)

    def zeroed(self, where: Tensor) -> Form | None:
        codes = self.codes.decode()
        new = Dense(torch.where(where.cpu(), codes.new_zeros(()), codes))
        return None if self.zero is not None else self.replace(codes=new)

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        self.fact_of_rows(facts, torch.int8, torch.int16)
        demand(1 <= self.bits <= 16, f"bits {self.bits}, but 1 to 16 are read")
        if "zero" in facts:
            zero, scale = facts["zero"], facts["scale"]
            demand(zero.dtype in INTEGERS, f"zero of {zero.dtype}")
            demand(zero.shape == scale.shape, f"zero {list(zero.shape)}, scale {list(scale.shape)}")
        return Fact(facts["codes"].shape, facts["scale"].dtype)
