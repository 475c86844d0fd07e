"""Ranges: clipping ranges for uniform grids.

minmax      no clipping
percentile  |w| (or each side) is clipped at a percentile
entropy     the threshold whose quantized histogram has the least KL divergence from the original
            (Migacz 2017, "8-bit inference with TensorRT"): 2048 bins, about 128 thresholds, O(levels) each

All functions take units [U, S] and return low <= 0 <= high, float64 [U]: zero is always in range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2048
STRIDE = 16  # bins between two candidate thresholds
MARGIN = 1e-12  # a threshold replaces a wider one only if its divergence is smaller by this
AT_ONCE = 256  # units whose histograms are held in memory together


def minmax_range(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(low, high) [U] of the unmasked weights."""
    if mask is not None:
        x = x * mask
    return x.amin(1).double().clamp_max(0), x.amax(1).double().clamp_min(0)


def percentile_range(
    x: Tensor, mask: Tensor | None, percentile: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Clip at a percentile, interpolated between neighbors. Units with an empty range are not clipped."""
    low, high = minmax_range(x, mask)
    if symmetric:
        top = _quantile(x.abs(), mask, percentile / 100).clamp_min(0)
        low, high = torch.maximum(low, -top), torch.minimum(high, top)
        whole = top == 0
    else:
        down, up = _quantile(x, mask, 1 - percentile / 100), _quantile(x, mask, percentile / 100)
        whole = (down >= 0) & (up <= 0)
        low, high = torch.maximum(low, down.clamp_max(0)), torch.minimum(high, up.clamp_min(0))
    full = minmax_range(x, mask)
    return torch.where(whole, full[0], low), torch.where(whole, full[1], high)


def _quantile(x: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """Like numpy.quantile, over unmasked weights. torch.quantile refuses large tensors and has no mask."""
    size = x.shape[1]
    if mask is None:
        count = torch.full((x.shape[0],), size, device=x.device)
    else:
        count = mask.sum(1)
        x = x.masked_fill(~mask, -torch.inf)  # sorts first
    place = size - count + share * (count - 1).clamp_min(0).double()
    ordered = x.sort(1).values
    before = place.floor().long().clamp(0, size - 1)
    after = (before + 1).clamp_max(size - 1)
    a, b = (ordered.gather(1, k[:, None])[:, 0].double() for k in (before, after))
    value = a + (b - a) * (place - before)
    return torch.where(count > 0, value, torch.zeros_like(value))


def entropy_range(x: Tensor, mask: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Clip |w| at the threshold with the least KL(histogram, quantized histogram).

    Units with fewer values than bins are divided by their root mean square and share one histogram, so they
    share one threshold in units of it. From 12 bits on there are as many steps as bins, and the range is
    minmax. The divergence counts clipped weights, but not how far they are clipped: with heavy tails and many
    bits its squared error is larger than that of minmax.
    """
    low, high = minmax_range(x, mask)
    levels = 2 ** (bits - 1)
    if levels >= BINS:
        return low, high
    size = x.abs() if mask is None else x.abs() * mask
    top = torch.maximum(-low, high)  # [U]
    count = mask if mask is not None else torch.ones_like(x, dtype=torch.bool)
    if x.shape[1] >= BINS:
        limit = torch.cat(
            [
                top[u : u + AT_ONCE]
                * _threshold(_histogram(size[u : u + AT_ONCE], count[u : u + AT_ONCE]), levels)
                for u in range(0, len(x), AT_ONCE)
            ]
        )
    else:
        energy = (size.double().square().sum(1) / count.sum(1).clamp_min(1)).sqrt()
        shape = (size / energy.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).float()
        shared = _threshold(_histogram(shape.reshape(1, -1), count.reshape(1, -1)), levels)
        limit = energy * shared * shape.amax().double()
    return torch.maximum(low, -limit), torch.minimum(high, limit)


def _histogram(size: Tensor, count: Tensor) -> Tensor:
    """Counts [U, BINS] over 0..max of each unit."""
    top = size.amax(1, keepdim=True).double().clamp_min(torch.finfo(torch.float64).tiny)
    place = (size / top * BINS).long().clamp_max(BINS - 1)
    place += torch.arange(len(size), device=size.device)[:, None] * BINS
    return torch.bincount(place[count], minlength=len(size) * BINS).reshape(-1, BINS).double()


def _threshold(histogram: Tensor, levels: int) -> Tensor:
    """Fraction of the range to keep, [U]. histogram [U, BINS]."""
    sums = Sums.of(histogram)
    best = torch.full_like(sums.total, torch.inf)
    share = torch.ones_like(sums.total)
    edge = torch.ones(1, dtype=torch.int64, device=histogram.device)
    for bins in range(BINS, max(levels, STRIDE) - 1, -STRIDE):
        kl = divergence(sums, edge.new_zeros(1), edge * bins, levels)[:, 0]
        better = kl < best - MARGIN
        best = torch.where(better, kl, best)
        share = torch.where(better, bins / BINS, share)
    return share


@dataclass(frozen=True)
class Sums:
    """Cumulative sums of histograms [U, N], float64: sums over bins are differences of them."""

    histogram: Tensor  # [U, N]
    mass: Tensor  # counts, [U, N + 1]
    filled: Tensor  # bins that are not empty, [U, N + 1]
    inside: Tensor  # count * log(count), [U, N + 1]

    @classmethod
    def of(cls, histogram: Tensor) -> Sums:
        start = histogram.new_zeros(len(histogram), 1)
        parts = histogram, (histogram > 0).double(), torch.xlogy(histogram, histogram)
        return cls(histogram, *(torch.cat([start, part.cumsum(1)], 1) for part in parts))

    @property
    def total(self) -> Tensor:
        return self.mass[:, -1]


def divergence(sums: Sums, first: Tensor, last: Tensor, levels: int) -> Tensor:
    """KL(P, Q) of clipping histograms to the bins first .. last - 1, int64 [K], and quantizing them, [U, K].
    It is inf if these bins are empty.

    P is these bins, with all counts beyond an end added to the bin at that end. Q distributes each level's
    count evenly over its nonempty bins. It costs O(levels):
    KL(P, Q) = sum_bins P log P - sum_levels P_level log(Q_level / nonempty_level).
    """
    histogram, mass, filled, inside = sums.histogram, sums.mass, sums.filled, sums.inside
    steps = torch.arange(levels + 1, device=histogram.device)
    edges = first[:, None] + steps * (last - first)[:, None] // levels  # [K, levels + 1]
    level, spread = mass[:, edges].diff(dim=2), filled[:, edges].diff(dim=2)  # [U, K, levels]
    within, total = mass[:, last] - mass[:, first], sums.total[:, None]
    p = level.clone()
    self_term = inside[:, last] - inside[:, first]
    for at, column, beyond in ((0, first, mass[:, first]), (-1, last - 1, total - mass[:, last])):
        end = histogram[:, column]
        spread[..., at] += (end == 0) & (beyond > 0)
        p[..., at] += beyond
        self_term = self_term + torch.xlogy(end + beyond, end + beyond) - torch.xlogy(end, end)
    # A level of P that is empty in Q gets half a count: its cost is large but finite.
    q = torch.where(level > 0, level, 0.5) / spread.clamp_min(1)
    kl = (self_term - torch.xlogy(p, q).sum(2)) / total.clamp_min(1)
    kl += (within.clamp_min(1) / total.clamp_min(1)).log()
    return torch.where(within > 0, kl, torch.inf)
