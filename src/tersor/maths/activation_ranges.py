"""Activation ranges: clipping ranges of an edge, from the histogram of its values.

minmax      no clipping
percentile  a share of the values is clipped, half of it at each end (McKinstry 2018); where an end has fewer
            values, the other end gets the rest, so behind a ReLU all of it is at the top
mse         the ends with the least expected squared error of rounding and clipping, by search
entropy     the threshold whose quantized histogram has the least KL divergence (Migacz 2017, "8-bit inference
            with TensorRT"), for both signs on one grid

All return low <= 0 <= high, float64 [1]. Values are taken as uniform within a bin, and zeros as exact.
Cost on one core: mse about 8 ms, entropy 3 ms, percentile 0.2 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.maths.ranges import MARGIN, STRIDE, Sums, divergence
from tersor.maths.uniform_grid import limits, spanning
from tersor.maths.units import check_bits, check_percentile
from tersor.maths.value_histogram import ValueHistogram

Range = tuple[Tensor, Tensor]

COARSE = 2  # ranges per factor of two in the coarse search of "mse"
OCTAVES = 8  # down to 2^-8 of the full range, on each side
REFINE = (4, 16)  # steps of the finer searches, as parts of a coarse one
LEAST_INSIDE = 0.5  # of the values; where all but a bin is clipped, "entropy" sees no difference at all
AT_ONCE = 32  # candidates whose errors are computed together: their arrays stay in cache


def minmax_ends(histogram: ValueHistogram) -> Range:
    """All values."""
    return range_between(histogram.low, histogram.high)


def percentile_ends(histogram: ValueHistogram, percentile: float) -> Range:
    """The range with `percentile` % of the values inside. If only zeros would remain: all values.

    Each end is at most a bin off. SettingError unless 50 < percentile <= 100.
    """
    check_percentile("percentile", percentile)
    counts, zero = histogram.counts.cpu().double(), -histogram.first
    below, above = float(counts[:zero].sum()), float(counts[zero:].sum())
    clipped = (1 - percentile / 100) * histogram.count
    down = min(clipped / 2, below)
    up = min(clipped - down, above)
    down = min(clipped - up, below)
    ends = _ends(histogram)
    low = 0.0 if down >= below else _after(counts[:zero], ends[: zero + 1], down)
    high = 0.0 if up >= above else _after(counts[zero:].flip(0), ends[zero:].flip(0), up)
    return minmax_ends(histogram) if low == high == 0 else range_between(low, high)


def _after(counts: Tensor, ends: Tensor, skip: float) -> float:
    """The value behind the first `skip` values. counts [N] of bins with ends [N + 1], in either direction."""
    total = counts.cumsum(0)
    k = int(torch.searchsorted(total, torch.tensor(skip, dtype=total.dtype), right=True))
    part = (skip - float(total[k] - counts[k])) / float(counts[k])
    return float(ends[k] + (ends[k + 1] - ends[k]) * part)


def mse_ends(histogram: ValueHistogram, bits: int) -> Range:
    """The ends with the least expected squared error, never worse than minmax.

    A coarse search over all pairs of ends, then two finer ones around the best pair.
    """
    check_bits("mse", bits, 1, 16)
    low, high = minmax_ends(histogram)
    if not histogram.count or float(high - low) == 0:
        return low, high
    best, least = (low, high), squared_error(histogram, low, high, bits)
    shrink = torch.exp2(-torch.arange(COARSE * OCTAVES + 1, dtype=torch.float64) / COARSE)
    tried = low * shrink, high * shrink
    for parts in (*REFINE, None):
        ends = tuple(x if float(x.abs().max()) else x[:1] for x in tried)  # an end of 0 has one candidate
        lows, highs = (side.flatten() for side in torch.meshgrid(*ends, indexing="ij"))
        errors = squared_error(histogram, lows, highs, bits)
        at = int(errors.argmin())
        if float(errors[at]) < float(least):
            best, least = (lows[at : at + 1], highs[at : at + 1]), errors[at]
        if parts is not None:
            near = torch.exp2(torch.arange(-3, 4, dtype=torch.float64) / (COARSE * parts))
            tried = torch.maximum(best[0] * near, low), torch.minimum(best[1] * near, high)
    return best


def squared_error(histogram: ValueHistogram, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The expected squared error of a value on the grids that span low..high [K], float64 [K].

    In steps of the grid, with n the code of u, the error (u - n)^2 has the integral n / 12 + (u - n)^3 / 3,
    also where n is clipped. So each bin's error is exact.
    """
    counts, ends = histogram.counts.cpu().double(), _ends(histogram)
    filled = counts.nonzero().flatten()
    if not len(filled):
        return torch.zeros_like(low)
    span = slice(int(filled[0]), int(filled[-1]) + 1)
    counts, ends = counts[span], ends[span.start : span.stop + 1]
    flat = ends.diff() == 0  # the greatest value is at the start of its bin
    first, last = limits(bits, symmetric=False)
    parts = []
    for lows, highs in zip(low.split(AT_ONCE), high.split(AT_ONCE), strict=True):
        scale, zero = (x.double()[:, None] for x in spanning(lows, highs, bits, symmetric=False))
        u = ends / scale  # [K, bins + 1]
        n = u.round().clamp_(first - zero, last - zero)
        gap = u - n
        integral = n.div_(12).add_(gap.square().mul_(gap), alpha=1 / 3)
        mean = torch.where(flat, gap[:, 1:].square(), integral.diff(dim=1) / u.diff(dim=1))
        parts.append(mean @ counts * scale[:, 0].square())
    return torch.cat(parts) / histogram.count


def entropy_ends(histogram: ValueHistogram, bits: int) -> Range:
    """Clip |x| at the threshold with the least KL(histogram, quantized histogram).

    Values on one side of 0, as behind a ReLU, get all levels; with values on both sides, both are clipped at
    the threshold, and the levels span what is left of them. Zeros are left out: they are exact on every grid,
    and would outweigh the rest. The narrowest range has as many bins as levels, because the histogram cannot
    show rounding within a bin. From 11 bits on that is minmax.
    """
    check_bits("entropy", bits, 1, 16)
    low, high = minmax_ends(histogram)
    counts = histogram.counts.cpu().double()
    filled, zero = counts.nonzero().flatten(), -histogram.first
    if not len(filled):
        return low, high
    start, stop = min(int(filled[0]), zero), max(int(filled[-1]) + 1, zero)
    sums, levels = Sums.of(counts[None]), 2**bits
    reach = torch.arange(max(zero - start, stop - zero), 0, -STRIDE)
    first, last = (zero - reach).clamp_min(start), (zero + reach).clamp_max(stop)
    inside = sums.mass[0, last] - sums.mass[0, first]
    wide = (last - first >= levels) & (inside >= LEAST_INSIDE * sums.total)
    if not wide.any():
        return low, high
    first, last = first[wide], last[wide]
    parts = [
        divergence(sums, *window, levels)[0]
        for window in zip(first.split(AT_ONCE), last.split(AT_ONCE), strict=True)
    ]
    kl = torch.cat(parts)
    at = int((kl <= kl.min() + MARGIN).nonzero()[0])  # of equal ones, the widest
    ends = histogram.edges[[int(first[at]), int(last[at])]]
    return torch.maximum(low, ends[:1]), torch.minimum(high, ends[1:])


def _ends(histogram: ValueHistogram) -> Tensor:
    """The ends of the bins, without what is beyond the least and the greatest value, [bins + 1]."""
    return histogram.edges.clamp(histogram.low, histogram.high)


def union(ranges: Sequence[Range]) -> Range:
    """The range that spans all of these, which have the same shape."""
    return torch.stack([low for low, _ in ranges]).amin(0), torch.stack([high for _, high in ranges]).amax(0)


def range_between(low: float, high: float) -> Range:
    """The two ends as a range."""
    return torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
