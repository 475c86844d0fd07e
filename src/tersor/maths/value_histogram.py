"""Value histogram: how often values occur, from batches of any number and size, in constant memory.

bin k    x with k * width <= x < (k + 1) * width, without 0      k = first .. first + bins - 1
width    2^exponent
zeros    counted apart, because every grid holds them exactly
The width is the smallest power of two with which the bins hold 0 and all values so far. When values exceed
the bins, neighbors are merged. Scaling by a power of two is exact, so the bins after many batches are those
of all values at once, in any order.

Cost: about 2.5 ns a value on a core; 8 bytes a bin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.ranges import BINS

AT_ONCE = {"cpu": 1 << 18}  # values processed at a time: their copies stay in cache
ELSEWHERE = 1 << 24  # on other devices: few launches, and float32 still counts to it exactly
NARROWEST = -126  # the width's least exponent: 2^126 is still a float32


class ValueHistogram:
    """Counts of values in `bins` bins, with their exact least and greatest value."""

    def __init__(self, bins: int = BINS):
        if bins < 2:
            raise SettingError(f"histogram: bins={bins}, but it is the number of bins: 2 or more")
        self.bins, self.first, self.exponent = bins, 0, NARROWEST
        self.counts = torch.zeros(bins, dtype=torch.int64)  # on the values' device, without zeros
        self.count = 0  # of all values, zeros included
        self.least, self.greatest = math.inf, -math.inf

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def low(self) -> float:
        """The lower end of the range: the least value, or 0 if that is positive."""
        return min(self.least, 0.0)

    @property
    def high(self) -> float:
        """The upper end of the range: the greatest value, or 0 if that is negative."""
        return max(self.greatest, 0.0)

    @property
    def zeros(self) -> int:
        return self.count - int(self.counts.sum())

    @property
    def edges(self) -> Tensor:
        """The ends of the bins, float64 [bins + 1], on the CPU. 0 is one of them."""
        return (torch.arange(self.bins + 1, dtype=torch.float64) + self.first) * self.width

    def add(self, values: Tensor, ends: tuple[float, float] | None = None) -> None:
        """Count values of any shape and floating dtype. `ends`: their least and greatest value, if known.

        SettingError for NaN and infinity.
        """
        values = values.detach().reshape(-1)
        if not values.numel():
            return
        least, greatest = ends if ends is not None else (float(end) for end in values.aminmax())
        if not (math.isfinite(least) and math.isfinite(greatest)):
            raise SettingError("histogram: the values hold NaN or infinity, which no bin holds")
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        self.count += values.numel()
        self.counts = self.counts.to(values.device)
        self._widen()
        for block in values.split(AT_ONCE.get(values.device.type, ELSEWHERE)):
            self.counts += self._counted(block if block.dtype == torch.float64 else block.float())

    def _widen(self) -> None:
        """Make the bins hold 0 and the range, by wider bins if needed."""
        low, high, exponent = self.low, self.high, self.exponent
        if low == high:  # only zeros so far
            return
        # Dividing first: the difference of two float64 may overflow.
        if (least := high / self.bins - low / self.bins) > 0:
            exponent = max(exponent, math.frexp(least)[1] - 1)
        while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= self.bins:
            exponent += 1
        first = math.floor(math.ldexp(low, -exponent))
        if (first, exponent) != (self.first, self.exponent):
            place = torch.arange(self.bins, device=self.counts.device) + self.first
            place >>= min(exponent - self.exponent, 62)  # rounds down, also below 0
            # Bins beyond the new ones are empty, and may be added anywhere.
            place = (place - first).clamp_(0, self.bins - 1)
            self.counts = torch.zeros_like(self.counts).index_add_(0, place, self.counts)
            self.first, self.exponent = first, exponent

    def _counted(self, x: Tensor) -> Tensor:
        """The counts of values [N] that are within the bins."""
        bins = (x * math.ldexp(1.0, -self.exponent)).floor_()
        if self.exponent > 0:  # tiny negative values may have become 0
            bins = torch.where(x < 0, bins.clamp_max(-1), bins)
        found = torch.bincount(bins.sub_(self.first).to(torch.int32), minlength=self.bins)
        # sign() and sum() use vector instructions, unlike (x == 0).sum(): 0.2 and 6 ns a value.
        found[-self.first] -= len(x) - x.sign().square_().sum().long()
        return found
