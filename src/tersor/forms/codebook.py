"""Codebook: each weight is an index into a short table of shared values.

w[o, i] = book[index[o, i]] * scale[o]      Han, Mao, Dally 2016 (k-means); binary and ternary are books of
    2 and 3
stored  log2(K) bits a weight before coding, 32 bits an entry of the table, 32 a scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.forms.affine import take_rows
from tersor.forms.form import Form, from_rows, to_rows


@dataclass(frozen=True, eq=False, repr=False)
class Codebook(Form):
    """Indices into a table, times an optional scale."""

    name: ClassVar[str] = "codebook"
    aligned: ClassVar[tuple[str, ...]] = ("index",)
    index: Form  # uint8 or int16, the shape of the weight
    book: Form  # float [K], or one table a row [O, K]
    scale: Form | None = None  # float, [1, 1] or [O, 1]
    axis: int = 0  # the axis of rows
    group: ClassVar[int] = 0

    def decode(self, keep: Tensor | None = None) -> Tensor:
        index = self.index.decode(keep)
        rows, book = to_rows(index, self.axis).long(), self.book.decode()
        w = book[rows] if book.ndim == 1 else book.gather(1, rows)  # [O, I]
        if self.scale is not None:
            w = w * self.scale.decode()
        return from_rows(w, tuple(index.shape), self.axis)

    def take(self, axis: int, index: Tensor) -> Form:
        per_row = ("scale", "book") if len(self.book.shape) == 2 else ("scale",)
        return take_rows(self, axis, index, "index", per_row)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape
