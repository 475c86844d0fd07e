"""Tables: compact encodings of the frequencies of a rANS stream.

depth[j]   log2 of how much rarer symbol j is than a fixed reference, in steps of 2^-detail
f[j]       1 + the part of M - K that belongs to symbol j, rounded by cumulative sums: f[j] >= 1, sum f = M
           for K symbols and a table of M = 2^bits slots

A pair stores one frequency, a list stores K depths, and a shape stores the parameters of a curve.
docs/streams.md section 7.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tersor.coders.alphabet import SYMBOLS, Alphabet, read_alphabet, read_start
from tersor.coders.bit_strings import BitReader, read_list
from tersor.errors import FormatError

LIST, SHAPE, PAIR = 0, 1, 2
MIN_BITS, MAX_BITS = 9, 16  # precision: M = 2^bits
OCTAVES = 20  # from the largest weight to the smallest
SHAPE_DETAIL = 6
SLOPE_SCALE, SHAPE_SHIFT, PEAK_SCALE = 32, 14, 4
MAX_FLOAT7 = 127  # a slope or a bend is stored in 7 bits
MAX_CENTER, MAX_HEIGHT = 511, 255


@dataclass(frozen=True, eq=False)
class Table:
    """M = 2^bits slots, of which frequencies[j] belong to symbols[j]."""

    bits: int
    symbols: np.ndarray  # [K] uint8
    frequencies: np.ndarray  # [K] int64, each >= 1, with sum M

    def slots(self) -> np.ndarray:
        """The decoder's lookup table, [M] uint64: tables_loops.slots_of."""
        from tersor.coders.rans import tables_loops

        return tables_loops.slots_of(self.symbols, self.frequencies, self.bits)


def frequencies(depths: np.ndarray, detail: int, bits: int) -> np.ndarray:
    """Depths [..., K] to frequencies [..., K], in integers below 2^52: the same on every machine."""
    from tersor.coders.rans import tables_loops

    rows = np.ascontiguousarray(depths.reshape(-1, depths.shape[-1]))
    return tables_loops.apportion(rows, OCTAVES, detail, bits).reshape(depths.shape)


@functools.cache
def float7() -> np.ndarray:
    """The values of a slope or bend of 7 bits, 3 of mantissa: 0, 8, 9, ..., 15, 16, 18, ..., 30, 32, ..."""
    below = np.arange(MAX_FLOAT7)
    return np.concatenate([[0], (8 + below % 8) << (below // 8)])


def shape_depths(
    offsets: np.ndarray, center: np.ndarray | int, slope: np.ndarray | int, bend: np.ndarray | int
) -> np.ndarray:
    """Depths [..., K] of the symbols at `offsets` [K] in 2^-6 octaves, without a peak and not yet clipped."""
    t = abs(2 * offsets - np.asarray(center)[..., None])
    return (SLOPE_SCALE * float7()[slope][..., None] * t + float7()[bend][..., None] * t * t) >> SHAPE_SHIFT


def read_table(source: BitReader, kind: int) -> Table:
    bits = MIN_BITS + source.bits(3)
    if kind == PAIR:
        return read_pair(source, bits)
    alphabet = read_alphabet(source)
    if kind == LIST:
        detail = source.bits(3)
        depths = read_list(source, len(alphabet.offsets), OCTAVES << detail)
    else:
        detail = SHAPE_DETAIL
        depths = read_shape(source, alphabet)
    return Table(bits, alphabet.symbols, frequencies(depths, detail, bits))


def read_pair(source: BitReader, bits: int) -> Table:
    start = read_start(source)
    gap = 1 + source.golomb()
    if gap >= SYMBOLS:
        raise FormatError(
            f"coded stream: the second symbol of its pair is {gap} above the first, but at most "
            f"{SYMBOLS - 1} is allowed"
        )
    first = source.bits(bits)
    if not first:
        raise FormatError("coded stream: the first symbol of its pair has frequency 0")
    symbols = np.array([start, (start + gap) % SYMBOLS], dtype=np.uint8)
    return Table(bits, symbols, np.array([first, (1 << bits) - first]))


def read_shape(source: BitReader, alphabet: Alphabet) -> np.ndarray:
    center, slope, bend = source.bits(9), source.bits(7), source.bits(7)
    depths = shape_depths(alphabet.offsets, center, slope, bend)
    if source.bits(1):
        place, height = source.bits(8), source.bits(8)
        if place >= len(depths):
            raise FormatError(
                f"coded stream: its peak is symbol {place}, but there are {len(depths)} symbols"
            )
        depths += np.where(np.arange(len(depths)) == place, 0, PEAK_SCALE * height)
    return np.minimum(depths, OCTAVES << SHAPE_DETAIL)
