"""Edge values: what calibration keeps of the values on one edge, and the ranges found from it.

minmax      least and greatest value                                      per tensor or per channel
average     moving average of each batch's least and greatest value       the same
            kept = 0.9 * kept + 0.1 * batch; Jacob 2018, section 3.1; Krishnamoorthi 2018, section 3.1.2
percentile, mse, entropy    from a histogram: maths/activation_ranges.py  per tensor
Values of an additive attention mask are counted, but set no range. Memory does not grow with the batches.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from tersor.errors import RefusedError, SettingError
from tersor.maths.activation_ranges import (
    Range,
    entropy_ends,
    mse_ends,
    percentile_ends,
    range_between,
    union,
)
from tersor.maths.ranges import minmax_range
from tersor.maths.units import check_bits, check_choice, check_percentile
from tersor.maths.value_histogram import ValueHistogram

RANGES = {  # what is needed of the values
    "minmax": "ends",
    "average": "ends",
    "percentile": "histogram",
    "mse": "histogram",
    "entropy": "histogram",
}
KEPT = 0.9  # of the moving average at each batch
PARTS = 16  # of the values, whose ranges are kept apart
MASKED = 1e30  # values this large are those of an additive attention mask
MASKED_HALF = 0.45  # of the least float16, which has no 1e30: models mask with it, or with half of it


class EdgeValues:
    """What is kept of one edge. Ends are float64 [1], or [C] along `axis`, on the CPU, with 0 included."""

    def __init__(self, name: str, axis: int | None = None, range: str = "minmax"):
        check_range(range, axis)
        self.name, self.axis, self.chosen = name, axis, range
        self.histogram = ValueHistogram() if RANGES[range] == "histogram" else None
        self.ends: Range | None = None  # of all values
        self.average: Range | None = None  # moving average over the batches
        self.parts: list[tuple[Range, int]] = []  # with an axis: of successive values, and how many
        self.count = 0  # values that count
        self.masked = 0  # values of an attention mask
        self.padded = 0  # values of padding tokens

    def add(self, x: Tensor, tokens: Tensor | None = None) -> None:
        """Add a batch. `tokens`: bool [B, T], False for padding, if x is [B, T, ...].

        RefusedError for NaN and infinity, and for another number of channels than before.
        """
        x = x.detach()
        if self.axis is not None and not 0 <= self.axis < x.ndim:
            raise SettingError(f"{self.name}: axis={self.axis}, but the edge has axes 0 to {x.ndim - 1}")
        if not x.numel():
            return
        low, high = (float(end) for end in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RefusedError(
                f"{self.name}: the edge holds infinite or NaN values, which no grid can hold (for example "
                f"attention scores under a mask of -inf). Leave this edge out."
            )
        axis = self.axis
        if tokens is not None and (axis is None or axis > 1):  # otherwise the channels are tokens or samples
            self.padded += x.numel()
            x, axis = x[tokens], None if axis is None else axis - 1  # [N, ...]
            self.padded -= x.numel()
            if not x.numel():
                return
            low, high = (float(end) for end in x.aminmax())
        least = least_unmasked(x.dtype)
        masked = (x <= least) | (x >= MASKED) if low <= least or high >= MASKED else None
        if masked is not None:
            self.masked += int(masked.sum())
        if axis is not None:
            # 0 is in every range, so a zero has no effect on it.
            x = x if masked is None else x.masked_fill(masked, 0)
            parts = [part for part in x.tensor_split(2) if part.numel()] if axis else [x]
            ranges = [minmax_range(part.movedim(axis, 0).flatten(1), None) for part in parts]
            self._meet(union(ranges))
            sizes = [part.numel() for part in parts]
            self.parts += [((low.cpu(), high.cpu()), n) for (low, high), n in zip(ranges, sizes, strict=True)]
            if len(self.parts) > PARTS:
                pairs = [self.parts[at : at + 2] for at in range(0, len(self.parts), 2)]
                self.parts = [(union([r for r, _ in pair]), sum(n for _, n in pair)) for pair in pairs]
        else:
            if masked is not None:
                x = x[~masked]
                low, high = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
            self._meet(range_between(min(low, 0.0), max(high, 0.0)))
            if self.histogram is not None:
                self.histogram.add(x, (low, high))
        self.count += x.numel() if masked is None or axis is None else int((~masked).sum())

    @property
    def halves(self) -> tuple[Range, Range] | None:
        """The ranges [C] of about the first and the second half of the values, in the order of the samples;
        None without an axis, and for a single sample."""
        if len(self.parts) < 2:
            return None
        ranges, sizes = zip(*self.parts, strict=True)
        ends = list(accumulate(sizes))
        half = 1 + min(range(len(ends) - 1), key=lambda at: abs(ends[at] - ends[-1] / 2))
        return union(ranges[:half]), union(ranges[half:])

    def _meet(self, found: Range) -> None:
        """Widen the ends by those of a batch, and move the average."""
        low, high = (end.cpu().double() for end in found)
        if self.ends is None or self.average is None:
            self.ends = self.average = low, high
            return
        if low.shape != self.ends[0].shape:
            raise RefusedError(
                f"{self.name}: axis {self.axis} has {len(low)} channels, and had {len(self.ends[0])} in an "
                f"earlier batch. Use one range for the edge (axis=None)."
            )
        self.ends = union([self.ends, (low, high)])
        before = self.average
        self.average = before[0].lerp(low, 1 - KEPT), before[1].lerp(high, 1 - KEPT)

    def range(self, range: str | None = None, *, bits: int = 8, percentile: float = 99.99) -> Range | None:
        """The range by the given method, or by that of the constructor; None if no value was seen.

        `bits`: of the grid, for "mse" and "entropy". SettingError if the method needs a histogram and the
        constructor's does not.
        """
        chosen = self.chosen if range is None else range
        check_range(chosen, self.axis)
        if self.ends is None or RANGES[chosen] == "ends":
            return self.average if chosen == "average" else self.ends
        if self.histogram is None:
            raise SettingError(
                f"{self.name}: range={chosen!r} needs a histogram, and {self.chosen!r} keeps none. Calibrate "
                f"with range={chosen!r}."
            )
        if chosen == "percentile":
            return percentile_ends(self.histogram, percentile)
        return (mse_ends if chosen == "mse" else entropy_ends)(self.histogram, bits)


def check_range(range: str, axis: int | None, *, bits: int = 8, percentile: float = 99.99) -> None:
    """SettingError for settings that are unknown, out of range, or need one range for the edge."""
    check_choice("calibration", "range", range, RANGES)
    check_bits("calibration", bits, 1, 16)
    check_percentile("calibration", percentile)
    if axis is not None and RANGES[range] == "histogram":
        words = " or ".join(word for word, needed in RANGES.items() if needed == "ends")
        raise SettingError(
            f"calibration: range={range!r} is for a whole edge, and axis={axis} asks for one range for each "
            f"channel. Use range={words}, or axis=None."
        )


def least_unmasked(dtype: torch.dtype) -> float:
    """Values at or below it are those of an attention mask."""
    return -min(MASKED, MASKED_HALF * torch.finfo(dtype).max)
