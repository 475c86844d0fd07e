"""Fit: the table that makes table and payload together shortest. Encoder only; a decoder needs none of this.

cost   sum of n[j] * (bits - log2 f[j]), counted in whole 2^-24 bits so that ties break alike everywhere
A finer table saves payload and costs itself: half the log2 of a symbol's count is about what its depth is
worth (Rissanen 1983). So all details are tried, and shapes wherever a list would weigh.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from tersor.coders.alphabet import Alphabet, alphabets, write_alphabet, write_start
from tersor.coders.bit_strings import BitWriter, list_bits, write_list
from tersor.coders.rans import tables
from tersor.coders.rans.tables import LIST, MAX_BITS, MIN_BITS, OCTAVES, PAIR, SHAPE, Table

UNIT = 1 << 24  # costs count in 1 / UNIT bits: a symbol of frequency 65535 costs 2^-15.5
DETAILS = np.arange(8)
TRIFLE = 11  # a table or a gain below 2^-11 of the payload is not worth a search
PRECISE = 9  # below 2^-9 of it not another bit of precision: 2^12 slots stay in the first cache
SHAPE_BITS = 36  # of the smallest shape, its precision and alphabet included
STRIDES = (8, 4, 2, 1)
MOVES = 8  # a search goes at most so far at each stride


@dataclass(frozen=True, eq=False)
class Choice:
    """A table, how it is written, and what the payload will cost with it."""

    kind: int
    table: Table
    head: BitWriter
    cost: int  # of the payload, in 1 / UNIT bits

    @property
    def total(self) -> int:
        # A lone state begins at 2^bits: so many bits are spent before the first symbol.
        return self.cost + UNIT * (8 * -(-self.head.length // 8) + self.table.bits)


@functools.cache
def log2_table() -> np.ndarray:
    """log2(f) in 1 / UNIT for f up to 2^16; entry 0 is not used."""
    return np.rint(np.log2(np.maximum(np.arange((1 << MAX_BITS) + 1), 1)) * UNIT).astype(np.int64)


def cost_of(counts: np.ndarray, frequencies: np.ndarray, bits: int) -> np.ndarray:
    """Payload of counts [K] coded by frequencies [..., K].

    States of 32 bits round, the more the finer the table: 0.15 % of the payload at 16 bits (measured), a
    quarter of it at 15, and so on.
    """
    cost = (counts * (bits * UNIT - log2_table()[frequencies])).sum(-1)
    return cost + (3 * cost >> (11 + 2 * (MAX_BITS - bits)))


def best_table(counts: np.ndarray) -> Choice:
    """For counts [256] of at least two symbols."""
    if np.count_nonzero(counts) == 2:
        return pair(counts)
    bits = precision(counts[counts > 0])
    names = alphabets(counts)
    best = min((listed(counts[a.symbols], a, bits) for a in names), key=lambda choice: choice.total)
    if best.head.length > SHAPE_BITS and best.head.length * UNIT << TRIFLE > best.cost:
        found = min(shaped(counts, names, bits), key=lambda choice: choice.total)
        best = min(best, found, key=lambda choice: choice.total)
    return best


def pair(counts: np.ndarray) -> Choice:
    low, high = (int(i) for i in np.flatnonzero(counts))
    start, gap = (low, high - low) if high - low <= 128 else (high, low - high + 256)
    symbols = np.array([start, (start + gap) % 256], dtype=np.uint8)
    n = counts[symbols]
    choices = []
    for bits in range(MIN_BITS, MAX_BITS + 1):
        first = min(max(round(int(n[0]) * (1 << bits) / int(n.sum())), 1), (1 << bits) - 1)
        table = Table(bits, symbols, np.array([first, (1 << bits) - first]))
        head = BitWriter()
        head.bits(bits - MIN_BITS, 3)
        write_start(head, start)
        head.golomb(gap - 1)
        head.bits(first, bits)
        choices.append(Choice(PAIR, table, head, int(cost_of(n, table.frequencies, bits))))
    return min(choices, key=lambda choice: choice.total)


def precision(n: np.ndarray) -> int:
    """Bits of precision for counts [K]: the fewest that do nearly as well as any: small tables are fast."""
    costs = {}
    for bits in range(MIN_BITS, MAX_BITS + 1):
        finest = int(DETAILS[-1])
        f = tables.frequencies(depths_for(n, bits)[finest], finest, bits)
        costs[bits] = int(cost_of(n, f, bits))
    least = min(costs.values())
    return min(bits for bits, cost in costs.items() if cost <= least + (least >> PRECISE))


def depths_for(n: np.ndarray, bits: int) -> np.ndarray:
    """The depths [8, K] nearest to counts [K] at each detail."""
    free = (1 << bits) - len(n)
    # Each symbol has 1 for nothing, so the weights share out the rest; below half a unit all are alike.
    share = np.maximum(n / n.sum() * (1 << bits) - 1, 0.5) / free
    octave = np.clip(OCTAVES + np.log2(share / share.max()), 0, OCTAVES)  # [K]
    whole = np.floor(octave)
    part = np.rint((np.exp2(octave - whole) - 1) * 2.0 ** DETAILS[:, None]).astype(np.int64)  # [8, K]
    level = (whole.astype(np.int64) << DETAILS[:, None]) + part
    return (OCTAVES << DETAILS[:, None]) - level


def listed(n: np.ndarray, alphabet: Alphabet, bits: int) -> Choice:
    """The best detail for counts [K]; a coarse list costs few bits, a fine one wastes few."""
    depths = depths_for(n, bits)  # [8, K]
    sizes = list_bits(depths).min(axis=(1, 2, 3))  # [8]
    f = [tables.frequencies(depths[d], d, bits) for d in DETAILS.tolist()]
    costs = np.array([cost_of(n, row, bits) for row in f])
    d = int((costs + sizes * UNIT).argmin())
    head = BitWriter()
    head.bits(bits - MIN_BITS, 3)
    write_alphabet(head, alphabet)
    head.bits(d, 3)
    write_list(head, depths[d])
    return Choice(LIST, Table(bits, alphabet.symbols, f[d]), head, int(costs[d]))


def shaped(counts: np.ndarray, names: list[Alphabet], bits: int) -> list[Choice]:
    """Shapes with and without a peak, fitted in the order in which the counts lie closest together."""
    near = min(names, key=lambda a: spread_of(counts[a.symbols], a.offsets)[1])
    n = counts[near.symbols]
    alike = [a for a in names if a.start == near.start]
    choices = []
    for peak in (False, True):
        dials = search(n, near.offsets, bits, peak)
        choices += [write_shape(counts[a.symbols], a, bits, dials, peak) for a in alike]
    return choices


def spread_of(n: np.ndarray, offsets: np.ndarray) -> tuple[float, float, float]:
    """Mean, variance and mean distance from the mean of offsets [K] that occur n [K] times."""
    mean = float(n @ offsets / n.sum())
    away = offsets - mean
    return mean, float(n @ away**2 / n.sum()), float(n @ abs(away) / n.sum())


def nearest_dial(value: float) -> int:
    return int(abs(tables.dial(np.arange(tables.MAX_DIAL + 1)) - value).argmin())


def shape_frequencies(
    n: np.ndarray, offsets: np.ndarray, bits: int, dials: np.ndarray, peak: bool
) -> np.ndarray:
    """Frequencies [..., K] of dials [..., 4]: center, slope, bend, height of the peak at the largest n."""
    depths = tables.shape_depths(offsets, dials[:, 0], dials[:, 1], dials[:, 2])
    if peak:
        depths += tables.PEAK_SCALE * dials[:, 3:] * (np.arange(len(n)) != n.argmax())
    return tables.frequencies(np.minimum(depths, OCTAVES << tables.SHAPE_DETAIL), tables.SHAPE_DETAIL, bits)


def search(n: np.ndarray, offsets: np.ndarray, bits: int, peak: bool) -> np.ndarray:
    """Dials [4] by descent with shrinking strides from the best of a normal, a Laplace and a mixed shape."""

    def cheapest(candidates: np.ndarray) -> np.ndarray:
        return candidates[cost_of(n, shape_frequencies(n, offsets, bits, candidates, peak), bits).argmin()]

    rest = np.where(np.arange(len(n)) == n.argmax(), 0, n) if peak else n
    mean, variance, distance = spread_of(rest, offsets)
    octave = (1 << tables.SHAPE_DETAIL) * np.log2(np.e)
    unit = 1 << tables.SHAPE_SHIFT
    bend = nearest_dial(octave * unit / (8 * max(variance, 0.1)))  # depth = octave * (t / 2)^2 / (2 variance)
    slope = nearest_dial(octave * unit / (2 * tables.SLOPE_SCALE * max(distance, 0.1)))
    center, height = round(2 * mean), 16
    points = [(center, 0, bend, height), (center, slope, 0, height), (center, slope - 8, bend - 8, height)]
    most = np.array([tables.MAX_CENTER, tables.MAX_DIAL, tables.MAX_DIAL, tables.MAX_HEIGHT])
    dials = cheapest(np.clip(points, 0, most))
    cross = np.array(
        list(itertools.product((0, -1, 1), (0, -1, 1), (0, -1, 1), (0, -1, 1) if peak else (0,)))
    )
    for stride in STRIDES:
        for _ in range(MOVES):
            nearby = cheapest(np.clip(dials + stride * cross, 0, most))
            if (nearby == dials).all():
                break
            dials = nearby
    return dials


def write_shape(n: np.ndarray, alphabet: Alphabet, bits: int, dials: np.ndarray, peak: bool) -> Choice:
    f = shape_frequencies(n, alphabet.offsets, bits, dials[None], peak)[0]
    center, slope, bend, height = dials.tolist()
    head = BitWriter()
    head.bits(bits - MIN_BITS, 3)
    write_alphabet(head, alphabet)
    for number, width in ((center, 9), (slope, 7), (bend, 7), (peak, 1)):
        head.bits(number, width)
    if peak:
        head.bits(int(n.argmax()), 8)
        head.bits(height, 8)
    return Choice(SHAPE, Table(bits, alphabet.symbols, f), head, int(cost_of(n, f, bits)))
