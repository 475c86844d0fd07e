"""LogGrid: signs and powers of two.

w[o, i] = sign(code) * levels[|code|] * scale[o]      levels: 0 and 2^-k, or sums of two such terms
stored  `bits` per weight before coding; multiplying by a level takes one shift or two
source  Miyashita 2016; Li 2020 (APoT)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.forms.form import Fact, Facts, Form, Shape, demand, from_rows, to_rows
from tersor.forms.ongrid import OnGrid
from tersor.maths.levels import from_levels


@dataclass(frozen=True, eq=False, repr=False)
class LogGrid(OnGrid):
    """Signed codes that index logarithmic levels, with a scale."""

    name: ClassVar[str] = "loggrid"
    aligned: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Form  # int8, the shape of the weight
    scale: Form  # float, [1, 1], [O, 1] or [O, G]
    bits: int = 4
    terms: int = 1  # powers of two that add up to a level
    group: int = 0  # groups of inputs as in Affine
    axis: int = 0
    runs: tuple[int, ...] = ()
    member: Form | None = None

    def decode(self, keep: Tensor | None = None) -> Tensor:
        codes, scale = self.codes.decode(keep), self.scale.decode()
        rows = from_levels(to_rows(codes, self.axis), scale, self.bits, self.terms, self.grouping)
        return from_rows(rows, tuple(codes.shape), self.axis)

    def bounds(self) -> dict[str, tuple[int, int, str]]:
        top = 2 ** (self.bits - 1) - 1
        return {"codes": (-top, top, "levels"), **super().bounds()}

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        self.fact_of_rows(facts, torch.int8)
        fine = 2 <= self.bits <= 8 and self.terms in (1, 2)
        demand(fine, f"bits {self.bits}, terms {self.terms}, but 2 to 8 and 1 or 2 are read")
        return Fact(facts["codes"].shape, facts["scale"].dtype)
