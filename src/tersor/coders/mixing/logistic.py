"""Curves: from log odds to chances and back, and how fast both learn, as tables of whole numbers.

squash(x) = 1 / (1 + e^-x)      stretch(p) = ln(p / (1 - p)), its inverse
By big integers, since no two libraries need agree on the last bit of exp. Tables save the divisions, too.
"""

from __future__ import annotations

import functools

import numpy as np

STRETCH_MAX = 12 * 256 - 1  # log odds have 8 bits after the point
E_256 = 1157433911791679357  # e^(1 / 256) * 2^60, rounded down
LIMIT = 1023  # bits that a chance remembers
COUNTED = 2047  # bits after which weights learn no slower
RUSH = 512  # how much faster they learn at first


@functools.cache
def logistic_tables() -> tuple[np.ndarray, np.ndarray]:
    """(squash, stretch): log odds -3071 .. 3071 in 1/256 to chances of 2^16, and chances of 2^12 back."""
    power, low = 1 << 60, []  # chances of -0, -1, -2, ...
    for _ in range(STRETCH_MAX + 1):
        low.append((1 << 76) // ((1 << 60) + power))
        power = power * E_256 >> 60
    both = [*reversed(low[1:]), *((1 << 16) - chance for chance in low)]
    chances = np.clip(np.array(both, dtype=np.int64), 1, (1 << 16) - 1)
    middle = np.arange(1 << 12) * 16 + 8
    stretch = np.searchsorted(chances, middle) - STRETCH_MAX
    return chances.astype(np.int32), np.clip(stretch, -STRETCH_MAX, STRETCH_MAX).astype(np.int32)


@functools.cache
def adaptation_rates(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """(shares, paces) after n bits: what a chance takes of its error, in 2^16; how fast weights learn."""
    shares = (1 << 17) // (2 * np.arange(LIMIT + 1) + 3)
    pace = 3 + 3 * rate
    paces = pace + RUSH * pace // (16 + np.arange(COUNTED + 1))
    return shares.astype(np.int64), paces.astype(np.int64)
