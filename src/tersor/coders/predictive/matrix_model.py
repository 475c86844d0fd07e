"""Grid: what the predictive coder assumes of a matrix of codes, in whole numbers, so that all machines agree.

code[o, i] ~ mean[o, i] + scale[o] * spread[i] * noise      rows and columns have spreads of their own
mean[o, i] = scale[o] * sum over j < i of L[i, j] * e[o, j]     e: what was not foreseen of earlier columns
L D L' = second moments of the rows so far + ridge      nothing of L is stored: encoder and decoder learn it
Cost: C / 2 multiplications a code, and C^3 / 6 at each of the few rows where L is learned anew.
"""

from __future__ import annotations

import functools

import numpy as np

BLOCK = 64  # rows coded side by side, column after column
BAND = 256  # columns that may foretell each other, at most
GROWTH = 1.5  # L is learned anew whenever so many times the rows are known
OCTAVE = 8  # levels from one scale to its double
MIDDLE = 64  # the level of a column that spreads as its row says
LEVELS = 128
ONE = 8  # bits after the point of normalized codes and of what was not foreseen
COEF = 10  # bits after the point of L
FINE = 4  # bits after the point of a mean in units of codes
FAR = 1 << 12  # normalized codes and means end here: 16 scales
STRONG = 1 << 14  # numbers of L end here: 16
RIDGES = (0.5, 1.0, 4.0, 16.0)  # rows' worth of prior, in units of columns / rows
NORMAL = 20  # bits after the point of the table of inverse scales
GROUPS = 64  # spreads told apart: levels by twos
FRACTIONS = (1 << FINE) // 2 + 1  # distances of a mean from the nearest code

# 2^(k / 8) for k = 0 .. 7, 30 bits after the point: written out, as no library need round a power alike.
EIGHTHS = (
    1073741824, 1170923762, 1276901417, 1392470869, 1518500250, 1655936265, 1805811301, 1969251188
)  # fmt: skip


@functools.cache
def scales() -> tuple[np.ndarray, np.ndarray]:
    """(1 / scale with NORMAL bits, scale with COEF bits) of levels 0 to 127: scale 2^(level / 8 - 4)."""
    up = np.array([EIGHTHS[k % OCTAVE] << (k // OCTAVE) for k in range(LEVELS)], dtype=object)
    scale = up >> 24  # 2^(k / 8 - 4) * 2^10
    # The same read backward: 2^(-k / 8) = 2^((LEVELS - k) / 8) / 2^(LEVELS / 8)
    back = np.array([up[LEVELS - k] if k else up[0] << LEVELS // OCTAVE for k in range(LEVELS)], dtype=object)
    inverse = back >> (30 + LEVELS // OCTAVE - NORMAL)  # 2^(-k / 8) * 2^20
    return inverse.astype(np.int32), scale.astype(np.int32)


def level_of(spread: np.ndarray) -> np.ndarray:
    """The levels uint8 whose scales 2^(level / 8 - 4) are nearest to `spread`."""
    level = np.rint(OCTAVE * (np.log2(np.maximum(spread, 1e-6)) + 4))
    return np.clip(level, 0, LEVELS - 1).astype(np.uint8)


def bands(columns: int) -> list[tuple[int, int]]:
    """Columns cut into equal bands of at most BAND."""
    parts = -(-columns // BAND)
    edges = [columns * k // parts for k in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


def lessons(rows: int, columns: int) -> list[int]:
    """The row numbers before which L is learned from the rows above; 0 first, `rows` last."""
    width = max(end - begin for begin, end in bands(columns))
    at = [0, BLOCK * max(1, -(-width // (3 * BLOCK)))]
    while at[-1] < rows:
        at.append(BLOCK * -(-int(at[-1] * GROWTH) // BLOCK))
    return [row for row in at if row < rows] + [rows]
