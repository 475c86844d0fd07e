"""Predictive loops: the inner loops of the predictive coder, compiled. Integers only.

Rows are coded in blocks, column by column, so that the rows of a block are independent and can be vectorized.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, call-arg, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from tersor.coders.loops import (
    BYTE,
    INT,
    LOW,
    N1,
    N8,
    N16,
    N32,
    THREE_BYTES,
    U8,
    U16,
    U32,
    U32_OUT,
    U64,
    U64_OUT,
)
from tersor.coders.predictive.matrix_model import BLOCK, COEF, FAR, FINE, FRACTIONS, GROUPS, NORMAL, ONE
from tersor.coders.predictive.regression_loops import ADD_MOMENTS, F64_2, rounded
from tersor.coders.rans.wide_loops import LANES, decode16_tables
from tersor.coders.vector_loops import (
    LONG,
    SHORT,
    WORD,
    constant,
    data_pointer,
    fold,
    load,
    multiply_pairs,
    store,
    vector,
)
from tersor.compiled import compiled

I8_2 = types.int8[:, ::1]
I16_2 = types.int16[:, ::1]
I32 = types.Array(types.int32, 1, "C", readonly=True)
I16_2_IN = types.Array(types.int16, 2, "C", readonly=True)
I16 = types.Array(types.int16, 1, "C", readonly=True)

NORMAL_SHIFT = NORMAL - 4 - ONE  # a level of 0 is a scale of 2^-4
MEAN_SHIFT = ONE + COEF - FINE
HALF = 1 << (FINE - 1)


@njit(forceinline=True)
def normalized(value, inverse):
    z = (np.int64(value) * inverse) >> NORMAL_SHIFT
    return min(max(z, -FAR), FAR)


@njit(forceinline=True)
def buffers(width):
    """(prediction errors, normalized codes, sums) of a block, with a constant before the first column."""
    errors = np.zeros((width // 2 + 1, BLOCK, 2), np.int16)
    pairs = np.zeros((BLOCK // 2, rounded(width), 2), np.int16)
    for r in range(BLOCK):
        errors[0, r, 0] = pairs[r >> 1, 0, r & 1] = 1 << ONE
    return errors, pairs, np.zeros(BLOCK, np.int32)


@intrinsic
def predict(typing_context, lower, errors, sums, column):
    """sums [BLOCK] = sum over j <= column of lower[column + 1, j] * errors[j], wrapped to 32 bits.

    errors [W / 2 + 1, BLOCK, 2]: columns in pairs. L is zero for the unused column of the last pair.
    """
    signature = types.void(lower, errors, sums, types.int64)

    def generate(context, build, signature, args):
        weights, start, out = (data_pointer(context, build, signature.args[k], args[k]) for k in range(3))
        shape = context.make_array(signature.args[0])(context, build, args[0]).shape
        row = build.mul(build.add(args[3], LONG(1)), build.extract_value(shape, 1))

        def step(pair, held):
            by = load(build, weights, build.add(row, build.shl(pair, LONG(1))), WORD)
            first = build.mul(pair, LONG(2 * BLOCK))
            found = []
            for k, before in enumerate(held):
                pairs = load(build, start, build.add(first, LONG(2 * LANES * k)), vector(SHORT, 2 * LANES))
                found.append(build.add(before, multiply_pairs(build, pairs, by)))
            return found

        count = build.add(build.lshr(args[3], LONG(1)), LONG(1))
        zeros = [constant(0, vector(WORD, LANES))] * (BLOCK // LANES)
        for k, value in enumerate(fold(build, count, zeros, step)):
            store(build, value, out, LONG(LANES * k))
        return context.get_dummy_value()

    return signature, generate


@compiled(types.void(I8_2, I32, I32, I16_2_IN, INT, INT, INT, INT, I16_2, F64_2))
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
    total: np.ndarray,
) -> None:
    """Means in 1 / 2^FINE codes of rows first:last and columns begin:end; 0 if `lower` is empty.

    Unless `total` is empty, the second moments of the rows, which are whole blocks then, are added to it.
    """
    width = end - begin
    errors, pairs, sums = buffers(width)
    for top in range(first, last, BLOCK):
        rows = min(BLOCK, last - top)
        for i in range(width):
            if lower.shape[0]:
                predict(lower, errors, sums, i)
            for r in range(rows):
                row = top + r
                predicted = min(max(sums[r] >> COEF, -FAR), FAR)
                out[row, begin + i] = (np.int64(predicted) * scale[row]) >> MEAN_SHIFT
                z = normalized(codes[row, begin + i], inverse[row])
                pairs[r >> 1, i + 1, r & 1] = z
                errors[(i + 1) >> 1, r, (i + 1) & 1] = z - predicted
        if total.shape[0]:
            ADD_MOMENTS(pairs, total)


@njit(forceinline=True)
def rotate_states(states, turn):
    """Rotate the states so that the next one comes first. Returns the new index of the next one, 0."""
    if turn:
        held = states.copy()
        for k in range(states.size):
            states[k] = held[(turn + k) & (states.size - 1)]
    return 0


@compiled(
    types.UniTuple(INT, 2)(
        U16, INT, U32_OUT, INT, INT, I8_2, I32, I32, I16, I16, I16_2_IN, INT, INT, INT, INT, U32, U64, F64_2
    )
)  # fmt: skip
def decode_rows(
    words: np.ndarray,
    at: int,
    states: np.ndarray,
    turn: int,
    wide: int,
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
    tables: np.ndarray,
    slots: np.ndarray,
    total: np.ndarray,
) -> tuple[int, int]:
    """Fill codes[first:last, begin:end]. Returns (number of words used in all, index of the next state).

    `wide`: there are 16 states, which one vector can decode. `tables` and `slots` as in
    wide_loops.decode16_tables, where a kind is group * FRACTIONS + distance. `lower` and `total` as in
    `means`.
    """
    width = end - begin
    predicting, collecting = lower.shape[0] > 0, total.shape[0] > 0
    errors, pairs, sums = buffers(width)
    predicted, whole, rest = np.empty((3, BLOCK), np.int32)
    kind, step = np.empty((2, BLOCK), np.int32)
    for top in range(first, last, BLOCK):
        rows = min(BLOCK, last - top)
        for i in range(width):
            if predicting:
                predict(lower, errors, sums, i)
            for r in range(rows):  # without branches, so that it is vectorized
                predicted[r] = min(max(sums[r] >> COEF, -FAR), FAR)
                mean = np.int32(np.int16((np.int64(predicted[r]) * scale[top + r]) >> MEAN_SHIFT))
                whole[r] = (mean + HALF) >> FINE
                rest[r] = mean - (whole[r] << FINE)
                group = (np.int32(row_level[top + r]) + np.int32(column_level[begin + i])) >> 1
                group = min(max(group, 0), GROUPS - 1)
                kind[r] = group * FRACTIONS + abs(rest[r])
            done = 0
            if wide and at + BLOCK <= words.size:
                turn = rotate_states(states, turn)
                while done + LANES <= rows:
                    at = decode16_tables(words, at, states, tables, slots, kind, step, done)
                    done += LANES
            for r in range(done, rows):
                table = tables[kind[r]]
                x = np.uint64(states[turn])
                shift = np.uint64(table & 31)
                slot = slots[np.uint64(table >> 5) + (x & ((N1 << shift) - N1))]
                x = ((slot >> N8) & THREE_BYTES) * (x >> shift) + (slot >> N32)
                needy = x < LOW and at < words.size
                word = np.uint64(words[at]) if needy else np.uint64(0)
                states[turn] = (x << N16) | word if needy else x
                at += np.int64(needy)
                turn = (turn + 1) & (states.size - 1)
                step[r] = np.int32(np.int8(slot & BYTE))
            for r in range(rows):
                code = np.int8(whole[r] - step[r] if rest[r] < 0 else whole[r] + step[r])
                codes[top + r, begin + i] = code
                if predicting or collecting:
                    z = normalized(code, inverse[top + r])
                    pairs[r >> 1, i + 1, r & 1] = z
                    errors[(i + 1) >> 1, r, (i + 1) & 1] = z - predicted[r]
        if collecting:
            ADD_MOMENTS(pairs, total)
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
    """rANS with a table for each symbol: fill `words` from its end. Returns the index of the first word."""
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
            words[at] = x & np.uint64(0xFFFF)
            x >>= N16
        quotient = x // frequency
        states[i & lanes] = (quotient << shift) + (x - quotient * frequency) + np.uint64(starts[entry])
    return at
