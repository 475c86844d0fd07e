"""Table plan: choose the frequency table that minimizes table plus payload. Encoder only.

cost   sum of n[j] * (bits - log2 f[j]), in integer units of 2^-24 bits so that ties break equally everywhere

A finer table makes the payload shorter and the table longer: a parameter is worth about half the log2 of the
count in bits (minimum description length, Rissanen 1983). Pair, list and shape, and the detail of their
depths, are those of tables.py. All details are tried, and shapes too unless the list is short.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tersor.coders.alphabet import Alphabet, alphabet_bits, alphabets, write_alphabet, write_start
from tersor.coders.bit_strings import BitWriter, list_bits, write_list
from tersor.coders.rans import tables
from tersor.coders.rans.tables import LIST, MAX_BITS, MIN_BITS, OCTAVES, PAIR, SHAPE, Table

UNIT = 1 << 24  # costs are in 1 / UNIT bits: a symbol of frequency 65535 costs 2^-15.5 bits
DETAILS = np.arange(8)
NEGLIGIBLE = 11  # a list below 2^-11 of the payload is not worth a search for a shape
PRECISE = 9  # a gain below 2^-9 is not worth another bit of precision: 2^12 slots stay in L1 cache
SHAPE_BITS = 36  # bits of the smallest shape, with its precision and alphabet


@dataclass(frozen=True, eq=False)
class Choice:
    """A table, its encoding, and the cost of the payload with it."""

    kind: int
    table: Table
    head: BitWriter
    cost: int  # of the payload, in 1 / UNIT bits

    @property
    def total(self) -> int:
        # A single state starts at 2^bits, which costs this many bits.
        return self.cost + UNIT * (8 * -(-self.head.length // 8) + self.table.bits)


@functools.cache
def log2_table() -> np.ndarray:
    """log2(f) in 1 / UNIT, for f up to 2^16; entry 0 is unused."""
    return np.rint(np.log2(np.maximum(np.arange((1 << MAX_BITS) + 1), 1)) * UNIT).astype(np.int64)


def cost_of(counts: np.ndarray, frequencies: np.ndarray, bits: int) -> np.ndarray:
    """Payload in 1 / UNIT bits of counts [K] with frequencies [..., K].

    Rounding of 32-bit states is included: 0.15 % of the payload at 16 bits (measured), a quarter of that at
    15 bits, and so on.
    """
    cost = (counts * (bits * UNIT - log2_table()[frequencies])).sum(-1)
    return cost + (3 * cost >> (11 + 2 * (MAX_BITS - bits)))


def best_table(counts: np.ndarray, *, shapes: bool = True) -> Choice:
    """The best table for counts [256] of at least two symbols. `shapes`: try them too."""
    if np.count_nonzero(counts) == 2:
        return pair(counts)
    bits = precision(counts[counts > 0])
    names = alphabets(counts)
    lists = (listed(counts[a.symbols], a, bits) for a in names)
    best = write_listed(min(lists, key=lambda found: found.cost + UNIT * (8 * -(-found.nbits // 8))), bits)
    if shapes and best.head.length > SHAPE_BITS and best.head.length * UNIT << NEGLIGIBLE > best.cost:
        best = min(best, shaped(counts, names, bits), key=lambda choice: choice.total)
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
    """The lowest precision in bits that is nearly optimal for counts [K]: small tables are fast."""
    from tersor.coders.rans import table_plan_loops

    costs = table_plan_loops.costs_by_bits(n, MIN_BITS, MAX_BITS, int(DETAILS[-1]), log2_table()).tolist()
    least = min(costs)
    return MIN_BITS + next(k for k, cost in enumerate(costs) if cost <= least + (least >> PRECISE))


class List(NamedTuple):
    """The list with the best detail for an alphabet, not yet written."""

    alphabet: Alphabet
    detail: int
    depths: np.ndarray  # [K]
    nbits: int  # of the table
    cost: int  # of the payload, in 1 / UNIT bits


def listed(n: np.ndarray, alphabet: Alphabet, bits: int) -> List:
    """The list with the best detail for counts [K]: finer lists are longer, but their payload is shorter."""
    from tersor.coders.rans import table_plan_loops

    depths, costs = np.empty((len(DETAILS), len(n)), np.int64), np.empty(len(DETAILS), np.int64)
    table_plan_loops.lists_of(n, bits, log2_table(), depths, costs)
    sizes = list_bits(depths).min(axis=(1, 2, 3))  # [8]
    d = int((costs + sizes * UNIT).argmin())
    return List(alphabet, d, depths[d], 6 + alphabet_bits(alphabet) + int(sizes[d]), int(costs[d]))


def write_listed(found: List, bits: int) -> Choice:
    head = BitWriter()
    head.bits(bits - MIN_BITS, 3)
    write_alphabet(head, found.alphabet)
    head.bits(found.detail, 3)
    write_list(head, found.depths)
    f = tables.frequencies(found.depths, found.detail, bits)
    return Choice(LIST, Table(bits, found.alphabet.symbols, f), head, found.cost)


def shaped(counts: np.ndarray, names: list[Alphabet], bits: int) -> Choice:
    """The best shape, with a peak or without, fitted in the cyclic order with the smallest variance."""
    near = min(names, key=lambda a: moments_of(counts[a.symbols], a.offsets)[1])
    n = counts[near.symbols]
    same_start = [a for a in names if a.start == near.start]
    choices = []
    for peak in (False, True):
        parameters = search(n, near.offsets, bits, peak)
        choices += [write_shape(counts[a.symbols], a, bits, parameters, peak) for a in same_start]
    return min(choices, key=lambda choice: choice.total)


def moments_of(n: np.ndarray, offsets: np.ndarray) -> tuple[float, float, float]:
    """Mean, variance and mean absolute deviation of offsets [K] that occur n [K] times."""
    mean = float(n @ offsets / n.sum())
    away = offsets - mean
    return mean, float(n @ away**2 / n.sum()), float(n @ abs(away) / n.sum())


def nearest_float7(value: float) -> int:
    return int(abs(tables.float7() - value).argmin())


def shape_frequencies(
    n: np.ndarray, offsets: np.ndarray, bits: int, parameters: np.ndarray, peak: bool
) -> np.ndarray:
    """Frequencies [..., K] of shapes with parameters [..., 4]: center, slope, bend, height of the peak.

    The peak is the symbol with the largest n.
    """
    depths = tables.shape_depths(offsets, parameters[:, 0], parameters[:, 1], parameters[:, 2])
    if peak:
        depths += tables.PEAK_SCALE * parameters[:, 3:] * (np.arange(len(n)) != n.argmax())
    return tables.frequencies(np.minimum(depths, OCTAVES << tables.SHAPE_DETAIL), tables.SHAPE_DETAIL, bits)


def search(n: np.ndarray, offsets: np.ndarray, bits: int, peak: bool) -> np.ndarray:
    """Parameters [4] by a local search with shrinking strides, from a normal, a Laplace or a mixed shape."""
    from tersor.coders.rans import table_plan_loops

    rest = np.where(np.arange(len(n)) == n.argmax(), 0, n) if peak else n
    mean, variance, distance = moments_of(rest, offsets)
    octave = (1 << tables.SHAPE_DETAIL) * np.log2(np.e)
    unit = 1 << tables.SHAPE_SHIFT
    # A normal distribution has depth = octave * (t / 2)^2 / (2 variance).
    bend = nearest_float7(octave * unit / (8 * max(variance, 0.1)))
    slope = nearest_float7(octave * unit / (2 * tables.SLOPE_SCALE * max(distance, 0.1)))
    center, height = round(2 * mean), 16
    points = [(center, 0, bend, height), (center, slope, 0, height), (center, slope - 8, bend - 8, height)]
    most = np.array([tables.MAX_CENTER, tables.MAX_FLOAT7, tables.MAX_FLOAT7, tables.MAX_HEIGHT])
    top = int(n.argmax()) if peak else -1
    return table_plan_loops.search(n, offsets, bits, top, np.clip(points, 0, most), most, log2_table())


def write_shape(n: np.ndarray, alphabet: Alphabet, bits: int, parameters: np.ndarray, peak: bool) -> Choice:
    f = shape_frequencies(n, alphabet.offsets, bits, parameters[None], peak)[0]
    center, slope, bend, height = parameters.tolist()
    head = BitWriter()
    head.bits(bits - MIN_BITS, 3)
    write_alphabet(head, alphabet)
    for number, width in ((center, 9), (slope, 7), (bend, 7), (peak, 1)):
        head.bits(number, width)
    if peak:
        head.bits(int(n.argmax()), 8)
        head.bits(height, 8)
    return Choice(SHAPE, Table(bits, alphabet.symbols, f), head, int(cost_of(n, f, bits)))
