"""Matrix model: the predictive coder's model of a matrix of codes, in integers so that all machines agree.

code[o, i] ~ mean[o, i] + scale[o] * scale[i] * noise           one scale for each row and each column
mean[o, i] = scale[o] * sum over j < i of L[i, j] * e[o, j]     e: prediction errors of earlier columns
L D L' = second moments of the rows so far + ridge              L is not stored: the decoder computes it too

Cost: C / 2 multiplications a code, and C^3 / 6 at each of the few rows where L is computed again.
"""

from __future__ import annotations

import functools

import numpy as np

BLOCK = 64  # rows coded together, column by column
BAND = 256  # columns predicted from each other, at most
GROWTH = 1.5  # L is computed again each time the number of rows has grown by this factor
OCTAVE = 8  # levels for a factor of two in scale
MIDDLE = 64  # the level of a column with scale 1
LEVELS = 128
ONE = 8  # fractional bits of normalized codes and prediction errors
COEF = 10  # fractional bits of L
FINE = 4  # fractional bits of a mean in units of codes
FAR = 1 << 12  # normalized codes and means are clipped here: 16 scales
STRONG = 1 << 14  # elements of L are clipped here: 16
RIDGES = (0.5, 1.0, 4.0, 16.0)  # strength of the prior, in units of columns / rows
NORMAL = 20  # fractional bits of the table of inverse scales
GROUPS = 64  # distinguished scales: two levels each
FRACTIONS = (1 << FINE) // 2 + 1  # distances of a mean from the nearest code

# 2^(k / 8) for k = 0 .. 7 with 30 fractional bits, as literals: libraries round powers differently.
EIGHTHS = (
    1073741824, 1170923762, 1276901417, 1392470869, 1518500250, 1655936265, 1805811301, 1969251188
)  # fmt: skip


@functools.cache
def scales() -> tuple[np.ndarray, np.ndarray]:
    """(1 / scale with NORMAL bits, scale with COEF bits) of levels 0 to 127: scale = 2^(level / 8 - 4)."""
    up = np.array([EIGHTHS[k % OCTAVE] << (k // OCTAVE) for k in range(LEVELS)], dtype=object)
    scale = up >> 24  # 2^(k / 8 - 4) * 2^10
    # The reversed table: 2^(-k / 8) = 2^((LEVELS - k) / 8) / 2^(LEVELS / 8)
    back = np.array([up[LEVELS - k] if k else up[0] << LEVELS // OCTAVE for k in range(LEVELS)], dtype=object)
    inverse = back >> (30 + LEVELS // OCTAVE - NORMAL)  # 2^(-k / 8) * 2^20
    return inverse.astype(np.int32), scale.astype(np.int32)


def level_of(scale: np.ndarray) -> np.ndarray:
    """The levels uint8 whose scales 2^(level / 8 - 4) are nearest to `scale`."""
    level = np.rint(OCTAVE * (np.log2(np.maximum(scale, 1e-6)) + 4))
    return np.clip(level, 0, LEVELS - 1).astype(np.uint8)


def bands(columns: int) -> list[tuple[int, int]]:
    """(begin, end) of equal bands of at most BAND columns."""
    parts = -(-columns // BAND)
    edges = [columns * k // parts for k in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


def update_rows(rows: int, columns: int) -> list[int]:
    """Row numbers before which L is computed from all rows above: 0, ..., and `rows` last."""
    width = max(end - begin for begin, end in bands(columns))
    at = [0, BLOCK * max(1, -(-width // (3 * BLOCK)))]
    while at[-1] < rows:
        at.append(BLOCK * -(-int(at[-1] * GROWTH) // BLOCK))
    return [row for row in at if row < rows] + [rows]
