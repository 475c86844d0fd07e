"""Grid parts: a grid on an edge while a model runs, trains or is exported.

simulated   x rounded in float, with gradients to x and to the scale      see maths/rounding.py
exported    one node tersor::grid(x, scale, zero, bits, signed, axis), which a runtime's writer makes its own
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError
from tersor.forms.grid import Grid
from tersor.maths.rounding import ease_of, learned, on_grid
from tersor.maths.units import TINY, check_bits


class GridPart(nn.Module):
    """The side of a Grid that runs: `scale` [1] or [C] learns, `zero` stands."""

    zero: Tensor

    def __init__(self, name: str, grid: Grid):
        super().__init__()
        check(name, grid)
        self.name, self.grid = name, grid
        self.marked = False  # in a copy that is exported: one node stands for the grid
        self.scale = nn.Parameter(grid.scale.detach().float().clone())
        self.register_buffer("zero", grid.zero.detach().clone())

    def value(self, x: Tensor) -> Tensor:
        """x on the grid, of x's shape and dtype."""
        grid = self.grid
        if self.marked:
            return torch.ops.tersor.grid(x, self.scale, self.zero, grid.bits, grid.signed, grid.axis)
        scale, zero = (spread(self.name, values, x, grid.axis) for values in (self.scale, self.zero))
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            ease = ease_of(x.shape, self.scale.numel(), grid.limits[1])
            return learned(x, scale, zero, grid.limits, ease)
        return on_grid(x, scale.abs().clamp_min(TINY), zero, grid.limits)

    def fold(self) -> Grid:
        """The grid as it has been learned."""
        scale = self.scale.detach().cpu().float().abs().clamp_min(TINY)
        return self.grid.replace(scale=scale.clone(), zero=self.zero.detach().cpu().clone())


def spread(name: str, values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value for the tensor, or one for each channel, shaped to be broadcast to x."""
    if axis < 0:
        return values.reshape(())
    if axis >= x.ndim or x.shape[axis] != len(values):
        raise RefusedError(
            f"{name}: a grid of {len(values)} channels on axis {axis}, but the edge is now {list(x.shape)}. "
            f"Calibrate again: a cut, or another model, has changed the edge."
        )
    return values.reshape([-1 if at == axis else 1 for at in range(x.ndim)])


def check(name: str, grid: Grid) -> None:
    """Refuse a grid that cannot round: sizes that disagree, scales not positive, a zero out of range."""
    check_bits(name, grid.bits, 1, 16)
    low, high = grid.limits
    shape = tuple(grid.scale.shape)
    if len(shape) != 1 or shape != tuple(grid.zero.shape) or (grid.axis < 0 and shape != (1,)):
        raise SettingError(
            f"{name}: a grid with axis={grid.axis} has scale {list(shape)} and zero {list(grid.zero.shape)}, "
            f"but both are [1] with axis=-1, else [C]"
        )
    if not (grid.scale.isfinite() & (grid.scale > 0)).all():
        raise SettingError(f"{name}: a grid has a scale that is not a positive number")
    if grid.zero.is_floating_point() or not ((grid.zero >= low) & (grid.zero <= high)).all():
        raise SettingError(
            f"{name}: a grid's zero is an integer, {low} to {high} for {grid.bits} bits "
            f"{'signed' if grid.signed else 'unsigned'}"
        )


@torch.library.custom_op("tersor::grid", mutates_args=())
def grid_op(  # noqa: PLR0917  an operator has no keywords
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, axis: int
) -> Tensor:
    """x on a grid, as one operator of an exported graph; its fields are those of forms.Grid."""
    limits = Grid(scale, zero, bits, signed, axis).limits
    scale, zero = (spread("tersor::grid", values, x, axis) for values in (scale, zero))
    return on_grid(x, scale, zero, limits)


@grid_op.register_fake
def _(x: Tensor, *grid: Any) -> Tensor:
    return torch.empty_like(x)
