"""Alphabet: which of the 256 symbols occur, told in few bits.

symbol[j] = (start + offset[j]) mod 256: a run costs nothing but its length, a gap g costs 2 log2(g) + 1 bits.
Cyclic, so that int8 codes seen as bytes (254, 255, 0, 1) are one run. docs/streams.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tersor.coders.bit_strings import GOLOMB, BitReader, BitWriter, read_numbers
from tersor.errors import FormatError

SYMBOLS = 256
SIZE_ORDER = 2  # of the exp-Golomb code of K - 2


@dataclass(frozen=True, eq=False)
class Alphabet:
    """K >= 2 symbols in an order of their own."""

    start: int
    offsets: np.ndarray  # [K] int64, from 0 upward, at most 255

    @property
    def symbols(self) -> np.ndarray:
        return ((self.start + self.offsets) % SYMBOLS).astype(np.uint8)  # [K]


def write_start(out: BitWriter, start: int) -> None:
    out.bits(start > 0, 1)
    out.bits(start, 8 if start else 0)


def read_start(source: BitReader) -> int:
    return source.bits(8) if source.bits(1) else 0


def write_alphabet(out: BitWriter, alphabet: Alphabet) -> None:
    write_start(out, alphabet.start)
    gaps = np.diff(alphabet.offsets) - 1  # [K - 1]
    out.golomb(len(gaps) - 1, SIZE_ORDER)
    out.bits(bool(gaps.any()), 1)
    if gaps.any():
        for gap in gaps.tolist():
            out.golomb(gap)


def read_alphabet(source: BitReader) -> Alphabet:
    start = read_start(source)
    size = source.golomb(SIZE_ORDER) + 2
    if size > SYMBOLS:
        raise FormatError(f"coded stream: an alphabet of {size} symbols, but there are {SYMBOLS}")
    offsets = np.arange(size)
    if source.bits(1):
        offsets[1:] = (1 + read_numbers(source, size - 1, GOLOMB, 0)).cumsum()
        if offsets[-1] >= SYMBOLS:
            raise FormatError(f"coded stream: an alphabet whose last symbol is {offsets[-1]} above the first")
    return Alphabet(start, offsets)


def alphabets(counts: np.ndarray) -> list[Alphabet]:
    """Ways to name the symbols that occur in `counts` [256]: where to start, whether to fill the holes."""
    present = np.flatnonzero(counts)  # [K]
    gaps = np.diff(present, append=present[0] + SYMBOLS)
    starts = {int(present[(gaps.argmax() + 1) % len(present)])}
    if counts[0]:
        starts.add(0)  # saves the 8 bits that name another start
    if len(present) == SYMBOLS:
        starts.add(SYMBOLS // 2)  # signed bytes: the rarest are in the middle
    found = []
    for start in sorted(starts):
        offsets = np.sort((present - start) % SYMBOLS)
        found.append(Alphabet(start, offsets))
        if offsets[-1] >= len(offsets):
            found.append(Alphabet(start, np.arange(offsets[-1] + 1)))
    return found
