"""Rounding part: a uniform grid whose codes are learned softly, each between two, and whose scales follow.

w = (below + h - zero) * scale * exp(stretch)      h, and which are settled: maths/soft_rounding.py
It begins at codes that are good already: those of gptq, which may be further from the float weight than the
level beside it. The other code of each weight is the neighbor towards the float weight. Used by
joint_rounding.py
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tersor.forms import Affine, Dense, Form
from tersor.forms.form import from_rows, to_rows
from tersor.maths.soft_rounding import inverse, pair, settled, upward
from tersor.maths.uniform_grid import expand, limits
from tersor.model.trainable_parts import Part

BEGIN = 0.8  # of the way from the other code to the given one


class RoundingPart(Part):
    """The part of an Affine form. `v` [O, I] learns the codes, `stretch` the logarithms of scales."""

    below: Tensor
    fixed: Tensor

    def __init__(self, form: Affine):
        super().__init__()
        self.form = form
        self.codes = to_rows(form.codes.decode(), form.axis).float()
        self.stretch = nn.Parameter(torch.zeros(form.scale.shape))
        self.begin(form)

    def begin(self, form: Form) -> None:
        mine = self.form
        rows = to_rows(form.decode().float(), mine.axis)
        scale, zero = (expand(t, mine.grouping, rows.shape[1]) for t in self.tables())
        below = pair(self.codes, rows / scale + zero, *limits(mine.bits, mine.zero is None))
        start = torch.where(self.codes > below, BEGIN, 1 - BEGIN)
        self.v = nn.Parameter(inverse(start))
        self.register_buffer("below", below)
        self.register_buffer("fixed", torch.zeros_like(below, dtype=torch.bool))

    def tables(self) -> tuple[Tensor, Tensor]:
        """(scale, zero) of the grid as it is given."""
        scale = self.form.scale.decode().float()
        zero = self.form.zero
        return scale, torch.zeros_like(scale) if zero is None else zero.decode().float()

    def settle(self, share: float) -> None:
        """Settle this share of the weights, those nearest to a level."""
        self.fixed = settled(self.v.detach(), self.fixed, round(share * self.v.numel()))

    def value(self) -> Tensor:
        form, device = self.form, self.v.device
        scale, zero = (table.to(device) for table in self.tables())
        columns = self.v.shape[1]
        h = torch.where(self.fixed, (self.v.detach() >= 0).float(), upward(self.v))
        steps = self.below + h - expand(zero, form.grouping, columns)
        rows = steps * expand(scale * self.stretch.exp(), form.grouping, columns)
        return from_rows(rows, tuple(form.shape), form.axis)

    def fold(self) -> Form:
        form = self.form
        codes = (self.below + (self.v.detach() >= 0)).cpu()
        dtype = form.codes.decode().dtype
        scale = self.tables()[0] * self.stretch.detach().cpu().exp()
        rows = from_rows(codes.to(dtype), tuple(form.shape), form.axis).contiguous()
        return form.replace(codes=Dense(rows), scale=Dense(cast(Tensor, scale)))
