"""Alphabet: a compact code for the set of symbols that occur, out of 256.

symbol[j] = (start + offset[j]) mod 256. A run of symbols costs only its length; a gap g costs 2 log2(g) + 1
bits. The order is cyclic, so that int8 codes seen as bytes (254, 255, 0, 1) form one run. docs/streams.md
section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tersor.coders.bit_strings import GOLOMB, BitReader, BitWriter, read_numbers, write_numbers
from tersor.errors import FormatError

SYMBOLS = 256
SIZE_ORDER = 2  # order of the exp-Golomb code of K - 2


@dataclass(frozen=True, eq=False)
class Alphabet:
    """K >= 2 symbols in cyclic order from a start."""

    start: int
    offsets: np.ndarray  # [K] int64, increasing from 0, at most 255

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
    gaps = np.diff(alphabet.offsets)  # [K - 1], from 1
    out.golomb(len(gaps) - 1, SIZE_ORDER)
    out.bits(bool((gaps > 1).any()), 1)
    if nbits := gap_bits(gaps):
        write_numbers(out, gaps - 1, GOLOMB, 0, nbits)


def alphabet_bits(alphabet: Alphabet) -> int:
    """The number of bits that `write_alphabet` writes."""
    gaps = np.diff(alphabet.offsets)  # [K - 1], from 1
    size = (len(gaps) - 1 >> SIZE_ORDER) + 1
    return (9 if alphabet.start else 1) + 2 * size.bit_length() + SIZE_ORDER + gap_bits(gaps)


def gap_bits(gaps: np.ndarray) -> int:
    """Bits of the gaps between symbols, gaps - 1 in the code G(0); 0 if all are 1."""
    return int((2 * np.frexp(gaps)[1] - 1).sum()) if (gaps > 1).any() else 0


def read_alphabet(source: BitReader) -> Alphabet:
    start = read_start(source)
    size = source.golomb(SIZE_ORDER) + 2
    if size > SYMBOLS:
        raise FormatError(f"coded stream: an alphabet of {size} symbols, but at most {SYMBOLS} are allowed")
    offsets = np.arange(size)
    if source.bits(1):
        offsets[1:] = (1 + read_numbers(source, size - 1, GOLOMB, 0)).cumsum()
        if offsets[-1] >= SYMBOLS:
            raise FormatError(
                f"coded stream: the last offset of the alphabet is {offsets[-1]}, but at most {SYMBOLS - 1} "
                "is allowed"
            )
    return Alphabet(start, offsets)


def alphabets(counts: np.ndarray) -> list[Alphabet]:
    """Candidate alphabets for the symbols that occur in `counts` [256]: several starts, gaps or none."""
    present = np.flatnonzero(counts)  # [K]
    gaps = np.diff(present, append=present[0] + SYMBOLS)
    starts = {int(present[(gaps.argmax() + 1) % len(present)])}
    if counts[0]:
        starts.add(0)  # start 0 saves the 8 bits that store any other start
    if len(present) == SYMBOLS:
        starts.add(SYMBOLS // 2)  # signed bytes: the rarest symbols are near 128
    found = []
    for start in sorted(starts):
        offsets = np.sort((present - start) % SYMBOLS)
        found.append(Alphabet(start, offsets))
        if offsets[-1] >= len(offsets):
            found.append(Alphabet(start, np.arange(offsets[-1] + 1)))
    return found
