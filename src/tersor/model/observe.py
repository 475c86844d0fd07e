"""Observe: grids for chosen edges from the values on them over the calibration batches.

low, high = the range of the values, 0 included; methods: edge_values.py
scale     = (high - low) / (levels - 1)
Values of padding tokens and of additive attention masks set no range.
Cost: one pass over the calibration batches. Ranges from histograms add about 2.5 ns for each value on a
chosen edge, and 16 kB of memory an edge, for any number of batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SiteError
from tersor.forms import Dense
from tersor.forms.grid import Grid
from tersor.maths.activation_ranges import Range
from tersor.maths.uniform_grid import code_limits, limits, spanning
from tersor.maths.units import check_bits
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.calibration import FAR_ON_GRIDS, Seen
from tersor.model.edge_values import RANGES, EdgeValues, check_range
from tersor.model.edges import near, parse
from tersor.model.logits import is_encoder_decoder, unpadded
from tersor.model.task import Task
from tersor.model.watch import WatchedRun, hooked, running

__all__ = ["RANGES", "Range", "Ranges", "grid_of", "observed", "ranges_of", "values_of"]


class Ranges(WatchedRun):
    """A run that keeps what ranges need of the named edges, over all batches."""

    def __init__(self, names: Iterable[str], axis: int | None, range: str = "minmax", pair: bool = False,
                 refused: dict[str, str] | None = None):  # fmt: skip
        """`pair`: the model is an encoder-decoder that computes the decoder's inputs itself. `refused`: takes
        the edges whose values no range holds, with the reason."""
        super().__init__(self.observe, inputs=True, wanted=(names := list(names)))
        self.values = {name: EdgeValues(name, axis, range) for name in names}
        self.seen: dict[str, None] = {}  # every edge, chosen or not, in order
        self.pair, self.refused = pair, refused
        self.batch: Any = None  # the present one

    @property
    def found(self) -> dict[str, Range]:
        """The least and greatest value of each edge that had values."""
        return {name: values.ends for name, values in self.values.items() if values.ends is not None}

    def observe(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = None
        if name in self.values:
            try:
                self.values[name].add(x, self.tokens(name, x))
            except RefusedError as error:
                if self.refused is None:
                    raise
                text = str(error).removeprefix(f"{name}: ")
                self.refused[name] = text.removesuffix(". Leave this edge out.")
        return x

    def tokens(self, name: str, x: Tensor) -> Tensor | None:
        """Which tokens of x [B, T, ...] are not padding, bool [B, T]; None if all count.

        A tensor of two axes may be [B, C] with as many channels as tokens, so all its values count.
        """
        if x.ndim < 3:
            return None
        pair = self.pair or is_encoder_decoder(None, self.batch)
        decoder = pair and "encoder" not in parse(name)[0].split(".")
        mask = unpadded(self.batch, tuple(x.shape[:2]), x.device, decoder=decoder)
        return None if mask is None or bool(mask.all()) else mask


def values_of(
    model: nn.Module,
    task: Task,
    names: Iterable[str],
    *,
    axis: int | None = None,
    range: str = "minmax",
    data: str = "calibrate",
    refused: dict[str, str] | None = None,
    sound: bool = False,
) -> dict[str, EdgeValues]:
    """What ranges need of the values on each named edge, over the batches of a set of the task, in eval mode.

    SiteError if no batch has values on an edge, RefusedError for values that no range holds; with `refused`,
    such an edge is put there with the reason; with `sound`, TaskError for inputs that no model is meant for,
    as calibration.py says. The model and all random state are left as they were.
    """
    check_range(range, axis)
    for name in (wanted := list(names)):
        parse(name)
    net = hooked(copy.deepcopy(model))
    pair = bool(getattr(getattr(net, "config", None), "is_encoder_decoder", False))
    run = Ranges(wanted, axis, range, pair, refused)
    seen = Seen(task.inputs if task.feed is None else lambda batch: (), f"task {task.name!r}")
    with evaluating(net), steady(getattr(task, data, None)):
        for batch in task.batches(data):
            run.batch = move(batch, device_of(net))
            with running(run):
                task.answer(net, run.batch)
            seen.add(batch)
    if sound:
        seen.refuse_damaged(FAR_ON_GRIDS)
        seen.refuse_blank()
    for name, values in run.values.items():
        if name not in run.seen:
            raise SiteError(f"calibration: no batch reaches the edge {name!r}; {near(name, run.seen)}")
        if values.ends is None and name not in (refused or {}):
            why = "all its tokens are padding" if values.padded else "it is empty in every batch"
            raise SiteError(f"calibration: the edge {name!r} has no values: {why}. Leave this edge out.")
    return run.values


def ranges_of(
    model: nn.Module,
    task: Task,
    names: Iterable[str],
    *,
    axis: int | None = None,
    range: str = "minmax",
    bits: int = 8,
    percentile: float = 99.99,
) -> dict[str, Range]:
    """The range of each named edge over the calibration batches, (low, high) float64 [1], or [C] for the
    indices of `axis`.

    `range`: a method of RANGES. `bits` of the grid is for "mse" and "entropy", `percentile` in percent.
    """
    check_range(range, axis, bits=bits, percentile=percentile)
    found = {}
    for name, values in values_of(model, task, names, axis=axis, range=range).items():
        if (ends := values.range(bits=bits, percentile=percentile)) is not None:
            found[name] = ends
    return found


def grid_of(found: Range, *, bits: int = 8, signed: bool = False, axis: int = 1) -> Grid:
    """The grid that spans a range: values in the range are clipped by half a step at most, and 0 is exact."""
    check_bits("grid_of", bits, 1, 16)
    scale, zero = spanning(*found, bits, symmetric=False)
    # `spanning` gives zero points for signed codes. int16 holds those of unsigned codes up to 15 bits too.
    zero = zero - limits(bits, False)[0] + code_limits(bits, signed)[0]
    return Grid(Dense(scale), Dense(zero.to(torch.int32 if bits > 8 else torch.int16)), bits, signed, axis)


def symmetric_grid(found: Range, *, bits: int = 8) -> Grid:
    """The grid of signed codes without a zero point that spans a range; unsigned ones if it begins at 0."""
    if not found[0].any():
        return grid_of(found, bits=bits)
    scale, zero = spanning(*found, bits, symmetric=True)
    return Grid(Dense(scale), Dense(zero.to(torch.int32 if bits > 8 else torch.int16)), bits, True)


def observed(
    model: nn.Module,
    task: Task,
    names: Iterable[str],
    *,
    bits: int = 8,
    signed: bool = False,
    axis: int | None = None,
    range: str = "minmax",
    percentile: float = 99.99,
) -> dict[str, Grid]:
    """A grid for each named edge, over its range."""
    ranges = ranges_of(model, task, names, axis=axis, range=range, bits=bits, percentile=percentile)
    along = 1 if axis is None else axis
    return {name: grid_of(found, bits=bits, signed=signed, axis=along) for name, found in ranges.items()}
