"""LogGrid: signs and powers of two.

w[o, i] = sign(code) * levels[|code|] * scale[o]      levels: 0 and 2^-k, or sums of two such terms
stored  bits a weight before coding; multiplying by a level is a shift, or two     Miyashita 2016; Li 2020
    (APoT)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.forms.affine import take_rows
from tersor.forms.form import Form, from_rows, to_rows
from tersor.maths.levels import from_levels


@dataclass(frozen=True, eq=False, repr=False)
class LogGrid(Form):
    """Signed codes of logarithmic levels, with a scale."""

    name: ClassVar[str] = "loggrid"
    aligned: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Form  # int8, the shape of the weight
    scale: Form  # float, [1, 1], [O, 1] or [O, G]
    bits: int = 4
    terms: int = 1  # powers of two a level is the sum of
    group: int = 0
    axis: int = 0

    def decode(self, keep: Tensor | None = None) -> Tensor:
        codes = self.codes.decode(keep)
        rows = from_levels(to_rows(codes, self.axis), self.scale.decode(), self.bits, self.terms, self.group)
        return from_rows(rows, tuple(codes.shape), self.axis)

    def take(self, axis: int, index: Tensor) -> Form:
        return take_rows(self, axis, index, "codes", ("scale",))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape
