"""Row predictor loops: predict a code from earlier rows with an adaptive linear filter, compiled.

prediction for column i = sum over earlier rows r of weight[r] * slog[r, i]
slog                      sign(code) * bit length of |code|
weights                   learned along each row, from 0: normalized least mean squares (Widrow, Hoff 1960)
error                     slog - prediction / 2;   weight[r] += error * slog[r, i] / (100 + sum of slog^2)

Rows of a weight matrix lie near few directions, and pruning preserves the signs. Only the last HISTORY rows
with a nonzero code in the column are used, so sparse matrices cost little. Integers only.
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
def hear(i, voters, said, heard, trust):
    """(prediction for column i with 12 fractional bits, sum of the squares of its terms)."""
    total = squares = np.int64(0)
    for k in range(min(heard[i], VOTERS)):
        vote = (trust[voters[i, k]] * said[i, k]) >> 4
        total += vote
        squares += vote * vote
    return total, squares


@njit
def learn(word, total, i, voters, said, heard, trust):
    """One NLMS step after column i: `word` is the slog of its code, `total` the prediction."""
    n = min(heard[i], VOTERS)
    mass = np.int64(RIDGE)
    for k in range(n):
        mass += np.int64(said[i, k]) * said[i, k]
    step = ((word << 16) - 8 * total) // mass
    for k in range(n):
        r = voters[i, k]
        trust[r] = min(max(trust[r] + step * said[i, k], -MOST), MOST)


@njit
def end_row(o, words, voters, said, heard, trust):
    """Append row o to the history, and reset the weights to 0."""
    for i in range(words.size):
        if words[i] != 0:
            for k in range(min(heard[i], VOTERS)):
                trust[voters[i, k]] = 0
            place = heard[i] % VOTERS
            voters[i, place] = o
            said[i, place] = words[i]
            heard[i] += 1
            words[i] = 0
