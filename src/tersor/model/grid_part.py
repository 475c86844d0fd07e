"""Grid parts: a grid on an edge while a model runs, trains or is exported.

simulated   x rounded in float, with gradients for x and the scale        see maths/rounding.py
dynamic     the same with the scale that spans each x; gradients for x
exported    one node tersor::grid(x, scale, zero, bits, signed, axis), which a runtime's writer converts;
            of a dynamic grid tersor::dynamic_grid(x), of one on all that an LSTM multiplies
            tersor::dynamic_lstm: spelled_lstm.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tersor.errors import RefusedError, SettingError
from tersor.forms import Dense
from tersor.forms.grid import Grid
from tersor.maths.rounding import dynamic, learned, on_grid, scale_gradient_factor
from tersor.maths.uniform_grid import code_limits
from tersor.maths.units import TINY, check_bits
from tersor.model.spelled_lstm import ALL, State, marked_lstm, spelled_lstm
from tersor.model.trainable_parts import StepsPart


class GridPart(nn.Module):
    """A Grid as a module: its scale [1] or [C] is trained as a factor of the first one, for the reason in
    StepsPart; `zero` is fixed. A dynamic one has neither."""

    zero: Tensor

    def __init__(self, name: str, grid: Grid):
        super().__init__()
        self.name, self.grid, self.limits = name, grid, code_limits(grid.bits, grid.signed)
        self.marked = False  # True in a copy for export: the grid is one node
        if grid.scale is None:
            return
        if name.endswith(ALL):
            raise SettingError(f"{name}: the grid has a scale, but an LSTM's must be dynamic, without one")
        scale = grid.scale.decode().float().clone()
        zero = torch.zeros(scale.shape) if grid.zero is None else grid.zero.decode().clone()
        check(name, grid, scale, zero)
        self.steps = StepsPart(Dense(scale))
        self.register_buffer("zero", zero.to(narrowest(grid)))

    @property
    def scale(self) -> Tensor:
        # An exported copy has the scale as a constant, not as a product.
        return self.steps.start if self.marked else self.steps.value()

    def value(self, x: Tensor) -> Tensor:
        """x rounded to the grid, with x's shape and dtype."""
        grid = self.grid
        if grid.scale is None:
            return torch.ops.tersor.dynamic_grid(x) if self.marked else dynamic(x)
        if self.marked:
            return torch.ops.tersor.grid(x, self.scale, self.zero, grid.bits, grid.signed, grid.axis)
        ease = scale_gradient_factor(x.shape, self.zero.numel(), self.limits[1])
        scale, zero = (spread(self.name, values, x, grid.axis) for values in (self.scale, self.zero))
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            return learned(x, scale, zero, self.limits, ease)
        return on_grid(x, scale.abs().clamp_min(TINY), zero, self.limits)

    def lstm(self, *args: Any, **kwargs: Any) -> State:
        """In place of torch.lstm: the same with all that it multiplies rounded."""
        if self.marked:
            return marked_lstm(*args, **kwargs)
        return spelled_lstm(self.value, *args, **kwargs)

    def fold(self) -> Grid:
        """The grid with the trained scale."""
        if self.grid.scale is None:
            return self.grid
        return self.grid.replace(scale=Dense(self.scale.detach().cpu().abs().clamp_min(TINY)))


def outdated(grid: Grid) -> Grid:
    """The grid after a change of the model. Of a dynamic one nothing was calibrated."""
    return grid if grid.scale is None else grid.replace(stale=True)


def spread(name: str, values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value, or one per channel along `axis`, reshaped to broadcast to x."""
    if len(values) == 1:
        return values.reshape(())
    if axis >= x.ndim or x.shape[axis] != len(values):
        raise RefusedError(
            f"{name}: a grid of {len(values)} channels on axis {axis}, but the edge is now {list(x.shape)}. "
            f"Calibrate again: a cut, or another model, has changed the edge."
        )
    return values.reshape([-1 if at == axis else 1 for at in range(x.ndim)])


def narrowest(grid: Grid) -> torch.dtype:
    """The dtype of the zero point; runtimes read the type of the codes from it."""
    return torch.int32 if grid.bits > 8 else torch.int8 if grid.signed else torch.uint8


def check(name: str, grid: Grid, scale: Tensor, zero: Tensor) -> None:
    """Refuse a grid that cannot round, or that is stale."""
    if grid.stale:
        raise RefusedError(
            f"{name}: its grid is stale: the model has changed since calibration. Calibrate this edge again."
        )
    check_bits(name, grid.bits, 1, 16)
    low, high = code_limits(grid.bits, grid.signed)
    if scale.ndim != 1 or scale.shape != zero.shape or grid.axis < 0:
        raise SettingError(
            f"{name}: a grid has scale {list(scale.shape)}, zero {list(zero.shape)}, axis={grid.axis}, but "
            f"scale and zero must be [1], or [C] along an axis counted from 0"
        )
    if not (scale.isfinite() & (scale > 0)).all():
        raise SettingError(f"{name}: a grid has a scale that is not a positive number")
    if ((zero < low) | (zero > high)).any() or not torch.equal(zero, zero.round()):
        raise SettingError(f"{name}: a grid's zero point must be one of its codes, {low} to {high}")


@torch.library.custom_op("tersor::dynamic_grid", mutates_args=())
def dynamic_op(x: Tensor) -> Tensor:
    """x rounded to the grid that spans it, as one operator of an exported graph."""
    return dynamic(x.detach()).clone()


@dynamic_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tersor::grid", mutates_args=())
def grid_op(  # noqa: PLR0917  an operator has no keywords
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, axis: int
) -> Tensor:
    """x rounded to a grid, as one operator of an exported graph. The arguments are fields of forms.Grid."""
    limits = code_limits(bits, signed)
    scale, zero = (spread("tersor::grid", values, x, axis) for values in (scale, zero))
    return on_grid(x, scale, zero, limits)


@grid_op.register_fake
def _(x: Tensor, *grid: Any) -> Tensor:
    return torch.empty_like(x)


def uses(program: ExportedProgram) -> int:
    """How often a traced program rounds an edge."""
    ours = torch.ops.tersor
    marks = (ours.grid.default, ours.dynamic_grid.default, ours.dynamic_lstm.default)
    return sum(node.target in marks for node in program.graph.nodes)
