"""Codebook: each weight is an index into a short table of shared values.

w[o, i] = book[index[o, i]] * scale[o]      Han, Mao, Dally 2016 (k-means)
                                            binary and ternary weights: K = 2 and 3
stored  log2(K) bits per weight before coding, 32 bits per table entry, 32 per scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.dtypes import FLOATS
from tersor.forms.form import Fact, Facts, Form, Shape, demand, from_rows, to_rows, wider
from tersor.forms.ongrid import OnGrid


@dataclass(frozen=True, eq=False, repr=False)
class Codebook(OnGrid):
    """Indices into a table, times an optional scale."""

    name: ClassVar[str] = "codebook"
    aligned: ClassVar[tuple[str, ...]] = ("index",)
    index: Form  # uint8 or int16, the shape of the weight
    book: Form  # float [K], or one table per row [O, K]
    scale: Form | None = None  # float, [1, 1] or [O, 1]
    axis: int = 0  # the axis of rows

    def decode(self, keep: Tensor | None = None) -> Tensor:
        index = self.index.decode(keep)
        rows, book = to_rows(index, self.axis).long(), self.book.decode()
        w = book[rows] if book.ndim == 1 else book.gather(1, rows)  # [O, I]
        if self.scale is not None:
            w = w * self.scale.decode()
        return from_rows(w, tuple(index.shape), self.axis)

    def bounds(self) -> dict[str, tuple[int, int, str]]:
        return {"index": (0, self.book.shape[-1] - 1, "table entries")}

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        rows, _ = self.fact_of_rows(facts, torch.uint8, torch.int16)
        book = facts["book"]
        fine = len(book.shape) == 1 or (len(book.shape) == 2 and book.shape[0] == rows)
        demand(fine and book.shape[-1] >= 1, f"a table of {list(book.shape)} for {rows} rows")
        demand(book.dtype in FLOATS, f"a table of {book.dtype}")
        return Fact(facts["index"].shape, wider(book, facts.get("scale", book)))
