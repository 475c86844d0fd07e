"""Observe: grids for chosen edges from the ranges of their values on calibration batches.

low, high = least and greatest value seen, 0 included      scale = (high - low) / (levels - 1)
Cost: one pass over the calibration batches, two reductions of each chosen edge; only the ranges are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError, SiteError
from tersor.forms import Dense
from tersor.forms.grid import Grid
from tersor.maths.ranges import minmax_range
from tersor.maths.uniform_grid import code_limits, limits, spanning
from tersor.maths.units import check_bits
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.edges import near, parse
from tersor.model.task import Task
from tersor.model.watch import WatchedRun, hooked, running

Range = tuple[Tensor, Tensor]  # low <= 0 <= high, float64 [1] or [C], on the CPU


class Ranges(WatchedRun):
    """A run that collects the ranges of the named edges over all batches."""

    def __init__(self, names: Iterable[str], axis: int | None):
        super().__init__(self.observe, inputs=True)
        self.names, self.axis = set(names), axis
        self.seen: dict[str, None] = {}  # every edge, chosen or not, in order
        self.found: dict[str, Range] = {}

    def observe(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = None
        if name in self.names and x.numel():
            values = x.detach()
            if self.axis is not None and not 0 <= self.axis < values.ndim:
                raise SettingError(f"{name}: axis={self.axis}, but the edge has axes 0 to {values.ndim - 1}")
            rows = values.reshape(1, -1) if self.axis is None else values.movedim(self.axis, 0).flatten(1)
            if not rows.isfinite().all():
                raise RefusedError(
                    f"{name}: the edge holds infinite or NaN values, which no grid can hold (for example "
                    f"attention scores under a mask of -inf). Leave this edge out."
                )
            low, high = (end.cpu() for end in minmax_range(rows, None))
            if name in self.found:
                before = self.found[name]
                low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            self.found[name] = low, high
        return x


def ranges_of(
    model: nn.Module, task: Task, names: Iterable[str], *, axis: int | None = None
) -> dict[str, Range]:
    """The range of each named edge over the calibration batches, in eval mode: one range for each index of
    `axis`, or one for the edge if it is None.

    SiteError if no batch reaches an edge. The model and all random state are left as they were.
    """
    for name in (wanted := list(names)):
        parse(name)
    net, run = hooked(copy.deepcopy(model)), Ranges(wanted, axis)
    with evaluating(net), steady(task.calibrate):
        for batch in task.batches("calibrate"):
            with running(run):
                task.run(net, move(batch, device_of(net)))
    for name in wanted:
        if name not in run.found:
            raise SiteError(f"calibration: no batch reaches the edge {name!r}; {near(name, run.seen)}")
    return {name: run.found[name] for name in wanted}


def grid_of(found: Range, *, bits: int = 8, signed: bool = False, axis: int = 1) -> Grid:
    """The grid that spans a range: values in the range are clipped by half a step at most, and 0 is exact."""
    check_bits("grid_of", bits, 1, 16)
    scale, zero = spanning(*found, bits, symmetric=False)
    # `spanning` gives zero points for signed codes. int16 holds those of unsigned codes up to 15 bits too.
    zero = zero - limits(bits, False)[0] + code_limits(bits, signed)[0]
    return Grid(Dense(scale), Dense(zero.to(torch.int32 if bits > 8 else torch.int16)), bits, signed, axis)


def observed(
    model: nn.Module,
    task: Task,
    names: Iterable[str],
    *,
    bits: int = 8,
    signed: bool = False,
    axis: int | None = None,
) -> dict[str, Grid]:
    """A min-max grid for each named edge."""
    ranges = ranges_of(model, task, names, axis=axis)
    along = 1 if axis is None else axis
    return {name: grid_of(found, bits=bits, signed=signed, axis=along) for name, found in ranges.items()}
