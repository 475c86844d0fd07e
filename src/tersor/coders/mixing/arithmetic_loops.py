"""Arithmetic loops: a binary arithmetic coder, and the probability of a bit mixed from its contexts.

P(bit is 1) = squash(sum of weight * stretch(P of each context))       averaged over two weight sets

A context is an index into two arrays: the probability of a 1 (22 bits) and the number of bits seen. One
function both encodes and decodes, so that both adapt in the same way. Integers only. docs/streams.md section
11.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="assignment, return-value, call-overload, operator, arg-type, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from tersor.coders.mixing.logistic import COUNTED, LIMIT, STRETCH_MAX

INPUTS = 10  # contexts of a bit, at most
INHERITED = 2  # the count that a probability copied from the general context starts with
HALF = 1 << 21  # a probability of one half
AHEAD = 4  # bytes that a decoder reads ahead
TOP = np.uint64(0xFFFFFFFF)


@njit
def code_bit(bit, contexts, n, first, second, coder):
    """Encode or decode one bit in contexts[:n], the most general one last. Returns the bit.

    Its probability is mixed with the weight sets `first` and `second`, averaged in the logistic domain.
    """
    (
        probabilities, counts, weights, inputs, squash, stretch, context_rates, weight_rates, ends, data,
        decoding,
    ) = coder  # fmt: skip
    parent = contexts[n - 1]
    dot1 = dot2 = np.int64(0)
    for k in range(n):
        context = contexts[k]
        if counts[context] == 0 and context != parent:  # a new context starts from the general one
            probabilities[context] = probabilities[parent]
            counts[context] = INHERITED
        inputs[k] = stretch[probabilities[context] >> 10]
        dot1 += weights[first, k] * inputs[k]
        dot2 += weights[second, k] * inputs[k]
    probability = np.int64(squash[min(max((dot1 + dot2) >> 17, -STRETCH_MAX), STRETCH_MAX) + STRETCH_MAX])
    bit = code_step(bit, probability, ends, data, decoding)
    for chosen, dot in ((first, dot1), (second, dot2)):
        mixed = np.int64(squash[min(max(dot >> 16, -STRETCH_MAX), STRETCH_MAX) + STRETCH_MAX])
        seen = weights[chosen, INPUTS]
        error = ((bit << 16) - mixed) * weight_rates[seen]
        weights[chosen, INPUTS] = min(seen + 1, COUNTED)
        for k in range(n):
            weights[chosen, k] += (inputs[k] * error + (1 << 19)) >> 20
    target = np.int64(2 * HALF - 1) if bit else np.int64(0)
    for k in range(n):
        context = contexts[k]
        count = counts[context]
        probabilities[context] += np.int32(
            ((target - np.int64(probabilities[context])) * context_rates[count]) >> 16
        )
        counts[context] = min(count + 1, LIMIT)
    return bit


@njit(inline="always")
def code_step(bit, probability, ends, data, decoding):
    """One step of the arithmetic coder.

    probability: P(bit is 1) * 2^16      ends: low, high, code, index in `data`
    """
    low, high = ends[0], ends[1]
    middle = low + (((high - low) * np.uint64(probability)) >> np.uint64(16))
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
    """Write or check the last byte: the first byte of low plus 1. Followed by zeros it lies in low..high.

    Returns the number of bytes in all, or -1 if a decoder finds another last byte.
    """
    byte = np.uint8((ends[0] >> np.uint64(24)) + np.uint64(1))
    place = np.int64(ends[3]) - (AHEAD if decoding else 0)
    if place < data.size:
        if decoding and data[place] != byte:
            return np.int64(-1)
        data[place] = byte
    return place + 1
