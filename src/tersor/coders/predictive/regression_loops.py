"""Regression loops: linear regression of each column on earlier columns, from second moments, compiled.

L D L' = moments / rows + ridge on the diagonal      L unit lower triangular, D diagonal

Cost: W^2 / 2 products a row for the moments, W^3 / 6 for the elimination, W at most 256.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, func-returns-value"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from tersor.coders.loops import INT
from tersor.coders.predictive.matrix_model import BAND, BLOCK, COEF, STRONG
from tersor.coders.vector_loops import (
    DOUBLE,
    LONG,
    SHORT,
    WORD,
    broadcast,
    constant,
    data_pointer,
    fold,
    load,
    multiply_pairs,
    store,
    vector,
)
from tersor.compiled import compiled

ROUND = 16  # matrix sizes are multiples of this
PITCH = -(-(BAND + 1) // ROUND) * ROUND  # elements from one pivot column to the next: a compile-time constant
PANEL = 8  # pivots eliminated together
TILE = 8  # rows of moments summed together

F64_2_IN = types.Array(types.float64, 2, "C", readonly=True)
F64_2 = types.float64[:, ::1]
PAIRS = types.int16[:, :, ::1]


@njit(forceinline=True)
def rounded(columns):
    """Size of the moment matrix of `columns` columns and a constant, rounded up."""
    return -(-(columns + 1) // ROUND) * ROUND


@intrinsic
def add_tile(typing_context, pairs, row, column, total):
    """total[row : row + 8, column : column + 16] += sums over BLOCK rows of products of their codes.

    |code| <= 2^12, so a sum of 64 products fits in 32 bits.
    """
    signature = types.void(pairs, types.int64, types.int64, total)

    def generate(context, build, signature, args):
        start, sums = (data_pointer(context, build, signature.args[k], args[k]) for k in (0, 3))
        side = context.make_array(signature.args[3])(context, build, args[3]).shape
        side = build.extract_value(side, 0)
        row, column = args[1], args[2]

        def step(pair, held):
            first = build.mul(pair, side)

            def at(k):
                return build.mul(build.add(first, k), LONG(2))

            ones = load(build, start, at(column), vector(SHORT, 32))
            found = []
            for k in range(TILE):
                other = load(build, start, at(build.add(row, LONG(k))), WORD)
                found.append(build.add(held[k], multiply_pairs(build, ones, other)))
            return found

        zero = constant(0, vector(WORD, ROUND))
        found = fold(build, LONG(BLOCK // 2), [zero] * TILE, step)
        for k in range(TILE):
            at = build.add(build.mul(build.add(row, LONG(k)), side), column)
            before = load(build, sums, at, vector(DOUBLE, ROUND))
            store(build, build.fadd(before, build.sitofp(found[k], before.type)), sums, at)
        return context.get_dummy_value()

    return signature, generate


@compiled(types.void(PAIRS, F64_2))
def add_moments(pairs: np.ndarray, total: np.ndarray) -> None:
    """Add the second moments of BLOCK rows of normalized codes to the lower triangle of total [N, N].

    pairs [BLOCK / 2, N, 2]: rows in pairs, with a constant as the first column. Sums are integers below 2^52,
    exact in float64, so their order does not matter.
    """
    for row in range(0, total.shape[0], TILE):
        for column in range(0, row + TILE, ROUND):
            add_tile(pairs, row, column, total)


@intrinsic
def subtract_panel(typing_context, row, at, pivots, first, f0, f1, f2, f3, f4, f5, f6, f7):
    """row[at : at + 8] -= f_k * pivots[k * PITCH + first : ... + 8] for k = 0 .. 7, in this order."""
    numbers = [types.float64] * PANEL
    signature = types.void(row, types.int64, pivots, types.int64, *numbers)

    def generate(context, build, signature, args):
        to, start = (data_pointer(context, build, signature.args[k], args[k]) for k in (0, 2))
        kind = vector(DOUBLE, 8)
        value = load(build, to, args[1], kind)
        for k in range(PANEL):
            pivot = load(build, start, build.add(args[3], LONG(k * PITCH)), kind)
            value = build.fsub(value, build.fmul(broadcast(build, args[4 + k], 8), pivot))
        store(build, value, to, args[1])
        return context.get_dummy_value()

    return signature, generate


@njit(forceinline=True)
def subtract(row, factor, pivot):
    """row -= factor * pivot. Indices start at 0, so that the loop is vectorized."""
    for j in range(row.size):
        row[j] -= factor * pivot[j]


@njit(forceinline=True)
def divided(row, pivot, out):
    for j in range(row.size):
        out[j] = row[j] / pivot


@compiled(types.void(F64_2, INT))
def eliminate(a: np.ndarray, size: int) -> None:
    """Replace a [N, N], symmetric, by its unit lower factor below the diagonal, for the first `size` rows.

    Right-looking elimination: each element takes one multiplication and one subtraction for each pivot, in
    order and rounded as IEEE 754 says, so all machines get the same bits. Works in panels of pivots, whose
    columns are copied to rows. The upper triangle of the result is undefined.
    """
    pivots, factors = np.zeros(PANEL * PITCH), np.zeros(PANEL * PITCH)
    for first in range(0, size, PANEL):
        wide = min(PANEL, size - first)
        for i in range(first, size):
            for k in range(wide):
                pivots[k * PITCH + i] = a[i, first + k]
        for k in range(wide):
            column = pivots[k * PITCH : k * PITCH + size]
            factor = factors[k * PITCH : k * PITCH + size]
            divided(column[first + k + 1 :], column[first + k], factor[first + k + 1 :])
            for j in range(k + 1, wide):
                subtract(
                    pivots[j * PITCH + first + j : j * PITCH + size], column[first + j], factor[first + j :]
                )
        for i in range(first, size):
            for k in range(min(wide, i - first)):
                a[i, first + k] = factors[k * PITCH + i]
        last = first + PANEL
        for i in range(last, size):
            f0, f1, f2, f3, f4, f5, f6, f7 = a[i, first:last]
            row = a[i]
            for j in range(last, i + 1, 8):
                subtract_panel(row, j, pivots, j, f0, f1, f2, f3, f4, f5, f6, f7)


ADD_MOMENTS, ELIMINATE = add_moments.dispatcher, eliminate.dispatcher  # for calls from other loops


@compiled(types.int16[:, ::1](F64_2_IN, INT, INT, types.float64))
def learn(total: np.ndarray, columns: int, rows: int, ridge: float) -> np.ndarray:
    """L [N, N] int16, below the diagonal, from second moments total [N, N] summed over `rows` rows."""
    a = total / rows
    squares = 0.0
    for k in range(1, columns + 1):  # one by one: the order of a sum decides its last bits
        squares += a[k, k]
    # The 1 keeps every pivot away from zero, also if a column is constant.
    shrink = ridge * columns / rows * (squares / columns) + 1.0
    for k in range(1, columns + 1):
        a[k, k] += shrink
    ELIMINATE(a, columns + 1)
    lower = np.zeros(a.shape, np.int16)
    for i in range(1, columns + 1):
        for k in range(i):
            lower[i, k] = np.int16(min(max(np.rint(a[i, k] * (1 << COEF)), -STRONG), STRONG))
    return lower
