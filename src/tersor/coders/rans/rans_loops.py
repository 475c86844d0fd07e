"""rANS loops: encode and decode one state after the other, compiled."""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import njit

from tersor.coders.loops import (
    BYTE,
    INT,
    LOW,
    N0,
    N1,
    N8,
    N16,
    N32,
    THREE_BYTES,
    U8,
    U8_OUT,
    U16,
    U16_OUT,
    U32,
    U64,
    U64_OUT,
    WORD,
)
from tersor.compiled import compiled


@compiled(INT(U8, U32, U32, INT, U64_OUT, U16_OUT))
def rans_encode(
    symbols: np.ndarray,
    frequencies: np.ndarray,
    starts: np.ndarray,
    bits: int,
    states: np.ndarray,
    words: np.ndarray,
) -> np.int64:
    """Fill `words` from its end, last symbol first. Returns the index of the first word. `states` [lanes]."""
    shift = np.uint64(bits)
    room = np.uint64(32 - bits)
    lanes = np.uint64(states.size)
    at = np.uint64(words.size)
    i = np.uint64(symbols.size)
    while i > N0:
        i -= N1
        lane = i & (lanes - N1)
        symbol = symbols[i]
        frequency = np.uint64(frequencies[symbol])
        x = states[lane]
        if x >= frequency << room:
            at -= N1
            words[at] = x & WORD
            x >>= N16
        quotient = x // frequency
        states[lane] = (quotient << shift) + (x - quotient * frequency) + np.uint64(starts[symbol])
    return np.int64(at)


@njit(forceinline=True)
def decode_symbol(x, slots, mask, shift):  # type: ignore[no-untyped-def]
    """Decode one symbol from state x: (symbol, new state before a word is read)."""
    slot = slots[x & mask]
    return np.uint8(slot & BYTE), ((slot >> N8) & THREE_BYTES) * (x >> shift) + (slot >> N32)


@compiled(INT(U16, U64_OUT, U64, INT, U8_OUT))
def rans_decode(
    words: np.ndarray, states: np.ndarray, slots: np.ndarray, bits: int, out: np.ndarray
) -> np.int64:
    """Fill `out`. Returns the number of words read. `slots` [2^bits] as in tables_loops.slots_of."""
    shift = np.uint64(bits)
    mask = (N1 << shift) - N1
    lanes = np.uint64(states.size)
    count, length = np.uint64(out.size), np.uint64(words.size)
    i = at = N0
    # Whole rounds first: a round reads at most one word a lane, so one bounds check is enough for all lanes.
    # Whether to read is decided without a branch: it is nearly random, and a misprediction costs 15 cycles.
    while i + lanes <= count and at + lanes <= length:
        for turn in range(lanes):
            out[i + turn], x = decode_symbol(states[turn], slots, mask, shift)
            word = np.uint64(words[at])
            needy = x < LOW
            states[turn] = (x << N16) | word if needy else x
            at += np.uint64(needy)
        i += lanes
    while i < count:
        lane = i & (lanes - N1)
        out[i], x = decode_symbol(states[lane], slots, mask, shift)
        if x < LOW and at < length:
            x = (x << N16) | np.uint64(words[at])
            at += N1
        states[lane] = x
        i += N1
    return np.int64(at)
