"""Loops: the inner loops of the static coders, compiled. Only files named loops import numba.

Each has one signature, compiled once and kept on disk. All numbers are unsigned and of 64 bits, because numba
makes a float of signed with unsigned. A decoder returns how far it came, and never indexes beyond its arrays.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import types

U8 = types.Array(types.uint8, 1, "C", readonly=True)
U16 = types.Array(types.uint16, 1, "C", readonly=True, aligned=False)  # from anywhere in a stream
U32 = types.Array(types.uint32, 1, "C", readonly=True)
U64 = types.Array(types.uint64, 1, "C", readonly=True)
U8_OUT, U16_OUT, U32_OUT, U64_OUT = types.uint8[::1], types.uint16[::1], types.uint32[::1], types.uint64[::1]
I64 = types.Array(types.int64, 1, "C", readonly=True)
I64_2 = types.Array(types.int64, 2, "C", readonly=True)
INT = types.int64

N0, N1, N8, N16, N32, N49, N64 = (np.uint64(n) for n in (0, 1, 8, 16, 32, 49, 64))
N15 = np.uint64(15)
BYTE, WORD, THREE_BYTES = np.uint64(0xFF), np.uint64(0xFFFF), np.uint64(0xFFFFFF)
LOW, ONE_SYMBOL = np.uint64(1 << 16), np.uint64(1 << 8)
