"""Mixing, the bits: an arithmetic coder, and the chance of each bit mixed from contexts. Integers only.

chance of a 1 = squash(sum of weight * stretch(chance of each context))       two sets of weights, the mean
A context is a place in two arrays: the chance of a one (22 bits) and how often it was seen. One function
codes and decodes, so that both learn the same. docs/streams.md section 11.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, operator, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from tersor.coders.mixing.logistic import COUNTED, LIMIT, STRETCH_MAX

INPUTS = 10  # contexts of a bit, at most
TRUST = 2  # bits that a chance taken from the parent is worth
EVEN = 1 << 21  # a chance of one half
AHEAD = 4  # bytes that a decoder looks ahead
TOP = np.uint64(0xFFFFFFFF)


@njit
def code_bit(bit, where, n, first, second, coder):
    """Code or decode one bit with the contexts where[:n], the most general of them last; return it.

    The chance is the mean of two mixes, by the weights of the sets `first` and `second`.
    """
    chances, counts, weights, inputs, squash, stretch, shares, paces, ends, data, decoding = coder
    parent = where[n - 1]
    dot1 = dot2 = np.int64(0)
    for k in range(n):
        place = where[k]
        if counts[place] == 0 and place != parent:  # nothing is known here but what is known in general
            chances[place] = chances[parent]
            counts[place] = TRUST
        inputs[k] = stretch[chances[place] >> 10]
        dot1 += weights[first, k] * inputs[k]
        dot2 += weights[second, k] * inputs[k]
    chance = np.int64(squash[min(max((dot1 + dot2) >> 17, -STRETCH_MAX), STRETCH_MAX) + STRETCH_MAX])
    bit = code_chance(bit, chance, ends, data, decoding)
    for chosen, dot in ((first, dot1), (second, dot2)):
        mixed = np.int64(squash[min(max(dot >> 16, -STRETCH_MAX), STRETCH_MAX) + STRETCH_MAX])
        seen = weights[chosen, INPUTS]
        error = ((bit << 16) - mixed) * paces[seen]
        weights[chosen, INPUTS] = min(seen + 1, COUNTED)
        for k in range(n):
            weights[chosen, k] += (inputs[k] * error + (1 << 19)) >> 20
    target = np.int64(2 * EVEN - 1) if bit else np.int64(0)
    for k in range(n):
        place = where[k]
        count = counts[place]
        chances[place] += np.int32(((target - np.int64(chances[place])) * shares[count]) >> 16)
        counts[place] = min(count + 1, LIMIT)
    return bit


@njit(forceinline=True)
def code_chance(bit, chance, ends, data, decoding):
    """A step of the arithmetic coder. chance: of a one, in 2^16    ends: low, high, code, place in `data`"""
    low, high = ends[0], ends[1]
    middle = low + (((high - low) * np.uint64(chance)) >> np.uint64(16))
    if decoding:
        bit = 1 if ends[2] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + np.uint64(1)
    while ((low ^ high) & np.uint64(0xFF000000)) == 0:
        place = np.int64(ends[3])
        if decoding:
            byte = np.uint64(data[place]) if place < data.size else np.uint64(0)
            ends[2] = ((ends[2] << np.uint64(8)) & TOP) | byte
        elif place < data.size:
            data[place] = np.uint8(high >> np.uint64(24))
        ends[3] += np.uint64(1)
        low = (low << np.uint64(8)) & TOP
        high = ((high << np.uint64(8)) & TOP) | np.uint64(0xFF)
    ends[0], ends[1] = low, high
    return bit


@njit
def open_coder(ends, data, decoding):
    ends[1] = TOP
    if decoding:
        for place in range(AHEAD):
            byte = np.uint64(data[place]) if place < data.size else np.uint64(0)
            ends[2] = (ends[2] << np.uint64(8)) | byte
        ends[3] = np.uint64(AHEAD)


@njit
def close_coder(ends, data, decoding):
    """One byte more, which with zeros behind it names a number between low and high: low's first byte plus 1.

    Returns how many bytes there are in all; -1 if a decoder finds another byte there.
    """
    byte = np.uint8((ends[0] >> np.uint64(24)) + np.uint64(1))
    place = np.int64(ends[3]) - (AHEAD if decoding else 0)
    if place < data.size:
        if decoding and data[place] != byte:
            return np.int64(-1)
        data[place] = byte
    return place + 1
