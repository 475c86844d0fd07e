"""Huffman loops: lengths of codes, write codes, decode several symbols with one lookup, compiled."""
# ruff: noqa: PLR0917  compiled functions take no keywords

from __future__ import annotations

import numpy as np
from numba import types

from tersor.coders.loops import (
    BYTE,
    I64,
    INT,
    N0,
    N1,
    N8,
    N15,
    N16,
    N32,
    N49,
    N64,
    ONE_SYMBOL,
    U8,
    U8_OUT,
    U16,
    U16_OUT,
    U32,
    U32_OUT,
    U64,
    U64_OUT,
)
from tersor.compiled import compiled


@compiled(types.int64[::1](I64, I64), brief=True)
def tree_depths(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Depths [K] of a tree that merges the two rarest trees until one is left, leaves first on a tie.

    `order` sorts counts [K]. Merged trees come in the order of their counts, so no heap is needed.
    """
    size = counts.size
    weight = np.empty(2 * size - 1, np.int64)  # leaves in their order, then merged trees
    parent = np.zeros(2 * size - 1, np.int64)
    for place in range(size):
        weight[place] = counts[order[place]]
    leaf, tree = 0, size
    for node in range(size, 2 * size - 1):
        weight[node] = 0
        for _ in range(2):
            if leaf < size and (tree >= node or weight[leaf] <= weight[tree]):
                rarest = leaf
                leaf += 1
            else:
                rarest = tree
                tree += 1
            parent[rarest] = node
            weight[node] += weight[rarest]
    for node in range(2 * size - 3, -1, -1):
        parent[node] = 1 + (parent[parent[node]] if parent[node] < 2 * size - 2 else 0)
    depths = np.empty(size, np.int64)
    for place in range(size):
        depths[order[place]] = parent[place]
    return depths


@compiled(INT(U8, U32, U8, INT, INT, U32_OUT))
def huffman_encode(
    symbols: np.ndarray, codes: np.ndarray, lengths: np.ndarray, head: int, have: int, words: np.ndarray
) -> np.int64:
    """Append codes to the `have` < 32 bits of `head`, as words of 32 bits. Returns the total number of bits.

    Bits beyond the end of `words` are counted but not written.
    """
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
    """Fill `out` from bit `start` on. Returns the first unused bit, beyond the end if there are too few
    words.

    For each short pattern, `strings` holds up to 8 symbols, and `steps` holds their number << 8 | their bits,
    or 0 if the first code is longer than the pattern. `owners` [2^15]: the first symbol of each 15 bits.
    """
    count, length = np.uint64(out.size), np.uint64(words.size)
    drop = N64  # the shift that leaves the bits of a pattern
    patterns = np.uint64(steps.size)
    while patterns > N1:
        patterns >>= N1
        drop -= N1
    skip = np.uint64(start)
    at = skip >> np.uint64(5)
    buffer = filled = N0  # the next bits are the highest bits of the buffer
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
        for _ in range(2):  # 32 bits hold at least two codes
            pattern = buffer >> drop
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
def huffman_lookup(
    owners: np.ndarray, lengths: np.ndarray, width: int, strings: np.ndarray, steps: np.ndarray
) -> None:
    """Fill `strings` and `steps` [2^width] for huffman_decode with the whole codes of each pattern."""
    wide, most = np.uint64(width), np.uint64(strings.size - 1)
    for pattern in range(np.uint64(strings.size)):
        used = number = string = N0
        while number < N8:
            symbol = owners[((pattern << used) & most) << (N15 - wide)]
            length = np.uint64(lengths[symbol])
            if used + length > wide:  # the remaining bits are only part of a code
                break
            string |= np.uint64(symbol) << (N8 * number)
            used += length
            number += N1
        strings[pattern] = string
        steps[pattern] = number << N8 | used
