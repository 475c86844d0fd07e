"""K-means loop: the layers of the exact partition of sorted points (exact_kmeans.py), compiled.

Every number comes from the same IEEE 754 operations in the same order as in arrays, so results are the same
on every machine.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import njit, types

from tersor.compiled import compiled

F64 = types.Array(types.float64, 1, "C", readonly=True)


@compiled(types.void(types.float64[::1], F64, F64, F64, types.int32[:, ::1]))
def layers(
    best: np.ndarray, mass: np.ndarray, first: np.ndarray, second: np.ndarray, origin: np.ndarray
) -> None:
    """Fill origin [K, N + 1]: the start of the last of k + 1 intervals, for each end i.

    `best` [N + 1]: the cost of one interval from 0 to i; it is overwritten. `mass`, `first` and `second`
    [N + 1]: cumulative sums of mass, mass * x and mass * x^2.
    """
    count = best.size - 1
    after = np.empty(count + 1)
    where = np.empty(count + 2, np.int64)  # an upper bound until solved; the last entry is a sentinel
    for k in range(1, origin.shape[0]):
        for i in range(count + 2):
            where[i] = k if i <= k else count
        for i in range(count + 1):
            after[i] = np.inf
        step = 1
        while 2 * step <= count - k:
            step *= 2
        while step:
            # The middle of each range: its neighbors at twice the distance are solved.
            for i in range(k + step, count + 1, 2 * step):
                low = where[i - step]
                high = max(low, min(where[min(i + step, count + 1)], i - 1))
                after[i], where[i] = solved(best, mass, first, second, i, low, high)
            step //= 2
        for i in range(count + 1):
            best[i], origin[k, i] = after[i], where[i]


@njit
def solved(before, mass, first, second, i, low, high):  # type: ignore[no-untyped-def]
    """(least cost of the intervals to i, the first start j of the last one that gives it), j in low..high."""
    least, place = np.inf, low
    for j in range(low, high + 1):
        gap = first[i] - first[j]
        total = before[j] - second[j] - gap * gap / (mass[i] - mass[j])
        if total < least:
            least, place = total, j
    return least + second[i], place
