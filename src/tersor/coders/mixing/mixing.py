"""Mixing: context mixing with a binary arithmetic coder, for masks and matrices of small, sparse codes.

A code becomes binary decisions: is it zero, its sign, its magnitude bit by bit. The probability of each bit
is mixed from several contexts (logistic mixing, Mahoney 2005; contexts as in CABAC, Marpe 2003, and
DeepCABAC, Wiedemann 2019): neighbors to the left, above and at a lag, statistics of the row and the column so
far, and a prediction from similar earlier rows.

cost   5 bytes, and the adaptation of the contexts; there is no table, which suits small leaves
time   0.2 us for a zero, 0.5 to 1 us for any other code, to encode or decode
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tersor.coders.mixing.logistic import adaptation_rates, logistic_tables
from tersor.coders.plan import first_byte
from tersor.errors import FormatError

MIXING = 5
HEAD = 5  # bytes before the arithmetic code
LAGS = 64  # largest lag tried: columns at a lag can be neighbors, as in rows of an image or taps of a kernel
SAMPLE = 1 << 18  # codes used to choose the options
TRANSPOSED, TREE, ZEROS = 1, 2, 4  # bits of the settings
RATE, RATES = 2, (0, 1, 3)  # learning rates: the first one tried, and the others; noise needs the slowest
SMALL = 1 << 15  # codes: below, the learning rate matters more, and all rates are tried
SIGNED = 192  # a larger range of symbols means signed bytes


class Options(NamedTuple):
    """Options of the coder for one matrix."""

    transposed: bool
    tree: bool  # magnitudes as 7 bits; else in unary
    rate: int  # learning rate of the mixer, 0 to 3
    lags: tuple[int, int]  # columns; 0 for none


class Signs(NamedTuple):
    """Mapping from symbols to signed values: one symbol is zero, symbols below the pivot are negative."""

    zero: int | None
    pivot: int

    def values(self, symbols: np.ndarray) -> np.ndarray:
        """Symbols uint8 [N] -> int8 [N]."""
        if self.zero == self.pivot:
            return (symbols - np.uint8(self.pivot)).view(np.int8)
        step = symbols.astype(np.int16) - self.pivot
        step += step >= 0
        if self.zero is not None:
            step[symbols == self.zero] = 0
        return step.astype(np.int8)

    def symbols(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `values`."""
        if self.zero == self.pivot:
            return values.view(np.uint8) + np.uint8(self.pivot)
        step = values.astype(np.int16)
        step = step - (step > 0) + self.pivot
        if self.zero is not None:
            step[values == 0] = self.zero
        return step.astype(np.uint8)


def plan_mixing(symbols: np.ndarray, width: int, keep: np.ndarray | None = None) -> bytes:
    """The stream of symbols uint8 [N]: all or the kept elements of a matrix with `width` columns."""
    signs = signs_of(symbols)
    values = signs.values(symbols)
    part, part_width, part_keep = sample(values, width, keep, SAMPLE)
    best, stream = shortest(
        candidates(laid_out(part, part_width, part_keep), part), part, part_width, part_keep, signs
    )
    others = [best._replace(rate=rate) for rate in (RATES if len(values) < SMALL else RATES[:1])]
    other, shorter = shortest(others, part, part_width, part_keep, signs)
    if len(shorter) < len(stream):
        best, stream = other, shorter
    return stream if part is values else write(values, width, keep, best, signs)


def usual_mixing(symbols: np.ndarray, width: int, keep: np.ndarray | None) -> bytes:
    """The stream with the options that suit most matrices of dense codes: within 0.6 % of the best ones."""
    signs = signs_of(symbols)
    values = signs.values(symbols)
    options = Options(False, True, RATE, best_lags(laid_out(values, width, keep)))
    return write(values, width, keep, options, signs)


def shortest(
    tried: list[Options], values: np.ndarray, width: int, keep: np.ndarray | None, signs: Signs
) -> tuple[Options, bytes]:
    """The options with the shortest stream, and this stream. On a tie, the first ones."""
    streams = [(options, write(values, width, keep, options, signs)) for options in tried]
    return min(streams, key=lambda found: len(found[1]))


def sample(
    values: np.ndarray, width: int, keep: np.ndarray | None, most: int
) -> tuple[np.ndarray, int, np.ndarray | None]:
    """(codes, width, mask) of the first rows, or of a part of the first row, with about `most` codes."""
    if len(values) <= most:
        return values, width, keep
    if keep is None:
        width = min(width, most)
        return values[: most // width * width], width, None
    size = 1 + int(np.flatnonzero(keep)[most - 1])
    width = min(width, size)
    kept = keep.reshape(-1)[: -(-size // width) * width]
    return values[: int(kept.sum())], width, kept


def rows_from(
    values: np.ndarray, width: int, keep: np.ndarray | None, quarter: int
) -> tuple[np.ndarray, int, np.ndarray | None]:
    """(codes, width, mask) of the rows from this quarter on: 0 to 3."""
    size = len(values) if keep is None else keep.size
    begin = quarter * (size // width) // 4 * width
    if keep is None:
        return values[begin:], width, None
    kept = keep.reshape(-1)
    return values[int(kept[:begin].sum()) :], width, kept[begin:]


def signs_of(symbols: np.ndarray) -> Signs:
    """Choose the mapping: the most frequent symbol is zero if it is a quarter of all, and the pivot is the
    median of the others.

    Symbols that look like signed bytes, or whose range is too wide for a pivot, keep their cyclic order
    around zero.
    """
    counts = np.bincount(symbols, minlength=256)
    present = np.flatnonzero(counts)
    low, high = int(present[0]), int(present[-1])
    if high - low > SIGNED or len(present) <= 2:
        zero = 0 if counts[0] else int(counts.argmax())
        return Signs(zero, zero)
    zero = int(counts.argmax())
    rest = counts.copy()
    is_zero = 4 * counts[zero] >= len(symbols)
    if is_zero:
        rest[zero] = 0
    pivot = int(np.searchsorted(rest.cumsum(), rest.sum() / 2))
    if (is_zero and low < zero < high) or pivot - low > 128 or high - pivot > 126:
        return Signs(zero, zero)
    return Signs(zero if is_zero else None, pivot)


def laid_out(values: np.ndarray, width: int, keep: np.ndarray | None) -> np.ndarray:
    """The matrix [R, width] int8, with zeros where the mask is False."""
    if keep is None:
        return values.reshape(-1, width)
    matrix = np.zeros(keep.size, dtype=np.int8)
    matrix[keep.reshape(-1)] = values
    return matrix.reshape(-1, width)


def candidates(matrix: np.ndarray, values: np.ndarray) -> list[Options]:
    """Options worth trying."""
    sizes = abs(values.astype(np.int16))
    trees = (False,) if sizes.max() <= 2 else (True,) if sizes.mean() > 24 else (False, True)
    found = []
    for transposed in (False, True) if min(matrix.shape) > 1 else (False,):
        lags = best_lags(matrix.T if transposed else matrix)
        found += [Options(transposed, tree, RATE, lags) for tree in trees]
    return found


def best_lags(matrix: np.ndarray) -> tuple[int, int]:
    """The two lags in columns, 2 to LAGS, with the highest correlation of codes; 0 if none is positive."""
    from tersor.coders.mixing import lags_loops

    rows = max(1, SAMPLE // matrix.shape[1])
    scores = np.zeros(max(2, min(LAGS, matrix.shape[1] - 1) + 1))
    lags_loops.lag_scores(np.ascontiguousarray(np.sign(matrix[:rows])), scores)
    first = int(scores.argmax())
    if scores[first] <= 0:
        return 0, 0
    scores[first] = 0
    second = int(scores.argmax())
    return first, second if scores[second] > 0 else 0


def write(values: np.ndarray, width: int, keep: np.ndarray | None, options: Options, signs: Signs) -> bytes:
    from tersor.coders.mixing import mixing_loops

    matrix, kept = arranged(laid_out(values, width, keep), keep, options.transposed)
    zeros = signs.zero is not None
    data = np.zeros(2 * len(values) + 64, dtype=np.uint8)
    tables = (*logistic_tables(), *adaptation_rates(options.rate))
    used = mixing_loops.mix(matrix, kept, data, *options.lags, options.tree, zeros, False, *tables)
    if used > len(data):  # a confident wrong prediction may cost 2 bytes a bit
        data = np.zeros(used, dtype=np.uint8)
        mixing_loops.mix(matrix, kept, data, *options.lags, options.tree, zeros, False, *tables)
    settings = options.transposed * TRANSPOSED | options.tree * TREE | zeros * ZEROS | options.rate << 3
    head = bytes([signs.zero or 0, signs.pivot, *options.lags])
    return first_byte(MIXING, settings) + head + data[:used].tobytes()


def arranged(matrix: np.ndarray, keep: np.ndarray | None, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and mask in scan order. The mask is [0, 0] if all elements are kept."""
    kept = np.zeros((0, 0), dtype=np.uint8) if keep is None else keep.reshape(matrix.shape).view(np.uint8)
    if transposed:
        matrix, kept = matrix.T, kept.T
    return np.ascontiguousarray(matrix), np.ascontiguousarray(kept)


def read_mixing(
    settings: int, data: memoryview, count: int, width: int, keep: np.ndarray | None = None
) -> np.ndarray:
    from tersor.coders.mixing import mixing_loops

    total = count if keep is None else keep.size
    if len(data) < HEAD or total % width:
        raise FormatError(
            f"coded stream: {len(data)} bytes of mixing are no matrix of {total} elements in rows of {width}"
        )
    transposed, tree, zeros = bool(settings & TRANSPOSED), bool(settings & TREE), bool(settings & ZEROS)
    signs = Signs(data[1] if zeros else None, data[2])
    matrix, kept = arranged(np.zeros((total // width, width), dtype=np.int8), keep, transposed)
    body = np.frombuffer(data, np.uint8, offset=HEAD).copy()
    tables = (*logistic_tables(), *adaptation_rates(settings >> 3))
    used = mixing_loops.mix(matrix, kept, body, data[3], data[4], tree, zeros, True, *tables)
    if used != len(body):
        raise FormatError(
            f"coded stream: damaged, or not of {count} symbols: its {len(body)} bytes of arithmetic code do "
            "not end with the last symbol"
        )
    plain = np.ascontiguousarray(matrix.T if transposed else matrix).reshape(-1)
    return signs.symbols(plain if keep is None else plain[keep.reshape(-1)])
