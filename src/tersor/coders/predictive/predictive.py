"""Predictive: rANS for matrices of codes, each code told by its row, its column and the codes before it.

code = mean + scale * noise      the mean by linear prediction from earlier columns (as in lossless audio, but
    learned from earlier rows: grid.py), the scale from levels of row and column; one table for each spread
Costs the levels (about 3 bits a row and a column) and a few tables; nothing of the prediction is stored.
Weights are near to normal, so this is near to what there is to gain: 0.1 to 0.4 bits a code below order 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tersor.coders.bit_strings import BitWriter
from tersor.coders.plan import first_byte
from tersor.coders.predictive import matrix_model
from tersor.coders.predictive.matrix_model import BLOCK, FINE, FRACTIONS, GROUPS, MIDDLE, RIDGES
from tersor.coders.predictive.scale_tables import plan_tables, read_tables, spanned
from tersor.coders.rans.rans import LOW, read_states
from tersor.coders.static import fewest, histogram, read_static
from tersor.errors import FormatError

PREDICTIVE = 4
TRIED = 1 << 19  # codes that tell which way of looking is best
PIECE = 1 << 18  # codes counted at a time
FEWEST = 4096  # codes: below, tables and levels cost more than they can save
MOST = 28  # rows and columns, as a power of two
STATES = (8, 16)  # how many there may be; more are sooner read, and 2 bytes each
WAYS = 2 * (1 + len(RIDGES))  # ways to look at a matrix, as the settings tell them
ROUNDS = 3  # of fitting rows to columns and columns to rows
NO_LESSON, NO_MOMENTS = np.zeros((0, 0), dtype=np.int16), np.zeros((0, 0))


class Way(NamedTuple):
    """How a matrix is looked at."""

    transposed: bool
    ridge: int  # 0: nothing is foreseen; else 1 + index of RIDGES


@dataclass(frozen=True, eq=False)
class Fit:
    """One way of looking at a matrix, fitted."""

    way: Way
    rows: np.ndarray  # levels [R] uint8
    columns: np.ndarray  # levels [C] uint8
    symbols: np.ndarray  # [R, C] uint8: distance from the mean, away from it
    kinds: np.ndarray  # [R, C] int16: group * FRACTIONS + distance of the mean from the nearest code


def plan_predictive(symbols: np.ndarray, width: int, keep: np.ndarray | None = None) -> bytes | None:
    """The stream, or None where this coder cannot gain. `width`: columns of the matrix in row-major order."""
    count = len(symbols)
    if keep is not None or count < FEWEST or not fits(count, width):
        return None
    center = middle(symbols)
    matrix = (symbols - np.uint8(center)).view(np.int8).reshape(-1, width)
    views = [matrix, np.ascontiguousarray(matrix.T)]
    way = min(ways(views), key=lambda way: guess(views[way.transposed], way))
    return write(fit(views[way.transposed], way), center)


def fits(count: int, width: int) -> bool:
    """Whether so many codes are a matrix whose second moments are whole numbers that a double holds."""
    return width >= 2 and count % width == 0 and 2 <= count // width <= 1 << MOST and width <= 1 << MOST


def ways(views: list[np.ndarray]) -> list[Way]:
    """What is worth a try: few rows need a strong prior."""
    found = [Way(False, 0)]
    for transposed, codes in enumerate(views):
        rows, columns = codes.shape
        if len(matrix_model.lessons(rows, columns)) > 2:
            found += [Way(bool(transposed), ridge) for ridge in ((2, 3) if rows > columns else (3, 4))]
    return found


def guess(codes: np.ndarray, way: Way) -> float:
    """Bits a code, but for a constant, if what is left were normal: the mean log2 of its spread. Of a large
    matrix the first rows tell."""
    codes = codes[: max(BLOCK, TRIED // codes.shape[1])]
    rows, columns = spreads(codes.astype(np.float32))
    if way.ridge:
        mean = foreseen(codes, rows, RIDGES[way.ridge - 1])
        rows, columns = spreads(codes - mean * np.float32(2.0**-FINE))
    return float(rows.mean(dtype=np.float64) + columns.mean(dtype=np.float64)) / matrix_model.OCTAVE


def middle(symbols: np.ndarray) -> int:
    """What stands for zero: 0 where bytes are signed numbers, else the middle of those that occur."""
    present = np.flatnonzero(np.bincount(symbols, minlength=256))
    low, high = int(present[0]), int(present[-1])
    return 0 if high - low > 192 or high < 2 else (low + high + 1) // 2


def fit(codes: np.ndarray, way: Way) -> Fit:
    """Levels for codes [R, C] int8, found again after a first prediction, and what they leave to code."""
    rows, columns = spreads(codes.astype(np.float32))
    if way.ridge:
        mean = foreseen(codes, rows, RIDGES[way.ridge - 1])
        rows, columns = spreads(codes - mean * np.float32(2.0**-FINE))
    return fit_levels(codes, way, rows, columns)


def fit_levels(codes: np.ndarray, way: Way, rows: np.ndarray, columns: np.ndarray) -> Fit:
    """What is left to code of codes [R, C] int8 with these levels."""
    mean = np.zeros(codes.shape, dtype=np.int16)
    if way.ridge:
        mean = foreseen(codes, rows, RIDGES[way.ridge - 1])
    symbols, kinds = np.empty(codes.shape, dtype=np.uint8), np.empty(codes.shape, dtype=np.int16)
    step = max(1, PIECE // codes.shape[1])
    for top in range(0, len(codes), step):
        part = slice(top, top + step)
        whole = (mean[part].astype(np.int32) + (1 << FINE - 1)) >> FINE
        off = mean[part] - (whole << FINE)  # [R, C], -8 to 7
        away = codes[part] - whole
        symbols[part] = np.where(off < 0, -away, away)
        group = np.clip((rows[part, None].astype(np.int16) + columns - MIDDLE) >> 1, 0, GROUPS - 1)
        kinds[part] = group * FRACTIONS + abs(off)
    return Fit(way, rows, columns, symbols, kinds)


def spreads(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels of rows and columns whose product fits the sizes of `rest` [R, C], float32 and written over."""
    squares = np.square(rest, out=rest)
    column = np.ones(rest.shape[1], dtype=np.float32)
    row = np.sqrt(squares.mean(1) + 0.02)
    for _ in range(ROUNDS):
        column = np.sqrt((1 / row**2) @ squares / len(row) + 1e-4)
        row = np.sqrt(squares @ (1 / column**2) / len(column) + 0.02)
    relative = np.rint(matrix_model.OCTAVE * np.log2(column)) + MIDDLE
    return matrix_model.level_of(row), np.clip(relative, 0, matrix_model.LEVELS - 1).astype(np.uint8)


def foreseen(codes: np.ndarray, rows: np.ndarray, ridge: float) -> np.ndarray:
    """Means [R, C] int16 as the decoder will know them."""
    from tersor.coders.predictive import predictive_loops

    inverse, scale = (table[rows] for table in matrix_model.scales())
    mean = np.zeros(codes.shape, dtype=np.int16)
    height, columns = codes.shape
    for begin, end in matrix_model.bands(columns):
        for first, last, lower, total in taught(height, columns, end - begin, ridge):
            predictive_loops.means(codes, inverse, scale, lower, first, last, begin, end, mean, total)
    return mean


def taught(
    rows: int, columns: int, width: int, ridge: float
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(first, last, L, moments) of the rows between two lessons of a band of `width` columns: L has no rows
    before the first lesson, the moments none where no lesson is to come. Whoever takes them adds to these.
    """
    from tersor.coders.predictive import regression_loops

    total = np.zeros((regression_loops.rounded(width),) * 2)
    for first, last in pairwise(matrix_model.lessons(rows, columns)):
        lower = regression_loops.learn(total, width, first, ridge) if first else NO_LESSON
        yield first, last, lower, total if last < rows else NO_MOMENTS


def fitted_counts(fitted: Fit) -> np.ndarray:
    """How often each symbol occurs with each kind, [GROUPS, FRACTIONS, 256]."""
    counts = np.zeros(GROUPS * FRACTIONS * 256, dtype=np.int64)
    step = max(1, PIECE // fitted.kinds.shape[1])  # rows: numpy counts in 8 bytes each
    for top in range(0, len(fitted.kinds), step):
        joint = fitted.kinds[top : top + step].astype(np.int32) * 256 + fitted.symbols[top : top + step]
        counts += np.bincount(joint.ravel(), minlength=len(counts))
    return counts.reshape(GROUPS, FRACTIONS, 256)


def write(fitted: Fit, center: int) -> bytes | None:
    """The stream: head, center, levels, tables, states, words; None if its tables are too many to read."""
    from tersor.coders.predictive import predictive_loops

    spec = BitWriter()
    tables = plan_tables(spec, fitted_counts(fitted), spanned(fitted.rows, fitted.columns))
    if tables is None:
        return None
    shifts, frequencies, starts = tables.by_symbol()
    symbols = as_read(fitted.symbols)
    used = tables.table_of[as_read(fitted.kinds)]
    states = np.full(STATES[1], LOW, dtype=np.uint64)
    words = np.empty(len(symbols), dtype=np.uint16)
    first = predictive_loops.encode_tables(symbols, used, shifts, frequencies, starts, states, words)
    head = first_byte(PREDICTIVE, fitted.way.transposed + 2 * fitted.way.ridge + WAYS) + bytes([center])
    for levels in (fitted.rows, fitted.columns):
        stream = fewest(levels, histogram(levels))
        head += len(stream).to_bytes(4, "little") + stream
    return head + spec.to_bytes() + states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()


def as_read(matrix: np.ndarray) -> np.ndarray:
    """The elements [R, C] in the order in which they are coded, [R * C]."""
    found = []
    for begin, end in matrix_model.bands(matrix.shape[1]):
        for first, last in pairwise(matrix_model.lessons(*matrix.shape)):
            for top in range(first, last, BLOCK):
                found.append(matrix[top : min(top + BLOCK, last), begin:end].T.ravel())
    return np.concatenate(found)


def read_predictive(
    settings: int, data: memoryview, count: int, width: int, keep: np.ndarray | None = None
) -> np.ndarray:
    from tersor.coders.predictive import predictive_loops
    from tersor.coders.rans import wide_loops

    many, way = divmod(settings, WAYS)
    transposed, ridge = way & 1, way >> 1
    if many >= len(STATES):
        raise FormatError(
            f"coded stream: predictive with settings {settings}; 0 to {2 * WAYS - 1} are defined"
        )
    if keep is not None or not fits(count, width) or len(data) < 2:
        raise FormatError(
            f"coded stream: {len(data)} bytes of predicted codes for {count} codes in rows of {width}"
            f"{'' if keep is None else ' under a mask'}; it takes whole matrices of 2 to 2^{MOST} rows and "
            "columns"
        )
    shape = (width, count // width) if transposed else (count // width, width)
    rows, at = read_levels(data, 2, shape[0])
    columns, at = read_levels(data, at, shape[1])
    tables, at = read_tables(data, at, spanned(rows, columns))
    table_of, slots = tables.by_slot()
    states, at = read_states(data, at, STATES[many])
    states, wide = states.astype(np.uint32), int(len(states) >= wide_loops.LANES)
    if (len(data) - at) % 2:
        raise FormatError("coded stream: it ends inside a word")
    words = np.frombuffer(data, "<u2", offset=at)
    inverse, scale = (table[rows] for table in matrix_model.scales())
    codes = np.zeros(shape, dtype=np.int8)
    used = turn = 0
    for begin, end in matrix_model.bands(shape[1]):
        whole = [(0, shape[0], NO_LESSON, NO_MOMENTS)]
        for first, last, lower, total in taught(*shape, end - begin, RIDGES[ridge - 1]) if ridge else whole:
            used, turn = predictive_loops.decode_rows(
                words, used, states, turn, wide, codes, inverse, scale, rows.astype(np.int16),
                columns.astype(np.int16) - MIDDLE, lower, first, last, begin, end, table_of, slots, total,
            )  # fmt: skip
    if used != len(words) or (states != LOW).any():
        raise FormatError(
            f"coded stream: damaged, or not of {count} symbols: {used} of {len(words)} words were used, "
            "and the states are not those that every encoder begins with"
        )
    plain = codes.T if transposed else codes
    return np.ascontiguousarray(plain).view(np.uint8).reshape(-1) + np.uint8(data[1])


def read_levels(data: memoryview, at: int, count: int) -> tuple[np.ndarray, int]:
    """The levels [count] and where they end."""
    size = int.from_bytes(data[at : at + 4], "little")
    at += 4
    if at + size > len(data):
        raise FormatError(f"coded stream: {size} bytes of levels, but {len(data) - at} are left")
    levels = np.empty(count, dtype=np.uint8)
    read_static(data[at : at + size], levels)
    if levels.max() >= matrix_model.LEVELS:
        raise FormatError(
            f"coded stream: a level of {levels.max()}, but {matrix_model.LEVELS - 1} is the highest"
        )
    return levels, at + size
