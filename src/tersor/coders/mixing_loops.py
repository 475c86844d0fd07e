"""Mixing loops: the inner loop of the mixing coder, compiled. Integers only.

One function codes and decodes, so that both see the same contexts.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, operator, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, types

from tersor.coders.loops import INT, compiled
from tersor.coders.mixing import STRETCH_MAX

INPUTS = 11  # contexts of a bit, and one that is always the same
SETS = 128
SUM = 1 << 16  # of the weights at the start
STARTS = (11, 4, 6, 6, 11, 5, 4, 6)
RUSH, RATE0 = 256, 4
TRUST = 2  # bits that a chance taken from the parent is worth
I8_2 = types.int8[:, ::1]
U8_2 = types.uint8[:, ::1]
U8_OUT = types.uint8[::1]
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
    """0 to 15: how rare, in half octaves; 0 where nothing was seen."""
    if out_of == 0:
        return 0
    parts = (2 * count + 1) * 256 // (2 * out_of + 2)  # 0 .. 256
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
    return np.int64(value > 0) - np.int64(value < 0) + 1


@njit
def code_bit(bit, where, n, mixer, second, model, ac, data, limit, rate, decoding):
    """Code or decode one bit with the contexts where[:n], the least special of them last; returns it.

    ac: low, high, code, place      weights [SETS, INPUTS] have 16 bits after the point
    """
    chances, counts, weights, st, squash, stretch = model
    parent = where[n - 1]
    dot = dot2 = np.int64(0)
    for k in range(n):
        place = where[k]
        if counts[place] == 0 and place != parent:  # nothing is known here but what is known in general
            chances[place] = chances[parent]
            counts[place] = TRUST
        st[k] = stretch[chances[place] >> 10]
        dot += np.int64(weights[mixer, k]) * st[k]
        dot2 += np.int64(weights[second, k]) * st[k]
    odds = min(max((dot + dot2) >> 17, -STRETCH_MAX), STRETCH_MAX)
    chance = np.int64(squash[odds + STRETCH_MAX])  # of a one, in 2^16
    odds1 = min(max(dot >> 16, -STRETCH_MAX), STRETCH_MAX)
    odds2 = min(max(dot2 >> 16, -STRETCH_MAX), STRETCH_MAX)
    low, high = ac[0], ac[1]
    middle = low + (((high - low) * np.uint64(chance)) >> np.uint64(16))
    if decoding:
        bit = 1 if ac[2] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + np.uint64(1)
    while ((low ^ high) & np.uint64(0xFF000000)) == 0:
        place = np.int64(ac[3])
        if decoding:
            byte = np.uint64(data[place]) if place < data.size else np.uint64(0)
            ac[2] = ((ac[2] << np.uint64(8)) & TOP) | byte
        elif place < data.size:
            data[place] = np.uint8(high >> np.uint64(24))
        ac[3] += np.uint64(1)
        low = (low << np.uint64(8)) & TOP
        high = ((high << np.uint64(8)) & TOP) | np.uint64(0xFF)
    ac[0], ac[1] = low, high
    seen = np.int64(weights[mixer, INPUTS])
    error = ((bit << 16) - np.int64(squash[odds1 + STRETCH_MAX])) * (rate + RUSH * rate // (16 + seen))
    if seen < 60000:
        weights[mixer, INPUTS] = np.int32(seen + 1)
    seen = np.int64(weights[second, INPUTS])
    error2 = ((bit << 16) - np.int64(squash[odds2 + STRETCH_MAX])) * (rate + RUSH * rate // (16 + seen))
    if seen < 60000:
        weights[second, INPUTS] = np.int32(seen + 1)
    target = ((1 << 22) - 1) if bit else 0
    for k in range(n):
        weights[mixer, k] += np.int32((st[k] * error + (1 << 19)) >> 20)
        weights[second, k] += np.int32((st[k] * error2 + (1 << 19)) >> 20)
        place = where[k]
        count = np.int64(counts[place])
        chances[place] += np.int32((target - np.int64(chances[place])) * 2 // (2 * count + 3))
        if count < limit:
            counts[place] = np.int32(count + 1)
    return bit


@compiled(INT(I8_2, U8_2, U8_OUT, INT, INT, INT, BOOL, BOOL, BOOL, I32, I32))
def mix(
    matrix: np.ndarray,
    kept: np.ndarray,
    data: np.ndarray,
    lag_a: int,
    lag_b: int,
    rate_index: int,
    tree: bool,
    zeros: bool,
    decoding: bool,
    squash: np.ndarray,
    stretch: np.ndarray,
) -> int:
    """Code the matrix into `data`, or fill it from there; return the bytes used.

    tree: sizes as 7 bits, not one by one      zeros: whether zeros occur where something is kept
    """
    rows, columns = matrix.shape
    full = kept.size == 0
    wide, long = min(columns, 1 << 16), min(rows, 1 << 16)
    base = np.zeros(12, np.int64)
    total = 0
    for k, size in enumerate((243, 256, 256, 128, 432, wide, long, 8, 2048, 256, 1)):
        base[k] = total
        total += size
    signs = total
    total += 81 + 27 + 81 + 3 * wide + 1
    sizes = total
    total += 16 * 64
    trees = total
    total += 256 * 49
    chances, counts = np.full(total, 1 << 21, np.int32), np.zeros(total, np.int32)
    weights = np.zeros((SETS, INPUTS + 1), np.int32)
    for k in range(SETS):
        weights[k, :INPUTS] = SUM // STARTS[k // 16]
    where, st = np.zeros(INPUTS, np.int64), np.zeros(INPUTS, np.int64)
    model = (chances, counts, weights, st, squash, stretch)
    ac = np.zeros(4, np.uint64)
    ac[1] = TOP
    if decoding:
        for _ in range(4):
            place = np.int64(ac[3])
            byte = np.uint64(data[place]) if place < data.size else np.uint64(0)
            ac[2] = (ac[2] << np.uint64(8)) | byte
            ac[3] += np.uint64(1)
    limit, rate = 1023, 1 + 2 * rate_index
    period = lag_b if lag_b > 0 else max(lag_a, 1)
    column_count, column_seen = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    column_size = np.zeros(columns, np.int64)  # running mean of sizes, 8 bits after the point
    all_count = all_seen = 0
    for o in range(rows):
        row_count = row_seen = row_size = lately = 0
        for i in range(columns):
            if not full and kept[o, i] == 0:
                continue
            l1 = np.int64(matrix[o, i - 1]) if i > 0 else 0
            l2 = np.int64(matrix[o, i - 2]) if i > 1 else 0
            u1 = np.int64(matrix[o - 1, i]) if o > 0 else 0
            u2 = np.int64(matrix[o - 2, i]) if o > 1 else 0
            ul = np.int64(matrix[o - 1, i - 1]) if o > 0 and i > 0 else 0
            ur = np.int64(matrix[o - 1, i + 1]) if o > 0 and i + 1 < columns else 0
            p1 = np.int64(matrix[o, i - lag_a]) if 0 < lag_a <= i else 0
            p2 = np.int64(matrix[o, i - lag_a + 1]) if 1 < lag_a <= i + 1 else 0
            p3 = np.int64(matrix[o, i - lag_a - 1]) if 0 < lag_a < i else 0
            q1 = np.int64(matrix[o, i - lag_b]) if 0 < lag_b <= i else 0
            a1, b1, c1, d1 = abs(l1), abs(u1), abs(p1), abs(q1)
            around = 2 * (a1 + b1 + c1 + d1) + abs(l2) + abs(u2) + abs(ul) + abs(ur) + abs(p2) + abs(p3)
            near = min(logs(around), 7)
            value = np.int64(matrix[o, i])
            bit = 1
            if zeros:
                by_column = density(column_count[i], column_seen[i])
                by_row = density(row_count, row_seen)
                sides = column_count[i - 1] if i > 0 else column_count[i]
                sides += column_count[i + 1] if i + 1 < columns else column_count[i]
                sides += column_count[i - lag_a] if i >= lag_a else column_count[i]
                sides += column_count[i + lag_a] if i + lag_a < columns else column_count[i]
                spread = density(sides + 4 * column_count[i], 8 * column_seen[i])
                flags = (l1 != 0) + 2 * (u1 != 0) + 4 * (p1 != 0) + 8 * (q1 != 0)
                where[0] = (
                    base[0]
                    + (((min(a1, 2) * 3 + min(abs(l2), 2)) * 3 + min(b1, 2)) * 3 + min(c1, 2)) * 3
                    + min(d1, 2)
                )
                where[1] = (
                    base[1]
                    + flags * 16
                    + ((ul != 0) + 2 * (ur != 0) + 4 * (p2 != 0 or p3 != 0) + 8 * (u2 != 0))
                )
                where[2] = base[2] + by_column * 16 + by_row
                where[3] = base[3] + spread * 8 + (flags & 7)
                where[4] = (
                    base[4] + min(logs(column_size[i]), 15) * 27 + min(logs(row_size), 8) * 3 + min(a1, 2)
                )
                where[5] = base[5] + i % wide
                where[6] = base[6] + o % long
                where[7] = base[7] + near
                where[8] = base[8] + (i % period) * 8 + (flags & 1) + 2 * ((flags >> 2) & 3)
                mean = ((2 * all_count + 1) << 16) // (2 * all_seen + 2)
                by_own = ((row_count << 16) + 40 * mean) // (row_seen + 40)
                by_other = ((column_count[i] << 16) + 30 * mean) // (column_seen[i] + 30)
                expected = min(by_own * by_other // mean, 65535)
                where[9] = base[9] + fine(expected) * 4 + (flags & 1) + 2 * ((flags >> 2) & 1)
                where[10] = base[10]
                bit = code_bit(
                    1 if value != 0 else 0,
                    where,
                    11,
                    near,
                    64 + fine(expected) // 4,
                    model,
                    ac,
                    data,
                    limit,
                    rate,
                    decoding,
                )
            row_seen += 1
            all_seen += 1
            all_count += bit
            lately += (4096 * bit - lately) >> 4
            column_seen[i] += 1
            size = 0
            if bit:
                row_count += 1
                column_count[i] += 1
                sl, su, sp, sq = sign(l1), sign(u1), sign(p1), sign(q1)
                where[0] = signs + ((sl * 3 + su) * 3 + sp) * 3 + sq
                where[1] = signs + 81 + (sp * 3 + sign(l2)) * 3 + sq
                where[2] = signs + 108 + ((su * 3 + sign(u2)) * 3 + sign(ul)) * 3 + sign(ur)
                where[3] = signs + 189 + 3 * (i % wide) + su
                where[4] = signs + 189 + 3 * wide
                negative = code_bit(
                    1 if value < 0 else 0,
                    where,
                    5,
                    48 + (sp != 1),
                    80 + su,
                    model,
                    ac,
                    data,
                    limit,
                    rate,
                    decoding,
                )
                size = abs(value)
                heavy, light = min(logs(column_size[i]), 15), min(logs(row_size), 15)
                if tree:
                    node = 1
                    for k in range(7):
                        at = trees + (128 * negative + node) * 49
                        where[0] = (
                            at
                            + 1
                            + (c1 > 0) * (1 + min(c1 >> 2, 3) + 4 * ((p1 < 0) == (negative > 0)))
                            + 0 * a1
                        )
                        where[1] = at + 17 + heavy
                        where[2] = at + 33 + light
                        where[3] = at
                        b = code_bit(
                            ((size - 1) >> (6 - k)) & 1,
                            where,
                            4,
                            16 + k,
                            96 + heavy,
                            model,
                            ac,
                            data,
                            limit,
                            rate,
                            decoding,
                        )
                        node = 2 * node + b
                    size = (node & 127) + 1
                else:
                    step = more = 1
                    while more and step < 128:
                        k = min(step - 1, 15)
                        at = sizes + k * 64
                        where[0] = at + min(a1, 3) * 4 + min(b1, 3)
                        where[1] = at + 16 + heavy
                        where[2] = at + 32 + light
                        where[3] = at + 48 + near
                        where[4] = at + 56 + min(c1, 3)
                        where[5] = at + 60
                        more = code_bit(
                            1 if size > step else 0,
                            where,
                            6,
                            32 + k,
                            112 + heavy,
                            model,
                            ac,
                            data,
                            limit,
                            rate,
                            decoding,
                        )
                        step += more
                    size = step
                value = -size if negative else size
            elif decoding:
                value = 0
            if decoding:
                matrix[o, i] = np.int8(value)
            column_size[i] += (size * 256 - column_size[i]) // min(column_seen[i], 16)
            row_size += (size * 256 - row_size) // min(row_seen, 16)
    if not decoding:
        # As few bytes as name a place between low and high, whatever zeros follow.
        for shift in (24, 16, 8, 0):
            place = np.int64(ac[3])
            top = ((ac[0] >> np.uint64(shift)) + np.uint64(1)) << np.uint64(shift)
            last = top <= ac[1]
            if place < data.size:
                data[place] = np.uint8(((top if last else ac[0]) >> np.uint64(shift)) & np.uint64(0xFF))
            ac[3] += np.uint64(1)
            if last:
                break
    return np.int64(ac[3])
