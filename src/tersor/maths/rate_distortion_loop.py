"""Rate-distortion loop: the column sweep of rate-distortion optimized quantization, compiled with numba.

All arrays are [columns, rows], so that a column of weights is contiguous. A column is rounded row by row; its
rounding errors are compensated in later rows by `down`, and in later columns by `ahead`. The caller checks
shapes. No float is cast to an index before it is compared with both bounds; these comparisons follow IEEE
754, so NaN gets the last index.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from tersor.compiled import compiled

F1, F2 = types.float32[::1], types.float32[:, ::1]
COUNT = types.float64[:, ::1]
SLOW, QUICK = 1 / 32, 1 / 12  # update rates of running magnitudes, along a row and down a column
LEFTS = 3  # classes of the left neighbor: 0, 1, more
FINE = 16  # entries of the table of levels per unit of magnitude
# Flags that let the compiler reorder sums, without those that let it assume that there is no NaN.
FAST = {"reassoc", "nsz", "arcp", "contract", "afn"}


@compiled(types.void(COUNT, F2, types.boolean[::1]), fastmath=FAST)
def refresh(counts: np.ndarray, cost: np.ndarray, seen: np.ndarray) -> None:
    """Update the bits of magnitudes from counts, in contexts seen since the last call. A sign is 1 bit."""
    for context in range(counts.shape[0]):
        if not seen[context]:
            continue
        seen[context] = False
        total = 0.0
        for m in range(counts.shape[1]):
            total += counts[context, m]
        for m in range(counts.shape[1]):
            cost[context, m] = np.log2(total / counts[context, m]) + (1 if m else 0)


REFRESH = refresh.dispatcher  # for the call from the other loop


@compiled(
    types.void(
        F2, types.boolean[:, ::1], types.int16[:, ::1], F2, F1, F1, F2, F1, F1, types.float64, types.int64,
        types.int16[::1], COUNT, F2, F1, types.int16[::1], types.boolean[::1],
        types.float64[::1],
    ),
    fastmath=FAST,
)  # fmt: skip
def sweep(
    targets: np.ndarray,  # [n, O] weights with compensation so far; changed
    free: np.ndarray,  # [n, O] False: the code is 0
    codes: np.ndarray,  # [n, O] output
    ahead: np.ndarray,  # [n, n] unit upper triangular: compensation of a column's error in later columns
    column: np.ndarray,  # [n] weight of an error by column
    wide: np.ndarray,  # [n] column steps
    down: np.ndarray,  # [O, O] like `ahead`, for rows; or [0, 0]
    row: np.ndarray,  # [O] weight of an error by row
    high: np.ndarray,  # [O] row steps
    price: float,  # price of a bit
    limit: int,  # largest magnitude
    left: np.ndarray,  # [O] magnitudes of the previous column; changed
    counts: np.ndarray,  # [contexts, magnitudes]; changed
    cost: np.ndarray,  # [contexts, magnitudes] bits; changed
    running: np.ndarray,  # [O] running magnitude of each row; changed
    levels: np.ndarray,  # [FINE * largest] level of each magnitude
    seen: np.ndarray,  # [contexts] seen since the last refresh; changed
    state: np.ndarray,  # mean magnitude, weights seen, next refresh, bits, weighted error; changed
) -> None:
    """Round `n` columns, one after the other. Afterwards `targets` holds the rounding errors."""
    n, rows = targets.shape
    top, last = levels.size - 1, cost.shape[1] - 1
    t = np.empty(rows, np.float32)
    for j in range(n):
        t[:] = targets[j]
        here = state[0]
        for i in range(rows):
            step = high[i] * wide[j]
            x = abs(t[i]) / step
            near: Any = min(np.int64(left[i]), LEFTS - 1)
            guess = running[i] * here / max(state[0], 1e-3)
            fine = FINE * guess
            place = np.int64(fine) if 0 <= fine < top else top
            context = levels[place] * LEFTS + near
            best = 0
            if free[j, i]:
                weight = np.float64(row[i]) * column[j] * step * step
                least = weight * x * x + price * cost[context, 0]
                floor = np.int64(x) if x < limit else limit
                for m in range(max(1, floor - 1), min(floor + 1, limit) + 1):
                    bits = cost[context, min(m, last)] + max(0, m - last) * 0.05
                    loss = weight * (x - m) * (x - m) + price * bits
                    if loss < least:
                        least, best = loss, m
                state[3] += cost[context, min(best, last)] + max(0, best - last) * 0.05
                counts[context, min(best, last)] += 1
                seen[context] = True
                state[1] += 1
            code = best if t[i] > 0 else -best
            rest = np.float32(t[i] - np.float32(code) * step)
            state[4] += row[i] * column[j] * np.float64(rest) * rest
            if down.size:
                for k in range(i + 1, rows):
                    t[k] -= rest * down[i, k]
            codes[j, i] = code
            left[i] = best
            running[i] += (best - running[i]) * SLOW
            here += (best - here) * QUICK
            state[0] += (best - state[0]) * 1e-4
            targets[j, i] -= np.float32(code) * step
        for k in range(j + 1, n):
            share = ahead[j, k]
            for i in range(rows):
                targets[k, i] -= share * targets[j, i]
        if state[1] >= state[2]:
            REFRESH(counts, cost, seen)
            state[2] = state[1] + min(state[1] / 4 + 256, 16384.0)
