"""Predictive: a simple, slow decoder for section 10 of docs/streams.md.

predictive(settings, data, count, width, keep)      returns the symbols, or raises BadStream with the reason
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from static import Bits, check, clip, frequency_table, from_depths, static, wrap

Table = tuple[int, list[int], list[int]]  # P, symbols, frequencies

E = (1073741824, 1170923762, 1276901417, 1392470869, 1518500250, 1655936265, 1805811301, 1969251188)


def up(k: int) -> int:
    return E[k % 8] << k // 8


def bands(columns: int) -> list[tuple[int, int]]:
    n = -(-columns // 256)
    return [(columns * k // n, columns * (k + 1) // n) for k in range(n)]


def row_ranges(rows: int, columns: int) -> list[tuple[int, int]]:
    widest = max(end - begin for begin, end in bands(columns))
    at = [0, 64 * -(-widest // 192)]
    while at[-1] < rows:
        at.append(64 * -(-(3 * at[-1] // 2) // 64))
    return list(pairwise([row for row in at if row < rows] + [rows]))


def levels(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    check(at + 4 < len(data), "no levels")
    end = at + 4 + int.from_bytes(data[at : at + 4], "little")
    check(at + 4 < end <= len(data) and data[at + 4] % 8 < 4, "levels beyond the end, or not a static stream")
    found = static(data[at + 4 : end], count).tolist()
    check(max(found) < 128, "a level above 127")
    return found, end


class Tables:
    """The table of each group and distance. Common tables are computed on first use."""

    def __init__(self, source: Bits) -> None:
        self.shape: tuple[int, ...] = ()
        self.made: dict[tuple[int, int], Table] = {}
        if source.bit():
            slope, bend, low, high = (source.bits(8) for _ in range(4))
            check(low <= 128 and high <= 127, "symbols beyond -128 to 127")
            self.shape = (slope, bend, low, high, 12 + source.bits(2))
        group = slots = 0
        while group < 64:
            end, code = group + 1 + source.g(0), source.bits(2)
            check(end <= 64, "tables for more than 64 groups")
            check(code < 3 or bool(self.shape), "common tables without a shape")
            bins = 2**code if code < 3 else 0
            own = [own_table(source) for _ in range(bins)]
            slots += sum(2**p for p, _, _ in own)
            check(slots <= 2**22, "own tables of more than 2^22 slots")
            for g in range(group, end):
                self.made |= {(g, d): own[bin_of(d, bins)] for d in range(9) if bins}
            group = end

    def of(self, group: int, distance: int) -> Table:
        if (group, distance) not in self.made:
            self.made[group, distance] = self.common(group, distance)
        return self.made[group, distance]

    def common(self, group: int, distance: int) -> Table:
        slope, bend, low, high, p = self.shape
        bins = 1 if group >= 28 else 2 if group >= 20 else 4
        center = {1: (4,), 2: (1, 6), 4: (0, 2, 4, 7)}[bins][bin_of(distance, bins)]
        inverse = up(128 - 2 * group) >> 26
        depths = []
        for s in range(-low, high + 1):
            n = abs(16 * s - center) * inverse >> 12
            depths.append(min((slope * n + (bend * n * n >> 8)) >> 8, 20 * 2**6))
        return p, [s % 256 for s in range(-low, high + 1)], from_depths(depths, 6, p)


def bin_of(distance: int, bins: int) -> int:
    return min(distance * bins // 8, bins - 1)


def own_table(source: Bits) -> Table:
    kind = source.bits(2)
    return (0, [source.bits(8)], [1]) if kind == 3 else frequency_table(source, kind)


def learn(total: np.ndarray, rows: int, ridge: float) -> np.ndarray:
    """L as integers. Every float operation is an IEEE 754 operation with its own rounding."""
    a = total / rows
    width = len(a) - 1
    squares = 0.0
    for k in range(1, width + 1):
        squares += float(a[k, k])
    shrink = ridge * width / rows * (squares / width) + 1.0
    for k in range(1, width + 1):
        a[k, k] += shrink
    for k in range(width + 1):
        column = a[k + 1 :, k].copy()
        factor = column / a[k, k]
        a[k + 1 :, k + 1 :] -= factor[:, None] * column
        a[k + 1 :, k] = factor
    return np.clip(np.rint(a * 1024.0), -(2**14), 2**14).astype(np.int64)


def predictive(settings: int, data: bytes, count: int, width: int, keep: np.ndarray | None) -> np.ndarray:
    many, way = divmod(settings, 10)
    ridge, transposed = divmod(way, 2)
    check(many <= 1 and keep is None and len(data) >= 2, "predictive needs settings 0 to 19 and no mask")
    check(count % width == 0 and 2 <= width <= 2**28 and 2 <= count // width <= 2**28, "not a matrix")
    rows, columns = (width, count // width) if transposed else (count // width, width)
    row_level, at = levels(data, 2, rows)
    column_level, at = levels(data, at, columns)
    source = Bits(data, at)
    tables = Tables(source)
    rest = data[source.padding() :]
    size = 64 if many else 32
    check(len(rest) >= size and len(rest) % 2 == 0, "states or words cut off")
    payload = Payload([int.from_bytes(rest[k : k + 4], "little") for k in range(0, size, 4)], rest[size:])
    codes = np.zeros((rows, columns), dtype=np.int64)
    z = np.zeros((rows, columns), dtype=np.int64)
    for begin, end in bands(columns):
        total = np.zeros((end - begin + 1,) * 2)
        lower = np.zeros(total.shape, dtype=np.int64)
        for first, last in row_ranges(rows, columns):
            if ridge and first:
                lower = learn(total, first, (0.5, 1.0, 4.0, 16.0)[ridge - 1])
            for top in range(first, last, 64):
                block = range(top, min(top + 64, last))
                e = {o: np.zeros(end - begin + 1, dtype=np.int64) for o in block}
                for o in block:
                    e[o][0] = 256
                for i in range(begin, end):
                    j = i - begin + 1
                    for o in block:
                        f = clip(wrap(int(lower[j, :j] @ e[o][:j]), 32) >> 10, -4096, 4096)
                        mean = wrap(f * (up(row_level[o]) >> 24) >> 14, 16)
                        whole = (mean + 8) >> 4
                        part = mean - 16 * whole
                        group = clip((row_level[o] + column_level[i] - 64) >> 1, 0, 63)
                        step = wrap(payload.symbol(tables.of(group, abs(part))), 8)
                        code = wrap(whole - step if part < 0 else whole + step, 8)
                        codes[o, i] = code
                        z[o, i] = clip(code * (up(128 - row_level[o]) >> 26) >> 8, -4096, 4096)
                        e[o][j] = z[o, i] - f
            one = np.concatenate([np.full((last - first, 1), 256), z[first:last, begin:end]], axis=1)
            total += (one.T @ one).astype(np.float64)
    payload.end()
    return ((codes.T if transposed else codes) + data[1]).ravel() % 256


class Payload:
    """Section 8 with a table for each symbol."""

    def __init__(self, states: list[int], words: bytes) -> None:
        check(min(states) >= 2**16, "a state below 2^16")
        self.states, self.words = states, np.frombuffer(words, dtype="<u2").tolist()
        self.turn = self.at = 0

    def symbol(self, table: Table) -> int:
        p, symbols, frequencies = table
        x = self.states[self.turn]
        k, j = x % 2**p, 0
        while k >= frequencies[j]:
            k, j = k - frequencies[j], j + 1
        x = frequencies[j] * (x >> p) + k
        if x < 2**16 and self.at < len(self.words):
            x = x * 2**16 + self.words[self.at]
            self.at += 1
        self.states[self.turn] = x
        self.turn = (self.turn + 1) % len(self.states)
        return symbols[j]

    def end(self) -> None:
        check(self.at == len(self.words), "words are left")
        check(all(x == 2**16 for x in self.states), "the final states are not 2^16")
