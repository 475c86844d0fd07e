"""Scale tables: the frequency tables of the predictive coder, for each scale of a code around its mean.

common   one distribution for all scales, exp(-slope * n - bend * n^2) at n scales from the mean
own      a separate table for some groups of scales, if that pays: few symbols, or clipped codes

A scale can have several tables, by the distance of the mean from the nearest code. If the mean is
below the nearest code, the table is mirrored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tersor.coders.bit_strings import BitReader, BitWriter
from tersor.coders.predictive.matrix_model import FRACTIONS, GROUPS, MIDDLE, scales
from tersor.coders.rans import tables
from tersor.coders.rans.rans import by_symbol
from tersor.coders.rans.table_plan import UNIT, best_table, cost_of
from tersor.coders.rans.tables import OCTAVES, PAIR, SHAPE_DETAIL, Table, read_table
from tersor.coders.static import order0
from tersor.errors import FormatError

BINS = (1, 2, 4)  # number of own tables of a scale, by the distance of the mean from the nearest code
COMMON = 3  # stored instead of an index into BINS: tables of the common shape
SINGLE = 3  # stored instead of a kind of table: a single symbol
COARSE, MEDIUM = 28, 20  # from these groups on, one or two tables are enough: a scale of 8 codes, of 2 codes
COMMON_BITS = 12  # lowest precision of common tables; 0 to 3 is added
OWN_SLOTS = 1 << 22  # slots of all own tables, at most: a short stream must not allocate more than 32 MB
LISTED = 32  # symbols of an own table, at most: a longer list takes more time to read than it saves
BLENDS = tuple((16 * k, 46 - 3 * k) for k in range(9))  # (slope, bend) from normal to nearly Laplace


class Shape(NamedTuple):
    """The common shape: depths in 1/64 octaves, at 1 scale from the mean."""

    slope: int
    bend: int
    low: int  # symbols are -low .. high
    high: int
    bits: int


@dataclass(frozen=True, eq=False)
class Tables:
    """All tables, and the table of each kind (group * FRACTIONS + distance)."""

    tables: list[Table]
    table_of: np.ndarray  # [GROUPS * FRACTIONS] int16

    def by_symbol(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lookup tables of an encoder: bits [T], frequencies and starts [T * 256]."""
        frequencies, starts = np.concatenate([by_symbol(table) for table in self.tables], axis=1)
        return np.array([table.bits for table in self.tables], dtype=np.int32), frequencies, starts

    def by_slot(self) -> tuple[np.ndarray, np.ndarray]:
        """Lookup tables of a decoder: first slot << 5 | bits, for each kind, and all slots."""
        ends = np.cumsum([0, *(1 << table.bits for table in self.tables)]).tolist()
        slots = np.empty(ends[-1], dtype=np.uint64)
        for table, (begin, end) in zip(self.tables, pairwise(ends), strict=True):
            slots[begin:end] = table.slots()
        found = np.array([at << 5 | table.bits for at, table in zip(ends, self.tables, strict=False)])
        return found.astype(np.uint32)[self.table_of], slots


@functools.cache
def bin_of(bins: int) -> np.ndarray:
    """The bin of each distance 0 .. 8, out of `bins`: [FRACTIONS]."""
    return np.minimum(np.arange(FRACTIONS) * bins // (FRACTIONS - 1), bins - 1)


def bins_for(group: int) -> int:
    """Number of tables of the common shape for a group."""
    return 1 if group >= COARSE else 2 if group >= MEDIUM else 4


def pools_of(counts: np.ndarray, bins: int) -> np.ndarray:
    """Sum counts [FRACTIONS, 256] over each bin: [bins, 256]."""
    return np.stack([counts[bin_of(bins) == b].sum(0) for b in range(bins)])


@functools.cache
def centers(bins: int) -> np.ndarray:
    """The mean distance in each bin, in 1/16 codes, [bins]."""
    return np.array([int(np.flatnonzero(bin_of(bins) == b).mean()) for b in range(bins)])


def frequencies_of(shape: Shape, groups: Sequence[int]) -> np.ndarray:
    """Frequencies [T, low + 1 + high] of the symbols -low .. high, for each bin of each group."""
    center = np.concatenate([centers(bins_for(group)) for group in groups])  # [T]
    inverse = np.repeat(scales()[0][2 * np.array(groups)].astype(np.int64), [bins_for(g) for g in groups])
    away = abs(16 * np.arange(-shape.low, shape.high + 1) - center[:, None])  # 1/16 codes
    n = (away * inverse[:, None]) >> 12  # 1/256 scales
    depths = (shape.slope * n + ((shape.bend * n * n) >> 8)) >> 8
    return tables.frequencies(np.minimum(depths, OCTAVES << SHAPE_DETAIL), SHAPE_DETAIL, shape.bits)


def spanned(rows: np.ndarray, columns: np.ndarray) -> range:
    """The range of groups that these levels of rows and columns can give."""
    low, high = ((int(end(rows)) + int(end(columns)) - MIDDLE) >> 1 for end in (np.min, np.max))
    return range(min(max(low, 0), GROUPS - 1), min(max(high, 0), GROUPS - 1) + 1)


def common_pools(counts: np.ndarray, groups: list[int]) -> np.ndarray:
    """Counts [T, 256] for the common tables, for each bin of each group."""
    return np.concatenate([pools_of(counts[group], bins_for(group)) for group in groups])


def common_cost(pools: np.ndarray, shape: Shape, groups: list[int]) -> np.ndarray:
    """Bits of each group with common tables, [len(groups)], from pooled counts [T, 256]."""
    inside = np.arange(-shape.low, shape.high + 1) & 255
    bits = cost_of(pools[:, inside], frequencies_of(shape, groups), shape.bits) / UNIT  # [T]
    first = np.cumsum([0, *(bins_for(group) for group in groups)])[:-1]
    return np.add.reduceat(bits, first)


def best_shape(pools: np.ndarray, groups: list[int]) -> Shape:
    """The common shape for counts [T, 256]: the best blend of normal and Laplace, then a local search."""
    present = np.flatnonzero(pools.sum(0))
    signed = np.where(present < 128, present, present - 256)
    low, high = max(0, -int(signed.min())), max(0, int(signed.max()))

    def cost(slope: int, bend: int, bits: int = 15) -> float:
        return float(common_cost(pools, Shape(slope, bend, low, high, bits), groups).sum())

    best = min(BLENDS, key=lambda blend: cost(*blend))
    for stride in (6, 2, 1):
        near = [
            (best[0] + stride * a, best[1] + stride * b)
            for a in (0, -1, 1) for b in (0, -1, 1)
            if 0 <= best[0] + stride * a < 256 and 0 <= best[1] + stride * b < 256
        ]  # fmt: skip
        best = min(near, key=lambda blend: cost(*blend))
    costs = {bits: cost(*best, bits) for bits in range(COMMON_BITS, COMMON_BITS + 4)}
    bits = min(bits for bits, c in costs.items() if c <= 1.0005 * min(costs.values()))
    return Shape(*best, low, high, bits)


def own_cost(group: np.ndarray) -> tuple[float, int]:
    """(bits, bins) of counts [FRACTIONS, 256] with own tables; infinite for too many symbols."""
    return min((sum(map(pool_cost, pools_of(group, bins))), bins) for bins in BINS)


def pool_cost(counts: np.ndarray) -> float:
    """Approximate bits of the symbols and of their table."""
    n = counts[counts > 0]
    if len(n) < 2:
        return 12.0
    if len(n) > LISTED:
        return float("inf")
    return order0(n) + 16.0 + 4.0 * len(n)


class TableRun(NamedTuple):
    """Neighboring groups that share their tables."""

    groups: int
    bins: int  # 1, 2 or 4 own tables; 0: common tables
    counts: np.ndarray  # [FRACTIONS, 256], summed over the groups
    cost: float


def runs_of(counts: np.ndarray, common: dict[int, float]) -> list[TableRun]:
    """All groups in runs, merged as long as that saves bits. `common`: bits with common tables, by group."""
    runs: list[TableRun] = []
    done = 0
    for group, shared in common.items():
        size = group + 1 - done  # groups without codes cost nothing: they join the next group
        done = group + 1
        own, bins = own_cost(counts[group])
        here = TableRun(size, 0, counts[group], shared)
        if own < shared:
            here = TableRun(size, bins, counts[group], own)
        while runs:
            both = runs[-1].counts + here.counts
            if not runs[-1].bins and not here.bins:
                here = TableRun(runs[-1].groups + here.groups, 0, both, runs[-1].cost + here.cost)
            else:
                own, bins = own_cost(both)
                if own > runs[-1].cost + here.cost:
                    break
                here = TableRun(runs[-1].groups + here.groups, bins, both, own)
            runs.pop()
        runs.append(here)
    runs[-1] = runs[-1]._replace(groups=runs[-1].groups + GROUPS - done)
    return runs


def plan_tables(spec: BitWriter, counts: np.ndarray, span: range) -> Tables | None:
    """Choose tables for counts [GROUPS, FRACTIONS, 256] and write them to `spec`. None if they exceed the
    reader's limit. span: the groups that can occur."""
    groups = np.flatnonzero(counts.any((1, 2))).tolist()
    pools = common_pools(counts, groups)
    shape = best_shape(pools, groups)
    runs = runs_of(counts, dict(zip(groups, common_cost(pools, shape, groups).tolist(), strict=True)))
    is_common = any(not run.bins for run in runs)
    spec.bits(is_common, 1)
    if is_common:
        write_shape(spec, shape)
    found: list[Table] = []
    table_of, at, slots = np.zeros((GROUPS, FRACTIONS), dtype=np.int16), 0, 0
    for run in runs:
        spec.golomb(run.groups - 1)
        spec.bits(BINS.index(run.bins) if run.bins else COMMON, 2)
        if run.bins:
            table_of[at : at + run.groups] = len(found) + bin_of(run.bins)
            found += (own := [write_table(spec, pool) for pool in pools_of(run.counts, run.bins)])
            slots += slots_in(own)
        else:
            add_common(found, table_of, shape, within(span, at, at + run.groups))
        at += run.groups
    return Tables(found, table_of.reshape(-1)) if slots <= OWN_SLOTS else None


def slots_in(tables: list[Table]) -> int:
    return sum(1 << table.bits for table in tables)


def within(span: range, begin: int, end: int) -> range:
    return range(max(begin, span.start), min(end, span.stop))


def add_common(found: list[Table], table_of: np.ndarray, shape: Shape, groups: range) -> None:
    """Append the common tables of these groups."""
    if not groups:
        return
    symbols = (np.arange(-shape.low, shape.high + 1) & 255).astype(np.uint8)
    at = len(found)
    found += [Table(shape.bits, symbols, row) for row in frequencies_of(shape, groups)]
    for group in groups:
        table_of[group] = at + bin_of(bins_for(group))
        at += bins_for(group)


def write_shape(spec: BitWriter, shape: Shape) -> None:
    for number in (shape.slope, shape.bend, shape.low, shape.high):
        spec.bits(number, 8)
    spec.bits(shape.bits - COMMON_BITS, 2)


def write_table(spec: BitWriter, pool: np.ndarray) -> Table:
    present = np.flatnonzero(pool)
    if len(present) < 2:
        symbol = int(present[0]) if len(present) else 0
        spec.bits(SINGLE, 2)
        spec.bits(symbol, 8)
        return single(symbol)
    choice = best_table(pool)
    spec.bits(choice.kind, 2)
    spec.bits(choice.head.value, choice.head.length)
    return choice.table


def single(symbol: int) -> Table:
    return Table(0, np.array([symbol], dtype=np.uint8), np.array([1]))


def read_tables(data: memoryview, at: int, span: range) -> tuple[Tables, int]:
    """(the tables, index of the byte after them)."""
    source = BitReader(data, at)
    shape = read_shape(source) if source.bits(1) else None
    found: list[Table] = []
    table_of = np.zeros((GROUPS, FRACTIONS), dtype=np.int16)
    group = slots = 0
    while group < GROUPS:
        size, code = source.golomb() + 1, source.bits(2)
        if group + size > GROUPS:
            raise FormatError(f"coded stream: tables for {group + size} groups, but there are {GROUPS}")
        if code == COMMON and shape is None:
            raise FormatError("coded stream: it uses common tables, but their shape is missing")
        if code == COMMON and shape is not None:
            add_common(found, table_of, shape, within(span, group, group + size))
        else:
            table_of[group : group + size] = len(found) + bin_of(BINS[code])
            found += (own := [read_own(source) for _ in range(BINS[code])])
            slots += slots_in(own)
            if slots > OWN_SLOTS:
                raise FormatError(
                    f"coded stream: own tables of {slots} slots, but at most {OWN_SLOTS} is allowed"
                )
        group += size
    return Tables(found, table_of.reshape(-1)), source.byte_end()


def read_shape(source: BitReader) -> Shape:
    slope, bend, low, high = (source.bits(8) for _ in range(4))
    if low > 128 or high > 127:
        raise FormatError(f"coded stream: symbols from -{low} to {high}, but -128 to 127 is allowed")
    return Shape(slope, bend, low, high, COMMON_BITS + source.bits(2))


def read_own(source: BitReader) -> Table:
    kind = source.bits(2)
    if kind == SINGLE:
        return single(source.bits(8))
    if kind > PAIR:
        raise FormatError(f"coded stream: a table of kind {kind}, but 0 to {PAIR} is allowed")
    return read_table(source, kind)
