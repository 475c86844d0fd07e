"""Exact k-means: the optimal partition of sorted points into K intervals, by dynamic programming.

best[k, i]   min_j best[k - 1, j] + cost(j, i)
cost(j, i)   squared error of points j..i-1 around their mean
cost         O(K N log N) time, K * N numbers of 4 bytes to trace back

The optimal j does not decrease as i grows, so solving the middle i first halves the search range of the
others (Wang, Song 2011; Groenlund et al. 2017). The layers are compiled: kmeans_loop.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def optimal_cuts(points: Floats, mass: Floats, entries: int) -> Ints:
    """First index of each of the K intervals. points sorted and distinct [N], mass > 0 [N], K <= N."""
    from tersor.maths.kmeans_loop import layers

    count = len(points)
    x = points - (points * mass).sum() / mass.sum()  # centered, so that the sums below lose few digits
    x = x / max(np.abs(x).max(), np.finfo(np.float64).tiny)
    sums = tuple(np.concatenate([[0.0], (mass * x**power).cumsum()]) for power in (0, 1, 2))
    best = np.full(count + 1, np.inf)
    best[1:] = sums[2][1:] - sums[1][1:] ** 2 / sums[0][1:]
    best[0] = 0.0
    origin = np.zeros((entries, count + 1), np.int32)
    layers(best, *sums, origin)
    cuts = np.zeros(entries, np.int64)
    end = count
    for k in range(entries - 1, 0, -1):
        end = cuts[k] = origin[k, end]
    return cuts
