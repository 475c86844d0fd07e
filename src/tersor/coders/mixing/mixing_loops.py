"""Mixing loops: the inner loop of the mixing coder, compiled. Integers only, so that all machines agree.

Each kind of context has its own range of indices into one array of probabilities; nothing is hashed.
arithmetic_loops.py codes the bits, row_predictor_loops.py predicts from earlier rows. docs/streams.md section
11.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, operator, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, types

from tersor.coders.loops import INT, U8_OUT
from tersor.coders.mixing.arithmetic_loops import AHEAD, HALF, INPUTS, close_coder, code_bit, open_coder
from tersor.coders.mixing.row_predictor_loops import HISTORY, append_row, predict, update
from tersor.compiled import compiled

SETS = 128  # weight sets
SUM = 1 << 16  # initial sum of the weights of a set
STARTS = (10, 5, 7, 7, 10, 7, 5, 7)  # contexts that share this sum, for each block of 16 sets
WRAP = 1 << 16  # later columns and rows share the contexts of the first ones
STEPS, NODES = 16, 256  # distinguished magnitudes of the unary code; nodes of a tree of 7 bits
QUIET = 14  # low binary digits of the squared prediction that are ignored
SIGNED, MIDDLE = 33, 16  # values of signed_level: level 1 to 16 with either sign, or 0

# Number of contexts of each kind: of "is it zero", signs, magnitudes. Contexts by row and column follow.
ZERO_PLACES = (256, 256, 128, 432, 2048, 1024, 256, 1)
SIGN_PLACES = (81, 27, SIGNED, SIGNED, SIGNED * 16, 1)
STEP_PLACES, NODE_PLACES = (16, 8, 4, 64, SIGNED, 27, 1), (9, 64, SIGNED, 33, 1)


def begins(places, at, times=1):
    """First index of each kind if the first kind begins at `at`, and the end of the last kind."""
    return tuple(at + times * sum(places[:k]) for k in range(len(places) + 1))


ZERO = begins(ZERO_PLACES, 0)
SIGN = begins(SIGN_PLACES, ZERO[-1])
STEP = begins(STEP_PLACES, SIGN[-1], STEPS)
NODE = begins(NODE_PLACES, STEP[-1], NODES)
BY_PLACE = NODE[-1]

I8_2 = types.int8[:, ::1]
U8_2 = types.uint8[:, ::1]
I32 = types.Array(types.int32, 1, "C", readonly=True)
I64 = types.Array(types.int64, 1, "C", readonly=True)
BOOL = types.boolean


@njit(forceinline=True)
def bit_length(value):
    """Bit length of a number: 0, 1, 2, 2, 3, ..."""
    bits = 0
    while value > 0:
        value >>= 1
        bits += 1
    return bits


@njit(forceinline=True)
def density(count, out_of):
    """count / out_of in half octaves, 1 to 15; 0 if out_of is 0."""
    if out_of == 0:
        return 0
    parts = (2 * count + 1) * 256 // (2 * out_of + 2)
    bits = bit_length(parts)
    half = (parts >> (bits - 2)) & 1 if bits >= 2 else 0
    return min(15, max(1, 2 * bits + half - 3))


@njit(forceinline=True)
def fine(parts):
    """A fraction in units of 2^-16, in quarter octaves: 0 to 63."""
    bits = bit_length(parts)
    if bits < 3:
        return bits
    return min(63, 4 * (bits - 2) + ((parts >> (bits - 3)) & 3))


@njit(forceinline=True)
def sign(value):
    """0 for negative numbers, 1 for zero, 2 for positive numbers."""
    return np.int64(value > 0) - np.int64(value < 0) + 1


@njit(forceinline=True)
def at(matrix, o, i):
    """The code at row o, column i; 0 outside of the matrix."""
    if o < 0 or i < 0 or i >= matrix.shape[1]:
        return np.int64(0)
    return np.int64(matrix[o, i])


@njit(forceinline=True)
def signed_level(level, total):
    """0 to 32: the level, with the sign of the prediction `total`."""
    return MIDDLE + (np.int64(total > 0) - np.int64(total < 0)) * (level + 1)


@njit(forceinline=True)
def agrees(level, total, negative):
    """0 without a prediction; 1 to 16 if it has the other sign, 17 to 32 if it has this sign."""
    return (total != 0) * (1 + level + 16 * ((total < 0) == (negative > 0)))


@njit(forceinline=True)
def sign_relation(value, negative):
    """0 if a neighbor is zero, 1 if it has the other sign, 2 if it has this sign."""
    return (value != 0) * (1 + ((value < 0) == (negative > 0)))


@njit(forceinline=True)
def mean_size(total, count, mean):
    """Mean of `count` magnitudes with 4 fractional bits, with a prior of 4 codes of the overall mean."""
    return (16 * total + 4 * mean) // (count + 4)


@njit
def code_steps(size, contexts, a, b, c, beside, near, column_scale, expected, agreement, coder):
    """A magnitude from 1 to 128 in unary: each bit says whether it is larger."""
    step = more = 1
    while more and step < 128:
        k = min(step - 1, STEPS - 1)
        contexts[0] = STEP[0] + (min(a, 3) * 4 + min(b, 3)) * STEPS + k
        contexts[1] = STEP[1] + near * STEPS + k
        contexts[2] = STEP[2] + min(c, 3) * STEPS + k
        contexts[3] = STEP[3] + expected * STEPS + k
        contexts[4] = STEP[4] + agreement * STEPS + k
        contexts[5] = STEP[5] + beside * STEPS + k
        contexts[6] = STEP[6] + k
        more = code_bit(1 if size > step else 0, contexts, 7, 32 + k, 112 + column_scale, coder)
        step += more
    return step


@njit
def code_tree(size, contexts, negative, away, left, column_scale, expected, agreement, coder):
    """A magnitude from 1 to 128 as the 7 bits of size - 1, highest bit first."""
    node = 1
    for k in range(7):
        at_node = 128 * negative + node
        contexts[0] = NODE[0] + away * NODES + at_node
        contexts[1] = NODE[1] + expected * NODES + at_node
        contexts[2] = NODE[2] + agreement * NODES + at_node
        contexts[3] = NODE[3] + left * NODES + at_node
        contexts[4] = NODE[4] + at_node
        bit = code_bit(((size - 1) >> (6 - k)) & 1, contexts, 5, 16 + k, 96 + column_scale, coder)
        node = 2 * node + bit
    return (node & 127) + 1


@compiled(INT(I8_2, U8_2, U8_OUT, INT, INT, BOOL, BOOL, BOOL, I32, I32, I64, I64))
def mix(
    matrix: np.ndarray,
    kept: np.ndarray,
    data: np.ndarray,
    lag_a: int,
    lag_b: int,
    tree: bool,
    zeros: bool,
    decoding: bool,
    squash: np.ndarray,
    stretch: np.ndarray,
    context_rates: np.ndarray,
    weight_rates: np.ndarray,
) -> int:
    """Encode the matrix into `data`, or decode it from there. Returns the number of bytes, or -1 if damaged.

    kept: mask of the elements to code, [0, 0] for all      lags: columns, 0 to 255
    tree: magnitudes as 7 bits, else in unary      zeros: whether kept elements can be zero
    If an encoder returns more than data.size, `data` was too short. A decoder stops at the end of `data`.
    """
    rows, columns = matrix.shape
    wide, long = min(columns, WRAP), min(rows, WRAP)
    by_column, by_row, by_sign = BY_PLACE, BY_PLACE + wide, BY_PLACE + wide + long
    total = by_sign + 3 * wide
    probabilities, counts = np.full(total, HALF, np.int32), np.zeros(total, np.int64)
    weights = np.zeros((SETS, INPUTS + 1), np.int64)  # 16 fractional bits; the last column counts updates
    for k in range(SETS):
        for n in range(INPUTS):
            weights[k, n] = SUM // STARTS[k // 16]
    contexts, inputs, ends = np.zeros(INPUTS, np.int64), np.zeros(INPUTS, np.int64), np.zeros(4, np.uint64)
    coder = (
        probabilities, counts, weights, inputs, squash, stretch, context_rates, weight_rates, ends, data,
        decoding,
    )  # fmt: skip
    open_coder(ends, data, decoding)
    period = lag_b if lag_b > 0 else max(lag_a, 1)
    room = min(rows, HISTORY)
    history, slogs = np.zeros((columns, room), np.int32), np.zeros((columns, room), np.int8)
    seen, row_weights = np.zeros(columns, np.int64), np.zeros(rows, np.int64)
    row_slogs = np.zeros(columns, np.int8)
    # Statistics of each column, of the row so far and of all: codes seen, nonzero codes, a running mean of
    # magnitudes with 8 fractional bits (not for all), the sum of magnitudes.
    column_seen, column_count = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    column_size, column_sum = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    all_seen = all_count = all_sum = 0
    for o in range(rows):
        row_seen = row_count = row_size = row_sum = 0
        for i in range(columns):
            if kept.size and kept[o, i] == 0:
                continue
            if decoding and np.int64(ends[3]) >= data.size + AHEAD:
                return np.int64(-1)
            l1, u1, ul = at(matrix, o, i - 1), at(matrix, o - 1, i), at(matrix, o - 1, i - 1)
            l2, u2, ur = at(matrix, o, i - 2), at(matrix, o - 2, i), at(matrix, o - 1, i + 1)
            p1 = at(matrix, o, i - lag_a) if lag_a > 0 else 0
            p2 = at(matrix, o, i - lag_a + 1) if lag_a > 1 else 0
            p3 = at(matrix, o, i - lag_a - 1) if lag_a > 0 else 0
            q1 = at(matrix, o, i - lag_b) if lag_b > 0 else 0
            a, b, c, d = abs(l1), abs(u1), abs(p1), abs(q1)
            around = 2 * (a + b + c + d) + abs(l2) + abs(u2) + abs(ul) + abs(ur) + abs(p2) + abs(p3)
            near = min(bit_length(around), 7)
            column_scale, row_scale = min(bit_length(column_size[i]), 15), min(bit_length(row_size), 15)
            predicted, squares = predict(i, history, slogs, seen, row_weights)
            square = predicted * predicted
            level = min(max(bit_length(square) - QUIET, 0), 15)
            certainty = min(bit_length(64 * square // (squares + 1)), 15) if predicted != 0 else 0
            here = column_count[i]
            value = np.int64(matrix[o, i])
            nonzero = 1
            if zeros:
                # Neighboring columns have similar densities. This column replaces those outside the matrix.
                sides = column_count[i - 1] if i > 0 else here
                sides += column_count[i + 1] if i + 1 < columns else here
                sides += column_count[i - lag_a] if i >= lag_a else here
                sides += column_count[i + lag_a] if i + lag_a < columns else here
                nearby = density(sides + 4 * here, 8 * column_seen[i])
                flags = (l1 != 0) + 2 * (u1 != 0) + 4 * (p1 != 0) + 8 * (q1 != 0)
                more = (ul != 0) + 2 * (ur != 0) + 4 * (p2 != 0 or p3 != 0) + 8 * (u2 != 0)
                # The overall density, times the relative densities of the row and the column.
                mean = max(((2 * all_count + 1) << 16) // (2 * all_seen + 2), 1)
                by_own = ((row_count << 16) + 40 * mean) // (row_seen + 40)
                by_other = ((here << 16) + 30 * mean) // (column_seen[i] + 30)
                density_level = fine(min(by_own * by_other // mean, 65535))
                contexts[0] = ZERO[0] + flags * 16 + more
                contexts[1] = ZERO[1] + density(here, column_seen[i]) * 16 + density(row_count, row_seen)
                contexts[2] = ZERO[2] + nearby * 8 + (flags & 7)
                contexts[3] = ZERO[3] + column_scale * 27 + min(row_scale, 8) * 3 + min(a, 2)
                contexts[4] = by_column + i % WRAP
                contexts[5] = by_row + o % WRAP
                contexts[6] = ZERO[4] + (i % period) * 8 + (flags & 1) + 2 * (flags >> 2)
                contexts[7] = ZERO[5] + level * 64 + density_level
                contexts[8] = ZERO[6] + certainty * 16 + level
                contexts[9] = ZERO[7]
                nonzero = code_bit(1 if value != 0 else 0, contexts, 10, near, 64 + density_level // 4, coder)
            size = 0
            if nonzero:
                sl, su, sp, sq = sign(l1), sign(u1), sign(p1), sign(q1)
                contexts[0] = SIGN[0] + ((sl * 3 + su) * 3 + sp) * 3 + sq
                contexts[1] = SIGN[1] + (sp * 3 + sign(l2)) * 3 + sq
                contexts[2] = by_sign + 3 * (i % WRAP) + su
                contexts[3] = SIGN[2] + signed_level(level, predicted)
                contexts[4] = SIGN[3] + signed_level(certainty, predicted)
                contexts[5] = SIGN[4] + signed_level(certainty, predicted) * 16 + level
                contexts[6] = SIGN[5]
                negative = code_bit(1 if value < 0 else 0, contexts, 7, 48 + (sp != 1), 80 + su, coder)
                mean = (16 * all_sum + 16) // (all_count + 1)
                likely = mean_size(column_sum[i], here, mean) * mean_size(row_sum, row_count, mean) // mean
                expected, agreement = fine(min(likely, 65535)), agrees(level, predicted, negative)
                if tree:
                    away = (c > 0) * (1 + min(c >> 2, 3) + 4 * ((p1 < 0) == (negative > 0)))
                    left = (a > 0) * (1 + min(a >> 1, 15) + 16 * ((l1 < 0) == (negative > 0)))
                    size = code_tree(
                        abs(value), contexts, negative, away, left, column_scale, expected, agreement, coder
                    )
                else:
                    beside = (
                        9 * sign_relation(l1, negative)
                        + 3 * sign_relation(u1, negative)
                        + sign_relation(p1, negative)
                    )
                    size = code_steps(
                        abs(value), contexts, a, b, c, beside, near, column_scale, expected, agreement, coder
                    )
                if decoding:
                    matrix[o, i] = np.int8(-size if negative else size)
                row_slogs[i] = -bit_length(size) if negative else bit_length(size)
                update(np.int64(row_slogs[i]), predicted, i, history, slogs, seen, row_weights)
                row_count, all_count, column_count[i] = row_count + 1, all_count + 1, here + 1
                row_sum, all_sum, column_sum[i] = row_sum + size, all_sum + size, column_sum[i] + size
            row_seen, all_seen, column_seen[i] = row_seen + 1, all_seen + 1, column_seen[i] + 1
            column_size[i] += (size * 256 - column_size[i]) // min(column_seen[i], 16)
            row_size += (size * 256 - row_size) // min(row_seen, 16)
        append_row(o, row_slogs, history, slogs, seen, row_weights)
    return close_coder(ends, data, decoding)
