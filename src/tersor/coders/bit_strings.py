"""Bit strings: variable-length codes for numbers, and compact lists of small numbers.

exp-Golomb order k   2 * floor(log2((v >> k) + 1)) + 1 + k bits      Teuhola 1978
Rice order k         (v >> k) + 1 + k bits                           Golomb 1966, Rice and Plaunt 1971

A list tries both codes, with eight orders each, on the values and on their differences. docs/streams.md
section 1.
"""

from __future__ import annotations

import numpy as np

from tersor.errors import FormatError

RICE, GOLOMB = 0, 1
MAX_ONES = 63  # in a Rice code; a longer run of ones means damage
MAX_ZEROS = 16  # in an exp-Golomb code
ORDERS = np.arange(8)
LIST_HEAD = 5  # bits: 1 for differences, 1 for the code, 3 for the order
TOO_LONG = 1 << 40  # bits, more than any list that can be stored: excludes a code


class BitWriter:
    """A growing string of bits, most significant bit first."""

    def __init__(self) -> None:
        self.value = 0
        self.length = 0

    def bits(self, number: int, width: int) -> None:
        self.value = self.value << width | int(number)
        self.length += width

    def golomb(self, number: int, order: int = 0) -> None:
        high = (int(number) >> order) + 1
        self.bits(high, 2 * high.bit_length() - 1)
        self.bits(int(number) & ((1 << order) - 1), order)

    def rice(self, number: int, order: int) -> None:
        ones = int(number) >> order
        self.bits((1 << ones + 1) - 2, ones + 1)
        self.bits(int(number) & ((1 << order) - 1), order)

    def to_bytes(self) -> bytes:
        """The bits, padded with zeros to a whole byte."""
        spare = -self.length % 8
        return (self.value << spare).to_bytes((self.length + spare) // 8, "big")


class BitReader:
    """Reads bits from byte `start` of `data` on. FormatError at the end of the data."""

    def __init__(self, data: memoryview, start: int = 0) -> None:
        self.data = data
        self.at = 8 * start  # in bits

    def bits(self, width: int) -> int:
        end = self.at + width
        if end > 8 * len(self.data):
            raise FormatError(f"coded stream: it ends after {len(self.data)} bytes, inside its table")
        chunk = int.from_bytes(self.data[self.at >> 3 : (end + 7) >> 3], "big")
        self.at = end
        return chunk >> (-end % 8) & ((1 << width) - 1)

    def golomb(self, order: int = 0) -> int:
        begin = self.at >> 3
        ahead = int.from_bytes(bytes(self.data[begin : begin + 4]).ljust(4, b"\0"), "big")
        zeros = 32 - (self.at & 7) - (ahead & 0xFFFFFFFF >> (self.at & 7)).bit_length()
        if zeros > MAX_ZEROS:
            raise FormatError(f"coded stream: a number with more than {MAX_ZEROS} leading zeros")
        high = self.bits(2 * zeros + 1) - 1
        return high << order | self.bits(order) if order else high

    def byte_end(self) -> int:
        """Index of the next whole byte. The remaining bits of the current byte must be zero."""
        if self.bits(-self.at % 8):
            raise FormatError("coded stream: the padding after its table is not zero")
        return self.at >> 3


def steps_of(values: np.ndarray) -> np.ndarray:
    """The first value, then differences in zigzag code: 0, -1, 1, -2, 2 become 0, 1, 2, 3, 4."""
    step = np.diff(values, axis=-1)  # [..., K - 1]
    folded = np.where(step < 0, -2 * step - 1, 2 * step)
    return np.concatenate([values[..., :1], folded], axis=-1)  # [..., K]


def list_bits(values: np.ndarray) -> np.ndarray:
    """Bits of each list [..., K] for each choice of differences, code and order: [..., 2, 2, 8]."""
    from tersor.coders import bit_strings_loops

    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
    found = np.empty((len(rows), 2, 2, len(ORDERS)), dtype=np.int64)
    bit_strings_loops.list_bits(rows, MAX_ONES, TOO_LONG, found)
    return found.reshape(*values.shape[:-1], 2, 2, len(ORDERS)) + LIST_HEAD


def write_list(out: BitWriter, values: np.ndarray) -> None:
    """Write the values [K] in the cheapest code; on a tie, in the first one."""
    costs = list_bits(values)
    steps, code, order = (int(i) for i in np.unravel_index(int(costs.argmin()), costs.shape))
    out.bits(steps, 1)
    out.bits(code, 1)
    out.bits(order, 3)
    write_numbers(out, steps_of(values) if steps else values, code, order, int(costs.min()) - LIST_HEAD)


def write_numbers(out: BitWriter, numbers: np.ndarray, code: int, order: int, nbits: int) -> None:
    """Write numbers >= 0 in one code, in `nbits` bits."""
    from tersor.coders import bit_strings_loops

    data = np.zeros(-(-nbits // 8), dtype=np.uint8)
    bit_strings_loops.write_numbers(numbers, code, order, data)
    out.bits(int.from_bytes(data.tobytes(), "big") >> (-nbits % 8), nbits)


def read_numbers(source: BitReader, length: int, code: int, order: int) -> np.ndarray:
    """Read `length` numbers >= 0 of one code."""
    from tersor.coders import bit_strings_loops

    values = np.empty(length, dtype=np.int64)
    data = np.frombuffer(source.data, dtype=np.uint8)
    end = bit_strings_loops.read_numbers(data, source.at, code, order, MAX_ONES, MAX_ZEROS, values)
    if end < 0:
        raise FormatError(f"coded stream: its bits are no list of {length} numbers")
    source.at = end
    return values


def read_list(source: BitReader, length: int, top: int) -> np.ndarray:
    """Read a list of `length` values. FormatError if one is not in 0..top."""
    steps, code, order = source.bits(1), source.bits(1), source.bits(3)
    values = read_numbers(source, length, code, order)
    if steps:
        values[1:] = np.where(values[1:] & 1, -(values[1:] + 1) // 2, values[1:] // 2)
        values = values.cumsum()
    if length and not 0 <= values.min() <= values.max() <= top:
        wrong = values[(values < 0) | (values > top)][0]
        raise FormatError(f"coded stream: a value of {wrong} in its table, but 0 to {top} is allowed")
    return values  # [K]
