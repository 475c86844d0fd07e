"""Planes loops: split floats into byte planes, count symbols, and join planes, compiled."""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import types

from tersor.coders.loops import INT, U8, U16, U16_OUT, U32, U32_OUT, U64
from tersor.compiled import compiled


@compiled([types.uint8[::1](words, INT) for words in (U16, U32, U64)])
def take(words: np.ndarray, k: int) -> np.ndarray:
    """Byte k of every word rotated left by one bit."""
    kind = words.dtype.type
    out = np.empty(words.size, np.uint8)
    if k:
        right = kind(8 * k - 1)
        for i in range(words.size):
            out[i] = np.uint8(words[i] >> right & kind(255))
    else:
        left, right = kind(1), kind(8 * words.itemsize - 1)
        for i in range(words.size):
            out[i] = np.uint8((words[i] << left | words[i] >> right) & kind(255))
    return out


@compiled(types.void(U8, INT, types.int32[:, ::1]))
def count_units(symbols: np.ndarray, unit: int, counts: np.ndarray) -> None:
    """Add a histogram of each block of `unit` symbols to counts [U, 256]. The last block may be short."""
    # Two alternating tables: incrementing the same counter twice in a row would stall.
    even = np.zeros(256, np.int32)
    odd = np.zeros(256, np.int32)
    for row in range(counts.shape[0]):
        even[:] = 0
        odd[:] = 0
        begin, end = row * unit, min((row + 1) * unit, symbols.size)
        for i in range(begin, end - 1, 2):
            even[symbols[i]] += 1
            odd[symbols[i + 1]] += 1
        if (end - begin) & 1:
            even[symbols[end - 1]] += 1
        for symbol in range(256):  # a slice would compile the text of numpy's errors: 3 seconds
            counts[row, symbol] += even[symbol] + odd[symbol]


@compiled(types.void(U8, U8, U16_OUT), brief=True)
def join16(low: np.ndarray, high: np.ndarray, words: np.ndarray) -> None:
    for i in range(words.size):
        turned = np.uint16(low[i]) | np.uint16(high[i]) << np.uint16(8)
        words[i] = np.uint16((turned >> np.uint16(1) | turned << np.uint16(15)) & np.uint16(0xFFFF))


@compiled(types.void(U8, U8, U8, U8, U32_OUT), brief=True)
def join32(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, words: np.ndarray) -> None:
    for i in range(words.size):
        turned = np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8) | np.uint32(c[i]) << np.uint32(16)
        turned |= np.uint32(d[i]) << np.uint32(24)
        words[i] = np.uint32((turned >> np.uint32(1) | turned << np.uint32(31)) & np.uint32(0xFFFFFFFF))
