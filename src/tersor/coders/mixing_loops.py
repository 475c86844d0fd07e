"""Mixing loops: the inner loop of the mixing coder, compiled. Integers only, so that all machines agree.

One function codes and decodes, so that both see the same contexts. A context is a place in two arrays: the
chance of a one (22 bits) and how often it was seen. Each kind of context has places of its own, one range
behind the other; nothing is hashed. docs/streams.md section 11.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, operator, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, types

from tersor.coders.curves import STRETCH_MAX
from tersor.coders.loops import INT, U8_OUT, compiled

INPUTS = 11  # contexts of a bit, at most
SETS = 128  # of weights
SUM = 1 << 16  # of the weights of a set at the start
STARTS = (11, 4, 6, 6, 11, 5, 4, 6)  # contexts that share that sum, for each 16 sets
RUSH, MANY = 256, 60000  # weights learn faster at first; so many bits are counted
TRUST = 2  # bits that a chance taken from the parent is worth
LIMIT = 1023  # bits that a chance remembers
EVEN = 1 << 21  # a chance of one half
AHEAD = 4  # bytes that a decoder looks ahead
WRAP = 1 << 16  # columns and rows further on share the contexts of the first ones
STEPS, STEP_PLACES = 16, 61  # sizes told apart while they are counted up; contexts for each
NODES, NODE_PLACES = 256, 42  # the same for sizes as a tree of 7 bits

# Where the kinds of contexts begin: of "is it zero", signs, sizes; then those by row and column.
ZERO_PLACES = (243, 256, 256, 128, 432, 8, 2048, 256, 1)
Z = tuple(sum(ZERO_PLACES[:k]) for k in range(len(ZERO_PLACES) + 1))
SIGNS = Z[9]
SIZES = SIGNS + 81 + 27 + 81 + 1
TREES = SIZES + STEPS * STEP_PLACES
BY_PLACE = TREES + NODES * NODE_PLACES

I8_2 = types.int8[:, ::1]
U8_2 = types.uint8[:, ::1]
I32 = types.Array(types.int32, 1, "C", readonly=True)
TOP = np.uint64(0xFFFFFFFF)
BOOL = types.boolean


@njit(inline="always")
def logs(value):
    """Number of bits of a number: 0, 1, 2, 2, 3, ..."""
    bits = 0
    while value > 0:
        value >>= 1
        bits += 1
    return bits


@njit(inline="always")
def density(count, out_of):
    """1 to 15: how dense, in half octaves; 0 where nothing was seen."""
    if out_of == 0:
        return 0
    parts = (2 * count + 1) * 256 // (2 * out_of + 2)
    bits = logs(parts)
    half = (parts >> (bits - 2)) & 1 if bits >= 2 else 0
    return min(15, max(1, 2 * bits + half - 3))


@njit(inline="always")
def fine(parts):
    """0 to 63: a share of 2^16 in quarter octaves."""
    bits = logs(parts)
    if bits < 3:
        return bits
    return min(63, 4 * (bits - 2) + ((parts >> (bits - 3)) & 3))


@njit(inline="always")
def sign(value):
    """0, 1, 2 for numbers below, at and above zero."""
    return np.int64(value > 0) - np.int64(value < 0) + 1


@njit(inline="always")
def at(matrix, o, i):
    """The code there, 0 outside."""
    if o < 0 or i < 0 or i >= matrix.shape[1]:
        return np.int64(0)
    return np.int64(matrix[o, i])


@njit
def code_bit(bit, where, n, first, second, coder):
    """Code or decode one bit with the contexts where[:n], the most general of them last; return it.

    The chance is the mean of two mixes, by the weights of the sets `first` and `second`.
    """
    chances, counts, weights, inputs, squash, stretch, ends, data, rate, decoding = coder
    parent = where[n - 1]
    dot1 = dot2 = np.int64(0)
    for k in range(n):
        place = where[k]
        if counts[place] == 0 and place != parent:  # nothing is known here but what is known in general
            chances[place] = chances[parent]
            counts[place] = TRUST
        inputs[k] = stretch[chances[place] >> 10]
        dot1 += np.int64(weights[first, k]) * inputs[k]
        dot2 += np.int64(weights[second, k]) * inputs[k]
    chance = np.int64(squash[min(max((dot1 + dot2) >> 17, -STRETCH_MAX), STRETCH_MAX) + STRETCH_MAX])
    bit = code_chance(bit, chance, ends, data, decoding)
    for chosen, dot in ((first, dot1), (second, dot2)):
        mixed = np.int64(squash[min(max(dot >> 16, -STRETCH_MAX), STRETCH_MAX) + STRETCH_MAX])
        seen = np.int64(weights[chosen, INPUTS])
        error = ((bit << 16) - mixed) * (rate + RUSH * rate // (16 + seen))
        weights[chosen, INPUTS] = np.int32(min(seen + 1, MANY))
        for k in range(n):
            weights[chosen, k] += np.int32((inputs[k] * error + (1 << 19)) >> 20)
    target = (2 * EVEN - 1) if bit else 0
    for k in range(n):
        place = where[k]
        count = np.int64(counts[place])
        chances[place] += np.int32((target - np.int64(chances[place])) * 2 // (2 * count + 3))
        counts[place] = np.int32(min(count + 1, LIMIT))
    return bit


@njit(inline="always")
def code_chance(bit, chance, ends, data, decoding):
    """A step of the arithmetic coder. chance: of a one, in 2^16    ends: low, high, code, place in `data`"""
    low, high = ends[0], ends[1]
    middle = low + (((high - low) * np.uint64(chance)) >> np.uint64(16))
    if decoding:
        bit = 1 if ends[2] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + np.uint64(1)
    while ((low ^ high) & np.uint64(0xFF000000)) == 0:
        place = np.int64(ends[3])
        if decoding:
            byte = np.uint64(data[place]) if place < data.size else np.uint64(0)
            ends[2] = ((ends[2] << np.uint64(8)) & TOP) | byte
        elif place < data.size:
            data[place] = np.uint8(high >> np.uint64(24))
        ends[3] += np.uint64(1)
        low = (low << np.uint64(8)) & TOP
        high = ((high << np.uint64(8)) & TOP) | np.uint64(0xFF)
    ends[0], ends[1] = low, high
    return bit


@njit
def open_coder(ends, data, decoding):
    ends[1] = TOP
    if decoding:
        for place in range(AHEAD):
            byte = np.uint64(data[place]) if place < data.size else np.uint64(0)
            ends[2] = (ends[2] << np.uint64(8)) | byte
        ends[3] = np.uint64(AHEAD)


@njit
def close_coder(ends, data, decoding):
    """One byte more, which with zeros behind it names a number between low and high: low's first byte plus 1.

    Returns how many bytes there are in all; -1 if a decoder finds another byte there.
    """
    byte = np.uint8((ends[0] >> np.uint64(24)) + np.uint64(1))
    place = np.int64(ends[3]) - (AHEAD if decoding else 0)
    if place < data.size:
        if decoding and data[place] != byte:
            return np.int64(-1)
        data[place] = byte
    return place + 1


@njit
def code_steps(size, where, near, a, b, c, heavy, light, coder):
    """A size from 1 to 128 as answers to "is it larger?"."""
    step = more = 1
    while more and step < 128:
        k = min(step - 1, STEPS - 1)
        base = SIZES + k * STEP_PLACES
        where[0] = base + min(a, 3) * 4 + min(b, 3)
        where[1] = base + 16 + heavy
        where[2] = base + 32 + light
        where[3] = base + 48 + near
        where[4] = base + 56 + min(c, 3)
        where[5] = base + 60
        more = code_bit(1 if size > step else 0, where, 6, 32 + k, 112 + heavy, coder)
        step += more
    return step


@njit
def code_tree(size, where, negative, away, heavy, light, coder):
    """A size from 1 to 128 as the 7 bits of size - 1, the highest first."""
    node = 1
    for k in range(7):
        base = TREES + (128 * negative + node) * NODE_PLACES
        where[0] = base + away
        where[1] = base + 9 + heavy
        where[2] = base + 25 + light
        where[3] = base + 41
        bit = code_bit(((size - 1) >> (6 - k)) & 1, where, 4, 16 + k, 96 + heavy, coder)
        node = 2 * node + bit
    return (node & 127) + 1


@compiled(INT(I8_2, U8_2, U8_OUT, INT, INT, INT, BOOL, BOOL, BOOL, I32, I32))
def mix(
    matrix: np.ndarray,
    kept: np.ndarray,
    data: np.ndarray,
    lag_a: int,
    lag_b: int,
    rate: int,
    tree: bool,
    zeros: bool,
    decoding: bool,
    squash: np.ndarray,
    stretch: np.ndarray,
) -> int:
    """Code the matrix into `data`, or fill it from there; return how many bytes that took, -1 if damaged.

    kept: what is there to be coded, [0, 0] for all      lags: columns, 0 to 255      rate: 0 to 3
    tree: sizes as 7 bits, not counted up      zeros: whether zeros occur where something is kept
    An encoder that returns more than data.size had too little room. A decoder stops where `data` has ended.
    """
    rows, columns = matrix.shape
    wide, long = min(columns, WRAP), min(rows, WRAP)
    by_column, by_row, by_sign = BY_PLACE, BY_PLACE + wide, BY_PLACE + wide + long
    total = by_sign + 3 * wide
    chances, counts = np.full(total, EVEN, np.int32), np.zeros(total, np.int32)
    weights = np.zeros((SETS, INPUTS + 1), np.int32)  # 16 bits after the point; last how often they learned
    for k in range(SETS):
        weights[k, :INPUTS] = SUM // STARTS[k // 16]
    where, inputs, ends = np.zeros(INPUTS, np.int64), np.zeros(INPUTS, np.int64), np.zeros(4, np.uint64)
    coder = (chances, counts, weights, inputs, squash, stretch, ends, data, 1 + 2 * rate, decoding)
    open_coder(ends, data, decoding)
    period = lag_b if lag_b > 0 else max(lag_a, 1)
    # Of each column, of the row so far, of all: codes seen, those that are not zero, a running mean of sizes.
    column_seen, column_count = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    column_size = np.zeros(columns, np.int64)  # 8 bits after the point
    all_seen = all_count = 0
    for o in range(rows):
        row_seen = row_count = row_size = 0
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
            near = min(logs(around), 7)
            heavy, light = min(logs(column_size[i]), 15), min(logs(row_size), 15)
            value = np.int64(matrix[o, i])
            there = 1
            if zeros:
                # Columns beside this one and a lag away share its fate; outside, it stands for them.
                here = column_count[i]
                sides = column_count[i - 1] if i > 0 else here
                sides += column_count[i + 1] if i + 1 < columns else here
                sides += column_count[i - lag_a] if i >= lag_a else here
                sides += column_count[i + lag_a] if i + lag_a < columns else here
                spread = density(sides + 4 * here, 8 * column_seen[i])
                flags = (l1 != 0) + 2 * (u1 != 0) + 4 * (p1 != 0) + 8 * (q1 != 0)
                more = (ul != 0) + 2 * (ur != 0) + 4 * (p2 != 0 or p3 != 0) + 8 * (u2 != 0)
                # The share of all, times how much denser than all the row and the column are.
                mean = max(((2 * all_count + 1) << 16) // (2 * all_seen + 2), 1)
                by_own = ((row_count << 16) + 40 * mean) // (row_seen + 40)
                by_other = ((here << 16) + 30 * mean) // (column_seen[i] + 30)
                expected = fine(min(by_own * by_other // mean, 65535))
                five = ((min(a, 2) * 3 + min(abs(l2), 2)) * 3 + min(b, 2)) * 3 + min(c, 2)
                where[0] = Z[0] + five * 3 + min(d, 2)
                where[1] = Z[1] + flags * 16 + more
                where[2] = Z[2] + density(here, column_seen[i]) * 16 + density(row_count, row_seen)
                where[3] = Z[3] + spread * 8 + (flags & 7)
                where[4] = Z[4] + heavy * 27 + min(light, 8) * 3 + min(a, 2)
                where[5] = by_column + i % WRAP
                where[6] = by_row + o % WRAP
                where[7] = Z[5] + near
                where[8] = Z[6] + (i % period) * 8 + (flags & 1) + 2 * (flags >> 2)
                where[9] = Z[7] + expected * 4 + (flags & 1) + 2 * ((flags >> 2) & 1)
                where[10] = Z[8]
                there = code_bit(1 if value != 0 else 0, where, 11, near, 64 + expected // 4, coder)
            row_seen += 1
            all_seen += 1
            column_seen[i] += 1
            row_count += there
            all_count += there
            column_count[i] += there
            size = 0
            if there:
                sl, su, sp, sq = sign(l1), sign(u1), sign(p1), sign(q1)
                where[0] = SIGNS + ((sl * 3 + su) * 3 + sp) * 3 + sq
                where[1] = SIGNS + 81 + (sp * 3 + sign(l2)) * 3 + sq
                where[2] = SIGNS + 108 + ((su * 3 + sign(u2)) * 3 + sign(ul)) * 3 + sign(ur)
                where[3] = by_sign + 3 * (i % WRAP) + su
                where[4] = SIGNS + 189
                negative = code_bit(1 if value < 0 else 0, where, 5, 48 + (sp != 1), 80 + su, coder)
                if tree:
                    away = (c > 0) * (1 + min(c >> 2, 3) + 4 * ((p1 < 0) == (negative > 0)))
                    size = code_tree(abs(value), where, negative, away, heavy, light, coder)
                else:
                    size = code_steps(abs(value), where, near, a, b, c, heavy, light, coder)
                if decoding:
                    matrix[o, i] = np.int8(-size if negative else size)
            column_size[i] += (size * 256 - column_size[i]) // min(column_seen[i], 16)
            row_size += (size * 256 - row_size) // min(row_seen, 16)
    return close_coder(ends, data, decoding)
