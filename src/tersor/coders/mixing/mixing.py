"""Mixing: binary arithmetic coding with mixed contexts, for matrices of small and sparse codes and for masks.

code = is it zero? its sign, its size bit by bit      the chance of a bit is mixed from contexts, each with
    a rate of its own (logistic mixing, Mahoney 2005; contexts as in CABAC, Marpe 2003, and DeepCABAC,
    Wiedemann 2019): neighbors to the left, above and a lag away, row and column so far, and votes of the
    rows above that were like this one
Costs 5 bytes and what is learned on the way: there is no table, so small leaves pay little.
Time: 0.2 us a zero, 0.5 to 1 us any other code, to write or to read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tersor.coders.mixing.logistic import adaptation_rates, logistic_tables
from tersor.coders.plan import first_byte
from tersor.errors import FormatError

MIXING = 5
HEAD = 5  # bytes before the arithmetic code
LAGS = 64  # tried, at most; columns a lag away are neighbors too: rows of an image, taps of a kernel
SAMPLE = 1 << 18  # codes looked at to choose a way
TRANSPOSED, TREE, ZEROS = 1, 2, 4  # settings
RATE, RATES = 2, (0, 1, 3)  # how fast the mixer learns: tried first, and then; noise wants the slowest
SMALL = 1 << 15  # codes: with so few it matters, and all rates are tried
SIGNED = 192  # symbols farther apart than this are signed numbers


class Way(NamedTuple):
    """How a matrix is looked at."""

    transposed: bool
    tree: bool  # sizes as 7 bits, not one by one
    rate: int  # 0 to 3: how fast the mixer learns
    lags: tuple[int, int]  # columns; 0 for none


class Signs(NamedTuple):
    """What symbols stand for: one for zero, those below a pivot for negative numbers, the rest positive."""

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
    """The stream of symbols uint8 [N]: a matrix with rows of `width`, or what `keep` keeps of it."""
    signs = signs_of(symbols)
    values = signs.values(symbols)
    part, part_width, part_keep = sample(values, width, keep, SAMPLE)
    best, stream = shortest(
        ways(laid_out(part, part_width, part_keep), part), part, part_width, part_keep, signs
    )
    others = [best._replace(rate=rate) for rate in (RATES if len(values) < SMALL else RATES[:1])]
    other, shorter = shortest(others, part, part_width, part_keep, signs)
    if len(shorter) < len(stream):
        best, stream = other, shorter
    return stream if part is values else write(values, width, keep, best, signs)


def shortest(
    tried: list[Way], values: np.ndarray, width: int, keep: np.ndarray | None, signs: Signs
) -> tuple[Way, bytes]:
    """The way of the fewest bytes, the first of them, and its stream."""
    streams = [(way, write(values, width, keep, way, signs)) for way in tried]
    return min(streams, key=lambda found: len(found[1]))


def sample(
    values: np.ndarray, width: int, keep: np.ndarray | None, most: int
) -> tuple[np.ndarray, int, np.ndarray | None]:
    """The first rows, or a part of the first, with about `most` codes, their width and mask."""
    if len(values) <= most:
        return values, width, keep
    if keep is None:
        width = min(width, most)
        return values[: most // width * width], width, None
    size = 1 + int(np.flatnonzero(keep)[most - 1])
    width = min(width, size)
    kept = keep.reshape(-1)[: -(-size // width) * width]
    return values[: int(kept.sum())], width, kept


def signs_of(symbols: np.ndarray) -> Signs:
    """The most frequent symbol is zero, if it is frequent, and half of the others are negative.

    Symbols that look like signed bytes, or are too far apart for a pivot, stay in their order around zero.
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
    """The matrix [R, width] int8, zero where nothing is kept."""
    if keep is None:
        return values.reshape(-1, width)
    matrix = np.zeros(keep.size, dtype=np.int8)
    matrix[keep.reshape(-1)] = values
    return matrix.reshape(-1, width)


def ways(matrix: np.ndarray, values: np.ndarray) -> list[Way]:
    """What is worth a try."""
    sizes = abs(values.astype(np.int16))
    trees = (False,) if sizes.max() <= 2 else (True,) if sizes.mean() > 24 else (False, True)
    found = []
    for transposed in (False, True) if min(matrix.shape) > 1 else (False,):
        lags = best_lags(matrix.T if transposed else matrix)
        found += [Way(transposed, tree, RATE, lags) for tree in trees]
    return found


def best_lags(matrix: np.ndarray) -> tuple[int, int]:
    """The two numbers of columns, 2 to LAGS, after which codes are most alike; 0 where none stands out."""
    rows = max(1, SAMPLE // matrix.shape[1])
    there = (matrix[:rows] != 0).astype(np.float32)
    density = there.mean()
    signs = np.sign(matrix[:rows]).astype(np.float32)
    scores = np.zeros(max(2, min(LAGS, matrix.shape[1] - 1) + 1))
    for lag in range(2, len(scores)):
        alike = (there[:, lag:] * there[:, :-lag]).mean() - density**2
        scores[lag] = alike + abs((signs[:, lag:] * signs[:, :-lag]).mean())
    first = int(scores.argmax())
    if scores[first] <= 0:
        return 0, 0
    scores[first] = 0
    second = int(scores.argmax())
    return first, second if scores[second] > 0 else 0


def write(values: np.ndarray, width: int, keep: np.ndarray | None, way: Way, signs: Signs) -> bytes:
    from tersor.coders.mixing import mixing_loops

    matrix, kept = arranged(laid_out(values, width, keep), keep, way.transposed)
    zeros = signs.zero is not None
    data = np.zeros(2 * len(values) + 64, dtype=np.uint8)
    tables = (*logistic_tables(), *adaptation_rates(way.rate))
    used = mixing_loops.mix(matrix, kept, data, *way.lags, way.tree, zeros, False, *tables)
    if used > len(data):  # what the mixer is sure of and is not so may cost 2 bytes a bit
        data = np.zeros(used, dtype=np.uint8)
        mixing_loops.mix(matrix, kept, data, *way.lags, way.tree, zeros, False, *tables)
    settings = way.transposed * TRANSPOSED | way.tree * TREE | zeros * ZEROS | way.rate << 3
    head = bytes([signs.zero or 0, signs.pivot, *way.lags])
    return first_byte(MIXING, settings) + head + data[:used].tobytes()


def arranged(matrix: np.ndarray, keep: np.ndarray | None, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and mask as they are scanned, the mask [0, 0] where all is kept."""
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
            f"coded stream: {len(data)} bytes of mixed bits for a matrix of {total} in rows of {width}"
        )
    transposed, tree, zeros = bool(settings & TRANSPOSED), bool(settings & TREE), bool(settings & ZEROS)
    signs = Signs(data[1] if zeros else None, data[2])
    matrix, kept = arranged(np.zeros((total // width, width), dtype=np.int8), keep, transposed)
    body = np.frombuffer(data, np.uint8, offset=HEAD).copy()
    tables = (*logistic_tables(), *adaptation_rates(settings >> 3))
    used = mixing_loops.mix(matrix, kept, body, data[3], data[4], tree, zeros, True, *tables)
    if used != len(body):
        raise FormatError(
            f"coded stream: damaged, or not of {count} symbols: {len(body)} bytes of mixed bits are not what "
            "an encoder of these symbols writes"
        )
    plain = np.ascontiguousarray(matrix.T if transposed else matrix).reshape(-1)
    return signs.symbols(plain if keep is None else plain[keep.reshape(-1)])
