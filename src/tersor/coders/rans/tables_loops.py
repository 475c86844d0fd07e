"""Tables loops: frequencies from depths, and the decoder's slots, compiled: they dominate short streams."""

from __future__ import annotations

import numpy as np
from numba import types

from tersor.coders.loops import I64, I64_2, INT, U8
from tersor.compiled import compiled


@compiled(types.int64[:, ::1](I64_2, INT, INT, INT), brief=True)
def apportion(depths: np.ndarray, octaves: int, detail: int, bits: int) -> np.ndarray:
    """Depths [T, K] to frequencies [T, K]: 1 for each symbol, the rest of 2^bits by weight."""
    rows, size = depths.shape
    found = np.empty((rows, size), np.int64)
    part = (1 << detail) - 1
    free = (1 << bits) - size
    for row in range(rows):
        total = 0
        for j in range(size):
            level = (octaves << detail) - depths[row, j]
            total += ((1 << detail) + (level & part)) << (level >> detail)
            found[row, j] = total
        edge = 0
        for j in range(size):
            last, edge = edge, free * found[row, j] // total
            found[row, j] = 1 + edge - last
    return found


@compiled(types.uint64[::1](U8, I64, INT), brief=True)
def slots_of(symbols: np.ndarray, frequencies: np.ndarray, bits: int) -> np.ndarray:
    """For each of 2^bits slots: symbol | frequency << 8 | index among the symbol's slots << 32."""
    slots = np.empty(1 << bits, np.uint64)
    at = 0
    for j in range(symbols.size):
        named = np.uint64(symbols[j]) | np.uint64(frequencies[j]) << np.uint64(8)
        for place in range(frequencies[j]):
            slots[at] = named | np.uint64(place) << np.uint64(32)
            at += 1
    return slots


@compiled(types.uint32[::1](U8, I64, INT), brief=True)
def narrow_slots_of(symbols: np.ndarray, frequencies: np.ndarray, bits: int) -> np.ndarray:
    """The same in 32 bits: symbol | frequency << 8 | index << 20. Empty if a frequency is 2^12 or more."""
    slots = np.empty(1 << bits, np.uint32)
    at = 0
    for j in range(symbols.size):
        frequency = frequencies[j]
        if frequency >= 1 << 12:
            return slots[:0]
        named = np.uint32(symbols[j]) | np.uint32(frequency) << np.uint32(8)
        for place in range(frequency):
            slots[at + place] = named | np.uint32(place) << np.uint32(20)
        at += frequency
    return slots
