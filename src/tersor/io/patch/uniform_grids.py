"""Uniform grids of a patch: old codes are moved to the new grid before they are compared with new ones.

moved = round((code - zero) * scale / SCALE + ZERO)        docs/format.md section 12, "Grids"
A scale or zero is a leaf, or a product with one term: the order of a longer sum is not fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tersor.forms import Coded, Dense, Form, LowRank
from tersor.forms.form import from_rows, to_rows


class UniformGrid(NamedTuple):
    """A uniform grid: codes represent (codes - zero) * scale."""

    scale: Tensor  # [1, 1], [O, 1] or [O, G]
    zero: Tensor | None
    group: int
    axis: int

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether codes of this shape can be on this grid."""
        if self.axis >= max(len(shape), 1) or (self.zero is not None and self.zero.shape != self.scale.shape):
            return False
        rows, inputs = to_rows(torch.empty(shape, device="meta"), self.axis).shape
        allowed = {(1, 1), (rows, 1)} | ({(rows, -(-inputs // self.group))} if self.group > 0 else set())
        return tuple(self.scale.shape) in allowed

    def tables(self, inputs: int) -> tuple[Tensor, Tensor]:
        """(scale, zero) that broadcast over [O, inputs], in float64."""
        both = [self.scale, torch.zeros_like(self.scale) if self.zero is None else self.zero]
        if self.group and self.scale.shape[1] > 1:
            both = [table.repeat_interleave(self.group, 1)[:, :inputs] for table in both]
        return both[0].double(), both[1].double()


def regrid(codes: Tensor, old: UniformGrid, new: UniformGrid) -> Tensor:
    """Codes on the grid `old`, rounded to `new`; both fit them. In float64, rounded half to even."""
    rows, limits = to_rows(codes, new.axis), torch.iinfo(codes.dtype)
    (scale, zero), (scale_new, zero_new) = (grid.tables(rows.shape[1]) for grid in (old, new))
    moved = ((rows.double() - zero) * scale / scale_new + zero_new).round()
    moved = moved.nan_to_num(0.0).clamp(limits.min, limits.max).to(codes.dtype)
    return from_rows(moved, tuple(codes.shape), new.axis)


def table_of(form: Form) -> Tensor | None:
    """The decoded scale or zero of a grid. None for a form that readers may decode with other roundings."""
    inner = form.children().values() if isinstance(form, LowRank) else (form,)
    if not all(isinstance(leaf, (Dense, Coded)) for leaf in inner):
        return None
    return None if isinstance(form, LowRank) and form.left.shape[1] != 1 else form.decode()


def movable(codes: Tensor, old: UniformGrid, new: UniformGrid) -> bool:
    """Whether codes on the old grid can be rounded to the new one."""
    shape = tuple(codes.shape)
    whole = codes.dtype in (torch.int8, torch.int16)
    return whole and old.axis == new.axis and old.fits(shape) and new.fits(shape)
