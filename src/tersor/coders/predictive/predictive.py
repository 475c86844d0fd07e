"""Predictive: rANS for dense matrices of codes, with a mean and a scale predicted for each code.

code = mean + scale * noise
mean    linear prediction from earlier columns, fitted to earlier rows (matrix_model.py), as in lossless audio
scale   from the levels of the row and the column; one frequency table for each scale
cost    the levels (about 3 bits for each row and column) and a few tables; the prediction is not stored

Weights are nearly normal, so this is close to the possible gain: 0.1 to 0.4 bits a code below order 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
TRIED = 1 << 19  # codes used to choose the options
PIECE = 1 << 18  # codes counted at a time
FEWEST = 4096  # codes: below, tables and levels cost more than they can save
MOST = 28  # log2 of the largest number of rows or columns
STATES = (8, 16)  # numbers of states: more of them decode faster and cost 2 bytes each
CHOICES = 2 * (1 + len(RIDGES))  # number of Options, which the settings store
ROUNDS = 3  # alternations of fitting the row scales and the column scales
NO_PREDICTION, NO_MOMENTS = np.zeros((0, 0), dtype=np.int16), np.zeros((0, 0))


class Options(NamedTuple):
    """Options of the coder for one matrix."""

    transposed: bool
    ridge: int  # 0: no prediction; else 1 + index into RIDGES


@dataclass(frozen=True, eq=False)
class Fit:
    """The model of one matrix with some options, and the symbols that remain to be coded."""

    options: Options
    rows: np.ndarray  # levels [R] uint8
    columns: np.ndarray  # levels [C] uint8
    symbols: np.ndarray  # [R, C] uint8: code - rounded mean; its sign is flipped if the mean was rounded up
    kinds: np.ndarray  # [R, C] int16: group * FRACTIONS + distance of the mean from the nearest code


def plan_predictive(symbols: np.ndarray, width: int, keep: np.ndarray | None = None) -> bytes | None:
    """The stream, or None if this coder cannot save anything. `width`: columns of the matrix (row-major)."""
    count = len(symbols)
    if keep is not None or count < FEWEST or not fits(count, width):
        return None
    center = center_of(symbols)
    matrix = (symbols - np.uint8(center)).view(np.int8).reshape(-1, width)
    views = [matrix, np.ascontiguousarray(matrix.T)]
    best = min(candidates(views), key=lambda options: estimated_bits(views[options.transposed], options))
    return write(fit(views[best.transposed], best), center)


def fits(count: int, width: int) -> bool:
    """Whether `count` codes make a matrix whose second moments are integers below 2^53, exact in float64."""
    return width >= 2 and count % width == 0 and 2 <= count // width <= 1 << MOST and width <= 1 << MOST


def candidates(views: list[np.ndarray]) -> list[Options]:
    """Options worth trying: a matrix with few rows needs a strong prior."""
    found = [Options(False, 0)]
    for transposed, codes in enumerate(views):
        rows, columns = codes.shape
        if len(matrix_model.update_rows(rows, columns)) > 2:
            found += [Options(bool(transposed), ridge) for ridge in ((2, 3) if rows > columns else (3, 4))]
    return found


def estimated_bits(codes: np.ndarray, options: Options) -> float:
    """Bits a code plus a constant, for normal prediction errors: the mean log2 of their scale. Only the first
    rows of a large matrix are used."""
    codes = codes[: max(BLOCK, TRIED // codes.shape[1])]
    rows, columns = fitted_levels(codes.astype(np.float32))
    if options.ridge:
        mean = predicted_means(codes, rows, RIDGES[options.ridge - 1])
        rows, columns = fitted_levels(codes - mean * np.float32(2.0**-FINE))
    return float(rows.mean(dtype=np.float64) + columns.mean(dtype=np.float64)) / matrix_model.OCTAVE


def center_of(symbols: np.ndarray) -> int:
    """The symbol of code 0: 0 for signed bytes, else the middle of the range of symbols."""
    present = np.flatnonzero(np.bincount(symbols, minlength=256))
    low, high = int(present[0]), int(present[-1])
    return 0 if high - low > 192 or high < 2 else (low + high + 1) // 2


def fit(codes: np.ndarray, options: Options) -> Fit:
    """The model of codes [R, C] int8: levels, fitted again to the errors of a first prediction."""
    rows, columns = fitted_levels(codes.astype(np.float32))
    if options.ridge:
        mean = predicted_means(codes, rows, RIDGES[options.ridge - 1])
        rows, columns = fitted_levels(codes - mean * np.float32(2.0**-FINE))
    return fit_with(codes, options, rows, columns)


def fit_with(codes: np.ndarray, options: Options, rows: np.ndarray, columns: np.ndarray) -> Fit:
    """The model of codes [R, C] int8 with given levels."""
    mean = np.zeros(codes.shape, dtype=np.int16)
    if options.ridge:
        mean = predicted_means(codes, rows, RIDGES[options.ridge - 1])
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
    return Fit(options, rows, columns, symbols, kinds)


def fitted_levels(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels of rows and columns whose scales fit `rest` [R, C] float32. Overwrites `rest`."""
    squares = np.square(rest, out=rest)
    column = np.ones(rest.shape[1], dtype=np.float32)
    row = np.sqrt(squares.mean(1) + 0.02)
    for _ in range(ROUNDS):
        column = np.sqrt((1 / row**2) @ squares / len(row) + 1e-4)
        row = np.sqrt(squares @ (1 / column**2) / len(column) + 0.02)
    relative = np.rint(matrix_model.OCTAVE * np.log2(column)) + MIDDLE
    return matrix_model.level_of(row), np.clip(relative, 0, matrix_model.LEVELS - 1).astype(np.uint8)


def predicted_means(codes: np.ndarray, rows: np.ndarray, ridge: float) -> np.ndarray:
    """Means [R, C] int16 in 1 / 2^FINE codes, as the decoder will compute them."""
    from tersor.coders.predictive import predictive_loops

    inverse, scale = (table[rows] for table in matrix_model.scales())
    mean = np.zeros(codes.shape, dtype=np.int16)
    height, columns = codes.shape
    for begin, end in matrix_model.bands(columns):
        for first, last, lower, total in regressions(height, columns, end - begin, ridge):
            predictive_loops.means(codes, inverse, scale, lower, first, last, begin, end, mean, total)
    return mean


def regressions(
    rows: int, columns: int, width: int, ridge: float
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(first, last, L, moments) for each range of rows with one L, in a band of `width` columns.

    The caller must add the range's rows to the moments, from which the next L is computed. L is empty in the
    first range, and the moments are empty in the last one.
    """
    from tersor.coders.predictive import regression_loops

    total = np.zeros((regression_loops.rounded(width),) * 2)
    for first, last in pairwise(matrix_model.update_rows(rows, columns)):
        lower = regression_loops.learn(total, width, first, ridge) if first else NO_PREDICTION
        yield first, last, lower, total if last < rows else NO_MOMENTS


def fitted_counts(fitted: Fit) -> np.ndarray:
    """Histogram of the symbols of each kind, [GROUPS, FRACTIONS, 256]."""
    counts = np.zeros(GROUPS * FRACTIONS * 256, dtype=np.int64)
    step = max(1, PIECE // fitted.kinds.shape[1])  # rows at a time: numpy converts each element to 8 bytes
    for top in range(0, len(fitted.kinds), step):
        joint = fitted.kinds[top : top + step].astype(np.int32) * 256 + fitted.symbols[top : top + step]
        counts += np.bincount(joint.ravel(), minlength=len(counts))
    return counts.reshape(GROUPS, FRACTIONS, 256)


def write(fitted: Fit, center: int) -> bytes | None:
    """The stream: head, center, levels, tables, states, words. None if its tables are too large."""
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
    options = fitted.options
    head = first_byte(PREDICTIVE, options.transposed + 2 * options.ridge + CHOICES) + bytes([center])
    for levels in (fitted.rows, fitted.columns):
        stream = fewest(levels, histogram(levels))
        head += len(stream).to_bytes(4, "little") + stream
    return head + spec.to_bytes() + states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()


def as_read(matrix: np.ndarray) -> np.ndarray:
    """The elements [R, C] in coding order, [R * C]."""
    found = []
    for begin, end in matrix_model.bands(matrix.shape[1]):
        for first, last in pairwise(matrix_model.update_rows(*matrix.shape)):
            for top in range(first, last, BLOCK):
                found.append(matrix[top : min(top + BLOCK, last), begin:end].T.ravel())
    return np.concatenate(found)


def read_predictive(
    settings: int, data: memoryview, count: int, width: int, keep: np.ndarray | None = None
) -> np.ndarray:
    from tersor.coders.predictive import predictive_loops
    from tersor.coders.rans import wide_loops

    many, choice = divmod(settings, CHOICES)
    transposed, ridge = choice & 1, choice >> 1
    if many >= len(STATES):
        raise FormatError(
            f"coded stream: predictive with settings {settings}, but 0 to {2 * CHOICES - 1} is allowed"
        )
    if keep is not None or not fits(count, width) or len(data) < 2:
        raise FormatError(
            f"coded stream: {len(data)} bytes of predicted codes for {count} codes in rows of {width}"
            f"{'' if keep is None else ' under a mask'}, but the coder needs a matrix of 2 to 2^{MOST} rows "
            "and columns without a mask"
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
        ranges: Iterable[tuple[int, int, np.ndarray, np.ndarray]] = (
            regressions(*shape, end - begin, RIDGES[ridge - 1])
            if ridge
            else [(0, shape[0], NO_PREDICTION, NO_MOMENTS)]
        )
        for first, last, lower, total in ranges:
            used, turn = predictive_loops.decode_rows(
                words, used, states, turn, wide, codes, inverse, scale, rows.astype(np.int16),
                columns.astype(np.int16) - MIDDLE, lower, first, last, begin, end, table_of, slots, total,
            )  # fmt: skip
    if used != len(words) or (states != LOW).any():
        raise FormatError(
            f"coded stream: damaged, or not of {count} symbols: {used} of {len(words)} words were used, or "
            "the final states are not the encoder's initial ones"
        )
    plain = codes.T if transposed else codes
    return np.ascontiguousarray(plain).view(np.uint8).reshape(-1) + np.uint8(data[1])


def read_levels(data: memoryview, at: int, count: int) -> tuple[np.ndarray, int]:
    """(levels [count], index of the byte after them)."""
    size = int.from_bytes(data[at : at + 4], "little")
    at += 4
    if at + size > len(data):
        raise FormatError(f"coded stream: {size} bytes of levels, but only {len(data) - at} bytes are left")
    levels = np.empty(count, dtype=np.uint8)
    read_static(data[at : at + size], levels)
    if levels.max() >= matrix_model.LEVELS:
        raise FormatError(
            f"coded stream: a level of {levels.max()}, but 0 to {matrix_model.LEVELS - 1} is allowed"
        )
    return levels, at + size
