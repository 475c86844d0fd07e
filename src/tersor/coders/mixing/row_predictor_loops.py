"""Row predictor loops: predict a code from earlier rows with an adaptive linear filter, compiled.

prediction for column i = sum over earlier rows r of weight[r] * slog[r, i]
slog      the signed log of a code: sign(code) * bit length of |code|
weights   learned along each row, from 0: normalized least mean squares (NLMS; Widrow, Hoff 1960)
error     slog - prediction / 2;   weight[r] += error * slog[r, i] / (100 + sum of slog^2)

A weight matrix has approximately low rank, and so have the signs of the weights that pruning keeps. Only the
last HISTORY rows with a nonzero code in the column are used, so sparse matrices cost little. Integers only.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

HISTORY = 256  # earlier rows used for a column
RIDGE = 100  # regularizes the step size
MOST = 1 << 20  # largest weight, with 16 fractional bits


@njit(inline="always")
def predict(i, history, slogs, seen, row_weights):
    """(prediction for column i with 12 fractional bits, sum of the squares of its terms)."""
    total = squares = np.int64(0)
    for k in range(min(seen[i], HISTORY)):
        term = (row_weights[history[i, k]] * slogs[i, k]) >> 4
        total += term
        squares += term * term
    return total, squares


@njit
def update(slog, total, i, history, slogs, seen, row_weights):
    """One NLMS step after column i: `slog` is the signed log of its code, `total` the prediction."""
    n = min(seen[i], HISTORY)
    mass = np.int64(RIDGE)
    for k in range(n):
        mass += np.int64(slogs[i, k]) * slogs[i, k]
    step = ((slog << 16) - 8 * total) // mass
    for k in range(n):
        r = history[i, k]
        row_weights[r] = min(max(row_weights[r] + step * slogs[i, k], -MOST), MOST)


@njit
def append_row(o, row_slogs, history, slogs, seen, row_weights):
    """Append row o to the history, and reset the weights to 0."""
    for i in range(row_slogs.size):
        if row_slogs[i] != 0:
            for k in range(min(seen[i], HISTORY)):
                row_weights[history[i, k]] = 0
            place = seen[i] % HISTORY
            history[i, place] = o
            slogs[i, place] = row_slogs[i]
            seen[i] += 1
            row_slogs[i] = 0
