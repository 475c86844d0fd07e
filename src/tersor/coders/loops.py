"""Loops: the inner loops of the static coders, compiled. Only files named loops import numba.

Each has one signature, compiled once and kept on disk. All numbers are unsigned and of 64 bits, because numba
makes a float of signed with unsigned. A decoder returns how far it came, and never indexes beyond its arrays.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

U8 = types.Array(types.uint8, 1, "C", readonly=True)
U16 = types.Array(types.uint16, 1, "C", readonly=True, aligned=False)  # from anywhere in a stream
U32 = types.Array(types.uint32, 1, "C", readonly=True)
U64 = types.Array(types.uint64, 1, "C", readonly=True)
U8_OUT, U16_OUT, U32_OUT, U64_OUT = types.uint8[::1], types.uint16[::1], types.uint32[::1], types.uint64[::1]
INT = types.int64

N0, N1, N8, N16, N32, N49, N64 = (np.uint64(n) for n in (0, 1, 8, 16, 32, 49, 64))
N15 = np.uint64(15)
BYTE, WORD, THREE_BYTES = np.uint64(0xFF), np.uint64(0xFFFF), np.uint64(0xFFFFFF)
LOW, ONE_SYMBOL = np.uint64(1 << 16), np.uint64(1 << 8)


def compiled(signature: Any, *, brief: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """`brief`: it keeps the interpreter's lock, for to have it back from another thread may take longer."""

    def wrap(loop: Callable[..., Any]) -> Any:
        try:
            return njit(signature, cache=True, nogil=not brief)(loop)
        except RuntimeError:  # no folder to keep compiled code in: compile for this process alone
            return njit(signature, nogil=not brief)(loop)

    return wrap


@compiled(INT(U8, U32, U32, INT, U64_OUT, U16_OUT))
def rans_encode(
    symbols: np.ndarray,
    frequencies: np.ndarray,
    starts: np.ndarray,
    bits: int,
    states: np.ndarray,
    words: np.ndarray,
) -> np.int64:
    """Fill `words` from its end, last symbol first; return the place of the first word. `states` [lanes]."""
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


@njit(inline="always")
def taken(x, slots, mask, shift):  # type: ignore[no-untyped-def]
    """(symbol, state before any word is read) after one symbol of state x."""
    slot = slots[x & mask]
    return np.uint8(slot & BYTE), ((slot >> N8) & THREE_BYTES) * (x >> shift) + (slot >> N32)


@compiled(INT(U16, U64_OUT, U64, INT, U8_OUT))
def rans_decode(
    words: np.ndarray, states: np.ndarray, slots: np.ndarray, bits: int, out: np.ndarray
) -> np.int64:
    """Fill `out`; return the number of words read. `slots` [2^bits] as in tables_loops.slots_of."""
    shift = np.uint64(bits)
    mask = (N1 << shift) - N1
    lanes = np.uint64(states.size)
    count, length = np.uint64(out.size), np.uint64(words.size)
    i = at = N0
    # Whole rounds first: a round reads at most one word a lane, so one look at the end serves all lanes, and
    # the choice whether to read needs no jump (it is as good as random: a wrong guess costs 15 cycles).
    while i + lanes <= count and at + lanes <= length:
        for turn in range(lanes):
            out[i + turn], x = taken(states[turn], slots, mask, shift)
            word = np.uint64(words[at])
            needy = x < LOW
            states[turn] = (x << N16) | word if needy else x
            at += np.uint64(needy)
        i += lanes
    while i < count:
        lane = i & (lanes - N1)
        out[i], x = taken(states[lane], slots, mask, shift)
        if x < LOW and at < length:
            x = (x << N16) | np.uint64(words[at])
            at += N1
        states[lane] = x
        i += N1
    return np.int64(at)


@compiled(INT(U8, U32, U8, INT, INT, U32_OUT))
def huffman_encode(
    symbols: np.ndarray, codes: np.ndarray, lengths: np.ndarray, head: int, have: int, words: np.ndarray
) -> np.int64:
    """Append codes to the `have` < 32 bits of `head`, 32 bits a word; return the number of bits in all, of
    which those beyond the words are not written."""
    buffer, filled = np.uint64(head), np.uint64(have)
    at, room = N0, np.uint64(words.size)
    for i in range(np.uint64(symbols.size)):
        symbol = symbols[i]
        length = np.uint64(lengths[symbol])
        buffer = buffer << length | np.uint64(codes[symbol])
        filled += length
        if filled >= N32:
            filled -= N32
            if at < room:
                words[at] = buffer >> filled
            at += N1
    if filled > N0 and at < room:
        words[at] = buffer << (N32 - filled)
    return np.int64(at * N32 + filled)


@compiled(INT(U32, INT, U64, U16, U8, U8, U8_OUT))
def huffman_decode(
    words: np.ndarray,
    start: int,
    strings: np.ndarray,
    steps: np.ndarray,
    owners: np.ndarray,
    lengths: np.ndarray,
    out: np.ndarray,
) -> np.int64:
    """Fill `out` from bit `start` on; return the first bit not used, beyond the end if the words are too few.

    For each short pattern, `strings` holds up to 8 symbols and `steps` their number << 8 | their bits, or 0
    where the first code is longer than the pattern. `owners` [2^15] names the first symbol of each 15 bits.
    """
    count, length = np.uint64(out.size), np.uint64(words.size)
    look = N64
    patterns = np.uint64(steps.size)
    while patterns > N1:
        patterns >>= N1
        look -= N1
    skip = np.uint64(start)
    at = skip >> np.uint64(5)
    buffer = filled = N0  # the next bits stand highest in the buffer
    if at < length:
        filled = N32 - (skip & np.uint64(31))
        buffer = np.uint64(words[at]) << (N64 - filled)
        at += N1
    i = N0
    while i + N16 <= count and at < length:
        if filled < N32:
            buffer |= np.uint64(words[at]) << (N32 - filled)
            filled += N32
            at += N1
        for _ in range(2):  # 32 bits hold two codes at least
            pattern = buffer >> look
            string, step = strings[pattern], np.uint64(steps[pattern])
            if step == N0:
                symbol = owners[buffer >> N49]
                string, step = np.uint64(symbol), ONE_SYMBOL | np.uint64(lengths[symbol])
            for k in range(N8):
                out[i + k] = string >> (N8 * k)
            used = step & BYTE
            buffer <<= used
            filled -= used
            i += step >> N8
    while i < count:
        if filled < N32 and at < length:
            buffer |= np.uint64(words[at]) << (N32 - filled)
            filled += N32
            at += N1
        symbol = owners[buffer >> N49]
        used = np.uint64(lengths[symbol])
        if used > filled:
            return np.int64(length * N32 + N1)
        out[i] = symbol
        buffer <<= used
        filled -= used
        i += N1
    return np.int64(at * N32 - filled)


@compiled(types.void(U8, U8, INT, U64_OUT, U16_OUT))
def huffman_looks(
    owners: np.ndarray, lengths: np.ndarray, width: int, strings: np.ndarray, steps: np.ndarray
) -> None:
    """Fill `strings` and `steps` [2^width] of huffman_decode: of each pattern its whole codes."""
    wide, most = np.uint64(width), np.uint64(strings.size - 1)
    for pattern in range(np.uint64(strings.size)):
        used = number = string = N0
        while number < N8:
            symbol = owners[((pattern << used) & most) << (N15 - wide)]
            length = np.uint64(lengths[symbol])
            if used + length > wide:  # the rest tells only part of a code
                break
            string |= np.uint64(symbol) << (N8 * number)
            used += length
            number += N1
        strings[pattern] = string
        steps[pattern] = number << N8 | used
