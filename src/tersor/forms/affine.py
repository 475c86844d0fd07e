"""Affine: small integers on an even grid.

w[o, i] = (codes[o, i] - zero[o]) * scale[o]      one grid per tensor [1, 1], row [O, 1] or group of S
    inputs [O, G]
stored  bits a weight before coding, 32 bits a scale, 16 a zero; symmetric grids have no zero
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tersor.forms.dense import Dense
from tersor.forms.form import Form, from_rows, to_rows
from tersor.maths.affine import dequantize


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Form):
    """Integer codes with a scale, and a zero where the grid is not symmetric."""

    name: ClassVar[str] = "affine"
    aligned: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Form  # int8 or int16, the shape of the weight
    scale: Form  # float, [1, 1], [O, 1] or [O, G]
    zero: Form | None = None  # integer, shaped like scale
    bits: int = 8
    group: int = 0  # inputs a grid, counted along the flattened row; 0: the whole row
    axis: int = 0  # the axis of rows

    def decode(self, keep: Tensor | None = None) -> Tensor:
        codes = self.codes.decode(keep)
        zero = None if self.zero is None else self.zero.decode()
        rows = dequantize(to_rows(codes, self.axis), self.scale.decode(), zero, self.group)
        return from_rows(rows, tuple(codes.shape), self.axis)

    def take(self, axis: int, index: Tensor) -> Form:
        return take_rows(self, axis, index, "codes", ("scale", "zero"))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


def take_rows(form: Any, axis: int, index: Tensor, codes: str, per_row: tuple[str, ...]) -> Form:
    """`take` for grids: codes follow any axis; what is kept once per row follows the axis of rows.

    Groups of inputs do not survive a cut through them, so there the result is Dense.
    """
    axis = axis % len(form.shape)
    vector = len(form.shape) == 1  # a vector is one row: all its grids lie along the axis that is cut
    if (axis != form.axis or vector) and form.group:
        return Dense(form.decode().index_select(axis, index))
    fields = {codes: getattr(form, codes).take(axis, index)}
    for key in per_row:
        child = getattr(form, key)
        if child is not None and axis == form.axis and not vector and child.shape[0] == form.shape[axis]:
            fields[key] = child.take(0, index)
    return form.replace(**fields)
