"""Exact k-means: the optimal partition of sorted points into K intervals, by dynamic programming.

best[k, i]   min_j best[k - 1, j] + cost(j, i)
cost(j, i)   squared error of points j..i-1 around their mean
cost         O(K N log N) time, K * N numbers of 4 bytes to trace back

The optimal j does not decrease as i grows, so solving the middle i first halves the search range of the
others (Wang, Song 2011; Groenlund et al. 2017). All i of one recursion depth are solved together, as arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def optimal_cuts(points: Floats, mass: Floats, entries: int) -> Ints:
    """First index of each of the K intervals. points sorted and distinct [N], mass > 0 [N], K <= N."""
    count = len(points)
    x = points - (points * mass).sum() / mass.sum()  # centered, so that the sums below lose few digits
    x = x / max(np.abs(x).max(), np.finfo(np.float64).tiny)
    sums = tuple(np.concatenate([[0.0], (mass * x**power).cumsum()]) for power in (0, 1, 2))
    best = np.full(count + 1, np.inf)
    best[1:] = sums[2][1:] - sums[1][1:] ** 2 / sums[0][1:]
    best[0] = 0.0
    origin = np.zeros((entries, count + 1), np.int32)
    for k in range(1, entries):
        best, origin[k] = _layer(best, sums, k)
    cuts = np.zeros(entries, np.int64)
    end = count
    for k in range(entries - 1, 0, -1):
        end = cuts[k] = origin[k, end]
    return cuts


def _layer(before: Floats, sums: tuple[Floats, ...], k: int) -> tuple[Floats, NDArray[np.int32]]:
    """(best[k], optimal j) for every i in k + 1..N, from best[k - 1]."""
    count = len(before) - 1
    best = np.full(count + 1, np.inf)
    where = np.full(count + 2, count, np.int64)  # an upper bound until solved; the last entry is a sentinel
    where[: k + 1] = k
    step = 1 << max(0, (count - k).bit_length() - 1)
    while step:
        i = np.arange(k + step, count + 1, 2 * step)
        low = where[i - step]
        high = np.minimum(where[np.minimum(i + step, count + 1)], i - 1)
        best[i], where[i] = _solve(before, sums, i, low, np.maximum(low, high))
        step //= 2
    return best, where[:-1].astype(np.int32)


def _solve(before: Floats, sums: tuple[Floats, ...], i: Ints, low: Ints, high: Ints) -> tuple[Floats, Ints]:
    """(least before[j] + cost(j, i) over j in low..high, its j) for each i. All ranges are concatenated."""
    length = high - low + 1
    begin = length.cumsum() - length
    j = np.arange(length.sum()) + np.repeat(low - begin, length)
    mass, first, second = sums
    gap = np.repeat(first[i], length) - first[j]
    np.square(gap, out=gap)
    gap /= np.repeat(mass[i], length) - mass[j]
    total = before[j] - second[j] - gap
    least = np.minimum.reduceat(total, begin)
    hits = np.flatnonzero(total == np.repeat(least, length))
    owner, place = np.unique(np.searchsorted(begin, hits, side="right"), return_index=True)
    best_j = np.empty_like(i)
    best_j[owner - 1] = j[hits[place]]
    return least + second[i], best_j
