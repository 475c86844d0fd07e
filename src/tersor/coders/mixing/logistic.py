"""Logistic: integer tables of the logistic function, of its inverse, and of the learning rates.

squash(x) = 1 / (1 + e^-x)      stretch(p) = ln(p / (1 - p)), its inverse

Computed with big integers, because libraries differ in the last bit of exp. The tables also save divisions.
"""

from __future__ import annotations

import functools

import numpy as np

STRETCH_MAX = 12 * 256 - 1  # log odds have 8 fractional bits
E_256 = 1157433911791679357  # e^(1 / 256) * 2^60, rounded down
LIMIT = 1023  # largest count of a context; a larger one would adapt more slowly
COUNTED = 2047  # largest count of a weight set
RUSH = 512  # numerator of the extra learning rate at small counts


@functools.cache
def logistic_tables() -> tuple[np.ndarray, np.ndarray]:
    """(squash, stretch): log odds -3071 .. 3071 in 1/256 -> P * 2^16, and P * 2^12 -> log odds in 1/256."""
    power, low = 1 << 60, []  # low[x] = squash(-x)
    for _ in range(STRETCH_MAX + 1):
        low.append((1 << 76) // ((1 << 60) + power))
        power = power * E_256 >> 60
    both = [*reversed(low[1:]), *((1 << 16) - p for p in low)]
    probabilities = np.clip(np.array(both, dtype=np.int64), 1, (1 << 16) - 1)
    middle = np.arange(1 << 12) * 16 + 8
    stretch = np.searchsorted(probabilities, middle) - STRETCH_MAX
    return probabilities.astype(np.int32), np.clip(stretch, -STRETCH_MAX, STRETCH_MAX).astype(np.int32)


@functools.cache
def adaptation_rates(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates after n bits: (of probabilities, in 2^-16 of the error [1024]; of weights [2048])."""
    context_rates = (1 << 17) // (2 * np.arange(LIMIT + 1) + 3)
    base = 3 + 3 * rate
    weight_rates = base + RUSH * base // (16 + np.arange(COUNTED + 1))
    return context_rates.astype(np.int64), weight_rates.astype(np.int64)
