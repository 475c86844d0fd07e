"""Compensation: round weights to small integers so that the outputs of their layer change least.

min sum_o (q_o - w_o) H (q_o - w_o)^T      w, q [G, O, I]; H [G, I, I] the second moment of a group's inputs
gptq     column by column, those of large inputs first; the error of each goes into the columns that are not
         rounded yet, by the Cholesky factor of the inverse of H (OBS, Hassibi 1993; GPTQ, Frantar 2022)
descent  then each code moves to the best one given all others (QuantEase, Behdin 2023)
search   of several ranges, the one whose rounded weights cost least; then the least squares scale for the
         codes, and codes for the scale. A row that rounding to the nearest suits better keeps that
cost     O * I * I for each of about 25 sweeps (2 without the search), and G * I^3 for the factors
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.maths.ranges import minmax_range
from tersor.maths.rate_distortion import factor
from tersor.maths.uniform_grid import limits, spanning, uniform_grid
from tersor.maths.units import to_units, unit_mask

BLOCK = 64  # columns rounded before the others are updated by one matrix product
SHRINK = 0.93  # ratio of neighboring ranges in the search
TRIED = 18  # ranges, down to 0.93^17 = 29 % of the full one
PASSES = 8  # most passes of descent
REFITS = 3  # times that scales are fitted to codes, and codes to scales
LEAST = 1e-30  # divisors are at least this


@dataclass(frozen=True, eq=False)
class Rows:
    """Weights to be rounded, and what an error in them costs."""

    w: Tensor  # float32 [G, O, I]
    moment: Tensor  # float64 [G, I, I]
    keep: Tensor | None  # bool [G, O, I]: where it is False, the rounded weight is 0
    order: Tensor  # int64 [G, I]: columns as they are rounded
    push: Tensor  # float32 [G, I, I], columns in that order: compensation of an error in later columns

    @classmethod
    def of(cls, w: Tensor, moment: Tensor, keep: Tensor | None = None, *, damp: float, who: str) -> Rows:
        """`damp`: fraction of the mean diagonal added to the diagonal for the compensation, not for the cost.
        RefusedError for moments with NaN or infinity, or without an inverse in spite of `damp`."""
        moment = moment.double()
        order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        ordered = [m[at][:, at] for m, at in zip(moment, order, strict=True)]
        sides = [factor(m, len(m), damp=damp, who=who) for m in ordered]
        push = torch.stack([side.push for side in sides if side.push is not None])
        return cls(w.float(), moment, keep, order, push)

    def cost(self, rounded: Tensor) -> Tensor:
        """The cost of each row [G, O], float64."""
        gap = rounded.double() - self.w
        return ((gap @ self.moment) * gap).sum(-1).clamp_min(0)


@dataclass(frozen=True, eq=False)
class OnGrid:
    """Codes on a uniform grid: (codes - zero) * scale."""

    codes: Tensor  # float32 [G, O, I], whole numbers
    scale: Tensor  # float32 [G, O, n] for n groups of columns; [1, 1, 1] for the tensor
    zero: Tensor | None  # float32, shaped like scale
    bits: int
    per: str
    group: int  # columns that share a scale

    def decode(self) -> Tensor:
        return (self.codes - self.shift) * self.step

    @property
    def step(self) -> Tensor:
        """The scale of each weight."""
        return self.spread(self.scale)

    @property
    def shift(self) -> Tensor:
        """The zero point of each weight."""
        return self.spread(torch.zeros_like(self.scale) if self.zero is None else self.zero)

    def spread(self, table: Tensor) -> Tensor:
        columns = self.codes.shape[-1]
        wide = table if table.shape[-1] == 1 else table.repeat_interleave(self.group, -1)[..., :columns]
        return wide.expand_as(self.codes)

    @property
    def ends(self) -> tuple[int, int]:
        return limits(self.bits, self.zero is None)

    def nearest(self, rows: Rows) -> OnGrid:
        shift = self.shift
        codes = (rows.w / self.step).round_().add_(shift).clamp_(*self.ends)
        return replace(self, codes=codes if rows.keep is None else torch.where(rows.keep, codes, shift))

    def on(self, rows: Rows, scale: Tensor, zero: Tensor) -> OnGrid:
        """Rounding to the nearest on other grids of this kind; tables with a value for each unit."""
        zero = zero.reshape(self.scale.shape).float()
        scale = scale.reshape(self.scale.shape)
        return replace(self, scale=scale, zero=None if self.zero is None else zero).nearest(rows)


def nearest(
    rows: Rows, bits: int, *, per: str = "channel", group: int = 64, symmetric: bool = True,
    range: str = "minmax", percentile: float = 99.9, ends: tuple[float, float] | None = None,
) -> OnGrid:  # fmt: skip
    """Rounding to the nearest; the settings are those of uniform_grid."""
    outs = rows.w.shape[1]
    keep = None if rows.keep is None else rows.keep.flatten(0, 1)
    codes, scale, zero = uniform_grid(
        rows.w.flatten(0, 1), bits, per=per, group=group, symmetric=symmetric, range=range,
        percentile=percentile, ends=ends, keep=keep,
    )  # fmt: skip
    shape = (1, 1, 1) if per == "tensor" else (-1, outs, scale.shape[1])
    shift = None if zero is None else zero.float().reshape(shape)
    made = OnGrid(codes.float().reshape(rows.w.shape), scale.reshape(shape), shift, bits, per, group)
    return made if rows.keep is None else replace(made, codes=torch.where(rows.keep, made.codes, made.shift))


def compensated(rows: Rows, base: OnGrid, *, search: bool) -> OnGrid:
    """The rounding that costs least of those that were tried, row by row; `base` is one of them. Its grids
    are kept without `search`."""
    best = better(rows, base, gptq(rows, base))
    for tried in shrunk(rows, base) if search else ():
        best = better(rows, best, gptq(rows, tried))
    best = better(rows, best, descent(rows, best))
    if search:
        for _ in range(REFITS):
            fitted = refitted(rows, best)
            for made in (fitted, descent(rows, fitted), gptq(rows, fitted)):
                best = better(rows, best, made)
    return best


def better(rows: Rows, one: OnGrid, other: OnGrid) -> OnGrid:
    """Row by row the one that costs less; as a whole if all rows share a scale."""
    a, b = rows.cost(one.decode()), rows.cost(other.decode())
    if one.per == "tensor":
        return other if b.sum() < a.sum() else one
    wins = (b < a)[..., None]
    zero = None if one.zero is None or other.zero is None else torch.where(wins, other.zero, one.zero)
    codes, scale = torch.where(wins, other.codes, one.codes), torch.where(wins, other.scale, one.scale)
    return replace(one, codes=codes, scale=scale, zero=zero)


def gptq(rows: Rows, grid: OnGrid) -> OnGrid:
    """Codes on the same grid, with compensation."""
    at = rows.order[:, None].expand_as(rows.w)
    target, step, shift = (t.gather(-1, at) for t in (rows.w, grid.step, grid.shift))
    keep = None if rows.keep is None else rows.keep.gather(-1, at)
    (low, high), columns = grid.ends, target.shape[-1]
    codes = torch.empty_like(target)
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        errors = target[..., a:b].clone()  # what is left of a column after it is rounded
        for k in range(a, b):
            x, zero = errors[..., k - a], shift[..., k]
            code = (x / step[..., k]).round_().add_(zero).clamp_(low, high)
            if keep is not None:
                code = torch.where(keep[..., k], code, zero)
            codes[..., k] = code
            x -= (code - zero) * step[..., k]
            errors[..., k - a + 1 :] -= x[..., None] * rows.push[:, None, k, k + 1 : b]
        target[..., b:] -= errors @ rows.push[:, a:b, b:]
    return replace(grid, codes=torch.empty_like(codes).scatter_(-1, at, codes))


def descent(rows: Rows, grid: OnGrid, ends: tuple[Tensor, Tensor] | None = None) -> OnGrid:
    """Codes on the same grid, each moved to the best one given all others, within `ends` [G, O, I] (default:
    those of the grid). The cost does not grow."""
    moment = (rows.moment / rows.moment.amax().clamp_min(LEAST)).float()
    weight = moment.diagonal(dim1=1, dim2=2)[:, None]  # [G, 1, I]
    codes, step, shift = grid.codes.clone(), grid.step, grid.shift
    low, high = ends or (codes.new_tensor(end).expand_as(codes) for end in grid.ends)
    slope = (grid.decode() - rows.w) @ moment  # [G, O, I], half the gradient
    for _ in range(PASSES):
        moved = False
        for k in range(codes.shape[-1]):
            down = slope[..., k] / (weight[..., k] * step[..., k]).clamp_min(LEAST)
            code = (codes[..., k] - down).round_().clamp_(low[..., k], high[..., k])
            if rows.keep is not None:
                code = torch.where(rows.keep[..., k], code, shift[..., k])
            code = torch.where(weight[..., k] > 0, code, codes[..., k])
            change = (code - codes[..., k]) * step[..., k]
            if bool(change.any()):
                moved = True
                slope += change[..., None] * moment[:, k, None]
                codes[..., k] = code
        if not moved:
            break
    return replace(grid, codes=codes)


def refitted(rows: Rows, grid: OnGrid) -> OnGrid:
    """The scales of each row, or the one of all, that cost least with these codes."""
    steps = (grid.codes - grid.shift).double()
    pulled = steps @ rows.moment
    if grid.scale.shape[-1] > 1:
        scale = each_group(rows, grid, steps)
    else:
        fit, size = (pulled * rows.w).sum(-1), (pulled * steps).sum(-1)
        if grid.per == "tensor":
            fit, size = fit.sum(), size.sum()
        scale = fit / size.clamp_min(1e-300)
    scale = scale.float().reshape(grid.scale.shape)
    # Far from the old one it would only fit the noise of an input that is nearly constant.
    fine = (scale > grid.scale / 4) & (scale < grid.scale * 4)
    return replace(grid, scale=torch.where(fine, scale, grid.scale))


def each_group(rows: Rows, grid: OnGrid, steps: Tensor) -> Tensor:
    """The scales [G, O, n] of a row's n groups of columns, which depend on each other: n equations a row."""
    spans = range(0, steps.shape[-1], grid.group)
    parts = [slice(a, a + grid.group) for a in spans]
    each = torch.stack([steps[..., p] @ rows.moment[:, p] for p in parts], -2)  # [G, O, n, I]
    fit = (each * rows.w[:, :, None]).sum(-1)  # [G, O, n]
    size = torch.stack([(each[..., p] * steps[:, :, None, p]).sum(-1) for p in parts], -1)  # [G, O, n, n]
    mean = size.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    size = size + (1e-6 * mean + 1e-300) * torch.eye(len(parts), dtype=size.dtype)
    return torch.linalg.solve(size, fit[..., None])[..., 0]


def shrunk(rows: Rows, base: OnGrid) -> list[OnGrid]:
    """Rounding to the nearest on grids of smaller ranges. The last one has for each unit the range that costs
    least if correlations of inputs are ignored."""
    flat = rows.w.flatten(0, 1)
    keep = None if rows.keep is None else rows.keep.flatten(0, 1)
    low, high = minmax_range(
        to_units(flat, base.per, base.group), unit_mask(flat, keep, base.per, base.group)
    )
    weight = rows.moment.diagonal(dim1=1, dim2=2)[:, None]
    found, least = [], torch.full_like(base.scale, torch.inf, dtype=torch.float64)
    best = base
    for k in range(TRIED):
        ends = low * SHRINK**k, high * SHRINK**k
        made = base.on(rows, *spanning(*ends, base.bits, base.zero is None))
        found.append(made)
        loss = ((made.decode() - rows.w).double().square() * weight).flatten(0, 1)
        loss = to_units(loss, base.per, base.group).sum(1).reshape(base.scale.shape)
        wins = loss < least
        least = torch.where(wins, loss, least)
        zero = None if best.zero is None or made.zero is None else torch.where(wins, made.zero, best.zero)
        best = replace(best, scale=torch.where(wins, made.scale, best.scale), zero=zero)
    return [*found, best.nearest(rows)]
