"""Planes loops: splitting and joining floats, compiled."""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import types

from tersor.coders.loops import INT, U8, U16, U32, compiled


@compiled(types.UniTuple(types.uint8[::1], 2)(U16))
def split16(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.empty(words.size, np.uint8), np.empty(words.size, np.uint8)
    for i in range(words.size):
        word = words[i]
        low[i] = np.uint8((word << 1 | word >> 15) & 255)
        high[i] = np.uint8((word >> 7) & 255)
    return low, high


@compiled(types.UniTuple(types.uint8[::1], 4)(U32))
def split32(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    a, b = np.empty(words.size, np.uint8), np.empty(words.size, np.uint8)
    c, d = np.empty(words.size, np.uint8), np.empty(words.size, np.uint8)
    for i in range(words.size):
        word = words[i]
        a[i] = np.uint8((word << 1 | word >> 31) & 255)
        b[i] = np.uint8((word >> 7) & 255)
        c[i] = np.uint8((word >> 15) & 255)
        d[i] = np.uint8((word >> 23) & 255)
    return a, b, c, d


@compiled(types.uint16[::1](U8, U8))
def join16(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    words = np.empty(low.size, np.uint16)
    for i in range(low.size):
        turned = np.uint16(low[i]) | np.uint16(high[i]) << np.uint16(8)
        words[i] = np.uint16((turned >> np.uint16(1) | turned << np.uint16(15)) & np.uint16(0xFFFF))
    return words


@compiled(types.uint32[::1](U8, U8, U8, U8))
def join32(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    words = np.empty(a.size, np.uint32)
    for i in range(a.size):
        turned = np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8) | np.uint32(c[i]) << np.uint32(16)
        turned |= np.uint32(d[i]) << np.uint32(24)
        words[i] = np.uint32((turned >> np.uint32(1) | turned << np.uint32(31)) & np.uint32(0xFFFFFFFF))
    return words


@compiled(types.void(types.uint8[::1], U8, INT, INT))
def put(out: np.ndarray, plane: np.ndarray, itemsize: int, k: int) -> None:
    """Byte k of every element."""
    for i in range(plane.size):
        out[i * itemsize + k] = plane[i]


@compiled(types.void(types.uint16[::1]))
def turn_back16(words: np.ndarray) -> None:
    for i in range(words.size):
        words[i] = words[i] >> np.uint16(1) | (words[i] & np.uint16(1)) << np.uint16(15)


@compiled(types.void(types.uint32[::1]))
def turn_back32(words: np.ndarray) -> None:
    for i in range(words.size):
        words[i] = words[i] >> np.uint32(1) | (words[i] & np.uint32(1)) << np.uint32(31)
