"""Bit strings loops: read many variable-length numbers, compiled."""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import types

from tersor.coders.loops import INT, U8
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
