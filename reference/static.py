"""Static: simple, slow decoders for sections 1 and 3 to 8 of docs/streams.md, in its order, without Tersor.

static(data, count)      returns symbols as a numpy array of uint8, or raises BadStream with the reason
"""

from __future__ import annotations

import numpy as np


class BadStream(ValueError):
    """Not a stream of `count` symbols."""


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BadStream(otherwise)


# 1. Words used


class Bits:
    """The bits of `data` from byte `start` on, most significant bit first."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.at = data, 8 * start

    def bit(self) -> int:
        check(self.at < 8 * len(self.data), "the stream ends too soon")
        byte, place = divmod(self.at, 8)
        self.at += 1
        return self.data[byte] >> (7 - place) & 1

    def bits(self, n: int) -> int:
        number = 0
        for _ in range(n):
            number = 2 * number + self.bit()
        return number

    def g(self, k: int) -> int:
        """exp-Golomb"""
        zeros = 0
        while self.bit() == 0:
            zeros += 1
            check(zeros <= 16, "more than 16 zeros")
        u = 2**zeros + self.bits(zeros)
        return (u - 1) * 2**k + self.bits(k)

    def r(self, k: int) -> int:
        """Rice"""
        ones = 0
        while self.bit() == 1:
            ones += 1
            check(ones <= 63, "more than 63 ones")
        return ones * 2**k + self.bits(k)

    def list(self, n: int, top: int) -> list[int]:
        steps, code, k = self.bit(), self.bit(), self.bits(3)
        values: list[int] = []
        for _ in range(n):
            z = self.g(k) if code else self.r(k)
            if steps and values:
                z = values[-1] + (z // 2 if z % 2 == 0 else -((z + 1) // 2))
            check(0 <= z <= top, f"{z} is not in 0..{top}")
            values.append(z)
        return values

    def padding(self) -> int:
        """Index of the next whole byte. The bits before it must be zero."""
        while self.at % 8:
            check(self.bit() == 0, "padding is not zero")
        return self.at // 8


def wrap(number: int, bits: int) -> int:
    """The signed number of so many bits that equals `number` modulo 2^bits."""
    half = 1 << (bits - 1)
    return (number + half) % (2 * half) - half


def clip(number: int, low: int, high: int) -> int:
    return min(max(number, low), high)


# 3. raw


def raw(settings: int, data: bytes, count: int) -> list[int]:
    check(settings <= 7, "raw needs settings 0 to 7")
    width = 8 - settings
    check(len(data) == 1 + (count * width + 7) // 8, "raw has a wrong length")
    source = Bits(data, 1)
    symbols = [source.bits(width) for _ in range(count)]
    source.padding()
    return symbols


# 4. constant


def constant(settings: int, data: bytes, count: int) -> list[int]:
    check(settings == 0 and len(data) == 2, "a constant needs settings 0 and 2 bytes")
    return [data[1]] * count


# 5. The alphabet


def alphabet(source: Bits) -> tuple[int, list[int]]:
    """start and offsets"""
    start = source.bits(8) if source.bit() else 0
    size = source.g(2) + 2
    check(size <= 256, "more than 256 symbols")
    if not source.bit():
        return start, list(range(size))
    offsets = [0]
    for _ in range(size - 1):
        offsets.append(offsets[-1] + 1 + source.g(0))
        check(offsets[-1] <= 255, "an offset above 255")
    return start, offsets


# 6. huffman


def huffman(settings: int, data: bytes, count: int) -> list[int]:
    check(settings == 0, "huffman needs settings 0")
    source = Bits(data, 1)
    start, offsets = alphabet(source)
    lengths = [1 + n for n in source.list(len(offsets), 14)]
    check(sum(2 ** (15 - n) for n in lengths) == 2**15, "the codes do not fill the code space")
    symbol_of: dict[tuple[int, int], int] = {}  # (length, code)
    code = before = 0
    for length, place in sorted((length, place) for place, length in enumerate(lengths)):
        code <<= length - before
        symbol_of[length, code] = (start + offsets[place]) % 256
        code, before = code + 1, length
    symbols = []
    for _ in range(count):
        length = code = 0
        while (length, code) not in symbol_of:
            length, code = length + 1, 2 * code + source.bit()
        symbols.append(symbol_of[length, code])
    check(source.padding() == len(data), "bytes after the last code")
    return symbols


# 7. Frequency tables of rans


def frequency_table(source: Bits, kind: int) -> tuple[int, list[int], list[int]]:
    """P, symbols, frequencies"""
    p = 9 + source.bits(3)
    if kind == 2:
        start = source.bits(8) if source.bit() else 0
        g = source.g(0)
        check(g <= 254, "a gap above 254")
        first = source.bits(p)
        check(first >= 1, "a frequency of 0")
        return p, [start, (start + 1 + g) % 256], [first, 2**p - first]
    start, offsets = alphabet(source)
    if kind == 0:
        d = source.bits(3)
        depths = source.list(len(offsets), 20 * 2**d)
    else:
        d = 6
        depths = shape(source, offsets)
    return p, [(start + offset) % 256 for offset in offsets], from_depths(depths, d, p)


def shape(source: Bits, offsets: list[int]) -> list[int]:
    def n(q: int) -> int:
        return (8 + (q - 1) % 8) * 2 ** ((q - 1) // 8) if q else 0

    c, a, b = source.bits(9), source.bits(7), source.bits(7)
    peak, height = -1, 0
    if source.bit():
        peak, height = source.bits(8), source.bits(8)
        check(peak < len(offsets), "a peak beyond the alphabet")
    depths = []
    for j, offset in enumerate(offsets):
        t = abs(2 * offset - c)
        depth = (32 * n(a) * t + n(b) * t * t) >> 14
        depths.append(min(depth + (4 * height if j != peak else 0), 20 * 2**6))
    return depths


def from_depths(depths: list[int], d: int, p: int) -> list[int]:
    weights = []
    for depth in depths:
        v = 20 * 2**d - depth
        weights.append((2**d + v % 2**d) * 2 ** (v // 2**d))
    free, whole, before = 2**p - len(depths), sum(weights), 0
    frequencies = []
    for weight in weights:
        frequencies.append(1 + free * (before + weight) // whole - free * before // whole)
        before += weight
    return frequencies


# 8. The payload of rans


def rans(settings: int, data: bytes, count: int) -> list[int]:
    kind, lanes = divmod(settings, 8)
    check(lanes <= 5 and kind <= 2, "rans needs lanes 0 to 5 and kind 0 to 2")
    source = Bits(data, 1)
    p, symbols, frequencies = frequency_table(source, kind)
    rest = data[source.padding() :]
    states, words = initial_states(rest, lanes)
    slots = [(j, k) for j, frequency in enumerate(frequencies) for k in range(frequency)]  # k = slot - S_j
    decoded, at = [], 0
    for i in range(count):
        x = states[i % 2**lanes]
        j, k = slots[x % 2**p]
        decoded.append(symbols[j])
        x = frequencies[j] * (x // 2**p) + k
        if x < 2**16 and at < len(words):
            x = x * 2**16 + int(words[at])
            at += 1
        states[i % 2**lanes] = x
    check(at == len(words), "words are left")
    check(all(x == (2**16 if lanes else 2**p) for x in states), "the final states are not the initial ones")
    return decoded


def initial_states(rest: bytes, lanes: int) -> tuple[list[int], np.ndarray]:
    n = len(rest)
    if lanes == 0:
        check(n >= 1, "no state")
        size = n if n <= 4 else (4 if n % 2 == 0 else 3)
        check(rest[size - 1] != 0, "the state's highest byte is zero")
        states = [int.from_bytes(rest[:size], "little")]
    else:
        size = 4 * 2**lanes
        check(n >= size, "too few bytes for the states")
        states = [int.from_bytes(rest[i : i + 4], "little") for i in range(0, size, 4)]
        check(min(states) >= 2**16, "a state below 2^16")
    check((n - size) % 2 == 0, "half a word")
    return states, np.frombuffer(rest[size:], dtype="<u2")


CODERS = (raw, constant, huffman, rans)  # indexed by the low three bits of the first byte


def static(data: bytes, count: int) -> np.ndarray:
    """Decode a stream of one of these coders."""
    settings, coder = divmod(data[0], 8)
    return np.array(CODERS[coder](settings, data, count), dtype=np.uint8)
