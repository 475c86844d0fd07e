"""Grid loops: the inner loops of the predictive coder, compiled. Integers only.

Rows are coded in blocks, column by column, so that the rows of a block do not wait for each other.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, types

from tersor.coders.grid import BLOCK, COEF, FAR, FINE, FRACTIONS, GROUPS, NORMAL, ONE
from tersor.coders.loops import INT, U8, U16, U32, compiled

I8_2 = types.int8[:, ::1]
I16_2 = types.int16[:, ::1]
I32 = types.Array(types.int32, 1, "C", readonly=True)
I16_2_IN = types.Array(types.int16, 2, "C", readonly=True)
U64_OUT = types.uint64[::1]
I16 = types.Array(types.int16, 1, "C", readonly=True)

NORMAL_SHIFT = NORMAL - 4 - ONE  # a level of 0 is a scale of 2^-4
MEAN_SHIFT = ONE + COEF - FINE
HALF = 1 << (FINE - 1)
PANEL = 8  # pivots that are worked off together
SLICE = 512  # rows whose moments are added up while they are in the cache
LOW, WORD = np.uint64(1 << 16), np.uint64(0xFFFF)
N1, N16 = np.uint64(1), np.uint64(16)


@njit(inline="always")
def normalized(value, inverse):
    z = (np.int64(value) * inverse) >> NORMAL_SHIFT
    return min(max(z, -FAR), FAR)


@njit(inline="always")
def subtract(row, factor, pivot):
    """row -= factor * pivot, counted from 0 so that it runs side by side."""
    for j in range(row.size):
        row[j] -= factor * pivot[j]


@compiled(types.void(types.float64[:, ::1]))
def eliminate(a: np.ndarray) -> None:
    """a [n, n] symmetric -> its unit lower factor below the diagonal, in place.

    By panels of pivots, which stay in the cache: each number still meets the pivots one by one in order.
    """
    n = a.shape[0]
    pivots = np.empty((PANEL, n))
    for first in range(0, n, PANEL):
        last = min(first + PANEL, n)
        for k in range(first, last):
            for i in range(k, n):
                pivots[k - first, i] = a[i, k]
            pivot = a[k, k]
            for i in range(k + 1, n):
                factor = pivots[k - first, i] / pivot
                subtract(a[i, k + 1 : min(i + 1, last)], factor, pivots[k - first, k + 1 : last])
                a[i, k] = factor
        for i in range(last, n):
            for k in range(first, last):
                subtract(a[i, last : i + 1], a[i, k], pivots[k - first, last:])


@compiled(types.void(I16_2_IN, types.float64[:, ::1]))
def add_moments(z: np.ndarray, total: np.ndarray) -> None:
    """Add the second moments of normalized codes [W, N], behind a constant, to the lower half of total
    [1 + W, 1 + W]: whole numbers below 2^52, which a double holds, so any order gives the same sums.
    """
    width, rows = z.shape
    for top in range(0, rows, SLICE):
        count = min(SLICE, rows - top)
        total[0, 0] += np.float64(count << 2 * ONE)
        for i in range(width):
            one = z[i, top : top + count]
            alone = np.int32(0)
            for r in range(count):
                alone += np.int32(one[r])
            total[i + 1, 0] += np.float64(np.int64(alone) << ONE)
            for j in range(i + 1):
                other = z[j, top : top + count]
                both = np.int32(0)
                for r in range(count):
                    both += np.int32(one[r]) * np.int32(other[r])
                total[i + 1, j + 1] += np.float64(both)


@njit(inline="always")
def foretell(lower, surprises, sums, column):
    """sums [BLOCK] = sum over j <= column of lower[column + 1, j] * surprises[j], wrapped to 32 bits."""
    for r in range(BLOCK):
        sums[r] = 0
    weights = lower[column + 1]
    whole = (column + 1) // 4 * 4
    for j in range(0, whole, 4):  # four at a time: the sums are read and written less often
        a, b, c, d = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        by_a, by_b, by_c, by_d = surprises[j], surprises[j + 1], surprises[j + 2], surprises[j + 3]
        for r in range(BLOCK):
            sums[r] += (
                np.int32(a) * np.int32(by_a[r]) + np.int32(b) * np.int32(by_b[r])
                + np.int32(c) * np.int32(by_c[r]) + np.int32(d) * np.int32(by_d[r])
            )  # fmt: skip
    for j in range(whole, column + 1):
        for r in range(BLOCK):
            sums[r] += np.int32(weights[j]) * np.int32(surprises[j, r])


@compiled(types.void(I8_2, I32, I32, I16_2_IN, INT, INT, INT, INT, I16_2, I16_2))
def means(
    codes: np.ndarray,
    inverse: np.ndarray,
    scale: np.ndarray,
    lower: np.ndarray,
    first: int,
    last: int,
    begin: int,
    end: int,
    out: np.ndarray,
    z_out: np.ndarray,
) -> None:
    """Means in 1 / 2^FINE, and normalized codes, of rows first:last and columns begin:end."""
    width = end - begin
    surprises = np.zeros((width + 1, BLOCK), np.int16)
    sums = np.zeros(BLOCK, np.int32)
    for top in range(first, last, BLOCK):
        rows = min(BLOCK, last - top)
        for r in range(BLOCK):
            surprises[0, r] = 1 << ONE
        for i in range(width):
            foretell(lower, surprises, sums, i)
            for r in range(rows):
                row = top + r
                foreseen = min(max(sums[r] >> COEF, -FAR), FAR)
                out[row, begin + i] = (np.int64(foreseen) * scale[row]) >> MEAN_SHIFT
                z = normalized(codes[row, begin + i], inverse[row])
                z_out[row, begin + i] = z
                surprises[i + 1, r] = z - foreseen


@compiled(
    types.Tuple((INT, INT))(
        U16, INT, U64_OUT, INT, I8_2, I32, I32, I16, I16, I16_2_IN, INT, INT, INT, INT,
        I16, U8, I32, I32, U32, U32, I16_2,
    )
)  # fmt: skip
def decode_rows(
    words: np.ndarray,
    at: int,
    states: np.ndarray,
    turn: int,
    codes: np.ndarray,
    inverse: np.ndarray,
    scale: np.ndarray,
    row_level: np.ndarray,
    column_level: np.ndarray,
    lower: np.ndarray,
    first: int,
    last: int,
    begin: int,
    end: int,
    table_of: np.ndarray,
    owners: np.ndarray,
    owners_at: np.ndarray,
    shifts: np.ndarray,
    frequencies: np.ndarray,
    starts: np.ndarray,
    z_out: np.ndarray,
) -> tuple[int, int]:
    """Fill codes[first:last, begin:end]; return how many words were used in all, and the symbols so far.

    `lower` with no rows: nothing is foreseen. A table is named by group * FRACTIONS + distance.
    """
    width = end - begin
    predicted = lower.shape[0] > 1
    surprises = np.zeros((width + 1 if predicted else 1, BLOCK), np.int16)
    sums = np.zeros(BLOCK, np.int32)
    foreseen, whole, rest = np.empty((3, BLOCK), np.int32)
    kind, step = np.empty((2, BLOCK), np.int32)
    lanes = np.int64(states.size - 1)
    for top in range(first, last, BLOCK):
        rows = min(BLOCK, last - top)
        for r in range(BLOCK):
            surprises[0, r] = 1 << ONE
        for i in range(width):
            if predicted:
                foretell(lower, surprises, sums, i)
            for r in range(rows):  # without a jump, so that it runs side by side
                foreseen[r] = min(max(sums[r] >> COEF, -FAR), FAR)
                mean = np.int32(np.int16((np.int64(foreseen[r]) * scale[top + r]) >> MEAN_SHIFT))
                whole[r] = (mean + HALF) >> FINE
                rest[r] = mean - (whole[r] << FINE)
                group = (np.int32(row_level[top + r]) + np.int32(column_level[begin + i])) >> 1
                group = min(max(group, 0), GROUPS - 1)
                kind[r] = group * FRACTIONS + abs(rest[r])
            for r in range(rows):
                table = np.int64(table_of[kind[r]])
                lane = turn & lanes
                turn += 1
                x = states[lane]
                shift = np.uint64(shifts[table])
                slot = x & ((N1 << shift) - N1)
                symbol = owners[owners_at[table] + np.int64(slot)]
                entry = table * 256 + np.int64(symbol)
                x = np.uint64(frequencies[entry]) * (x >> shift) + (slot - np.uint64(starts[entry]))
                needy = x < LOW and at < words.size
                word = np.uint64(words[at]) if needy else np.uint64(0)
                states[lane] = (x << N16) | word if needy else x
                at += np.int64(needy)
                step[r] = np.int32(np.int8(symbol))
            for r in range(rows):
                code = np.int8(whole[r] - step[r] if rest[r] < 0 else whole[r] + step[r])
                codes[top + r, begin + i] = code
                if predicted:
                    z = normalized(code, inverse[top + r])
                    z_out[top + r, begin + i] = z
                    surprises[i + 1, r] = z - foreseen[r]
    return at, turn


@compiled(INT(U8, I16, I32, U32, U32, U64_OUT, types.uint16[::1]))
def encode_tables(
    symbols: np.ndarray,
    tables: np.ndarray,
    shifts: np.ndarray,
    frequencies: np.ndarray,
    starts: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
) -> int:
    """rANS with a table for each symbol: fill `words` from its end, return the place of the first."""
    lanes = np.int64(states.size - 1)
    at = words.size
    for i in range(symbols.size - 1, -1, -1):
        table = np.int64(tables[i])
        entry = table * 256 + np.int64(symbols[i])
        frequency = np.uint64(frequencies[entry])
        shift = np.uint64(shifts[table])
        x = states[i & lanes]
        if x >= frequency << (np.uint64(32) - shift):
            at -= 1
            words[at] = x & WORD
            x >>= N16
        quotient = x // frequency
        states[i & lanes] = (quotient << shift) + (x - quotient * frequency) + np.uint64(starts[entry])
    return at
