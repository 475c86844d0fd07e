"""Bit strings loops: read, write and measure many variable-length numbers, compiled."""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import njit, types

from tersor.coders.loops import I64, I64_2, INT, U8
from tersor.compiled import compiled


@compiled(INT(U8, INT, INT, INT, INT, INT, types.int64[::1]), brief=True)
def read_numbers(
    data: np.ndarray, at: int, golomb: int, order: int, most_ones: int, most_zeros: int, out: np.ndarray
) -> np.int64:
    """Fill `out` with numbers from bit `at` on: exp-Golomb codes if `golomb` is 1, else Rice codes.

    Returns the index of the first unused bit, or -1 if the bits are no such codes.
    """
    end = 8 * data.size
    for n in range(out.size):
        run, most = 0, most_zeros if golomb else most_ones
        while True:  # count the zeros before a one (exp-Golomb), or the ones before a zero (Rice)
            if at >= end or run > most:
                return np.int64(-1)
            bit = (data[at >> 3] >> (7 - (at & 7))) & 1
            at += 1
            if bit == golomb:
                break
            run += 1
        width = order + run if golomb else order
        if run > most or at + width > end:
            return np.int64(-1)
        low = 0
        for _ in range(width):
            low = low << 1 | (data[at >> 3] >> (7 - (at & 7))) & 1
            at += 1
        out[n] = (((1 << run) - 1) << order) + low if golomb else (run << order) + low
    return np.int64(at)


@njit
def digits_of(number):  # type: ignore[no-untyped-def]
    """The number of binary digits."""
    found = 0
    while number:
        number >>= 1
        found += 1
    return found


@compiled(types.void(I64_2, INT, INT, types.int64[:, :, :, ::1]))
def list_bits(rows: np.ndarray, most_ones: int, too_long: int, found: np.ndarray) -> None:
    """Fill found [T, 2, 2, O]: bits of each list of T, as values or steps, in Rice or exp-Golomb codes of
    order 0 .. O - 1. `too_long`: those of a Rice code with more ones than `most_ones`."""
    orders = found.shape[3]
    for row in range(rows.shape[0]):
        for choice in range(4 * orders):  # a slice would compile the text of numpy's errors: 3 seconds
            found[row, choice // orders >> 1, choice // orders & 1, choice % orders] = 0
        for j in range(rows.shape[1]):
            value = rows[row, j]
            step = value - rows[row, j - 1] if j else value
            if j:
                step = 2 * step if step >= 0 else -2 * step - 1
            for kind in range(2):
                number = step if kind else value
                for order in range(orders):
                    high = number >> order
                    found[row, kind, 0, order] += high + 1 + order if high <= most_ones else too_long
                    found[row, kind, 1, order] += 2 * digits_of(high + 1) - 1 + order
        for kind in range(2):
            for order in range(orders):
                found[row, kind, 0, order] = min(found[row, kind, 0, order], too_long)


@compiled(INT(I64, INT, INT, types.uint8[::1]), brief=True)
def write_numbers(numbers: np.ndarray, golomb: int, order: int, out: np.ndarray) -> np.int64:
    """Set the bits of numbers in `out`, which is zero: exp-Golomb codes if `golomb` is 1, else Rice codes.

    Returns the number of bits, also of those beyond the end of `out`, which are not set.
    """
    at = 0
    for number in numbers:
        high = number >> order
        if golomb:
            width = digits_of(high + 1)
            at += width - 1
            high += 1
        else:
            width = high + 1
        for k in range(width - 1, -1, -1):
            if golomb:
                bit = (high >> k) & 1
            else:
                bit = 1 if k else 0
            if bit and at >> 3 < out.size:
                out[at >> 3] |= np.uint8(128 >> (at & 7))
            at += 1
        for k in range(order - 1, -1, -1):
            if (number >> k) & 1 and at >> 3 < out.size:
                out[at >> 3] |= np.uint8(128 >> (at & 7))
            at += 1
    return np.int64(at)
