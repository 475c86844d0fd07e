"""Lags loops: how much codes resemble those some columns before them, compiled."""

from __future__ import annotations

import numpy as np
from numba import types

from tersor.compiled import compiled

I8_2 = types.Array(types.int8, 2, "C", readonly=True)


@compiled(types.void(I8_2, types.float64[::1]))
def lag_scores(signs: np.ndarray, scores: np.ndarray) -> None:
    """Fill scores [L] from lag 2 on: covariance of being nonzero, and correlation of the signs [R, C].

    Sums are integers, and each mean is rounded once to float32, the same on every machine.
    """
    rows, columns = signs.shape
    full = 0
    for row in range(rows):
        for i in range(columns):
            full += signs[row, i] != 0
    density = np.float32(full / (rows * columns))
    chance = density * density
    for lag in range(2, scores.size):
        both, agree = np.int64(0), np.int64(0)
        for row in range(rows):
            for i in range(lag, columns):
                product = np.int64(signs[row, i] * signs[row, i - lag])
                agree += product
                both += product != 0
        count = rows * (columns - lag)
        covariance = np.float32(both / count) - chance
        scores[lag] = covariance + abs(np.float32(agree / count))
