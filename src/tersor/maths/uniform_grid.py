"""Uniform grid: uniform quantization, small integers times a scale.

w[o, i] ~ (codes[o, i] - zero[o, g]) * scale[o, g]     round to nearest; a symmetric grid has no zero point
range "mse"   the clipping range that minimizes sum (w - decoded)^2, by search; other ranges: ranges.py
cost          one pass over the weights; for "mse" about 60 (symmetric) or 80 passes (asymmetric)

With one bit the levels are 0 and one end of the range, the farther one (for "mse" the better one). A
symmetric grid with one bit would only have the level 0 and is refused; signs.binary has the levels -scale and
+scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.ranges import entropy_range, minmax_range, percentile_range
from tersor.maths.units import (
    AT_ONCE,
    HUGE,
    PER,
    TINY,
    check_bits,
    check_choice,
    check_percentile,
    check_units,
    expand,
    exponent,
    finite,
    shift,
    to_units,
    unit_mask,
    unit_table,
)

__all__ = [
    "PER", "RANGES", "code_limits", "dequantize", "uniform_grid", "expand", "limits", "requantize", "spanning"
]  # fmt: skip

RANGES = ("minmax", "percentile", "mse", "entropy", "fixed")
SHRINK = 0.92  # ratio of neighboring ranges in the coarse search of "mse"
COARSE = 48  # number of coarse ranges, down to 0.92**47 = 2 % of the full range


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and highest code."""
    half = 2 ** (bits - 1)
    return (1 - half if symmetric else -half), half - 1


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and highest code on an edge. Signed codes use the full range, with -2^(bits - 1)."""
    low = -(2 ** (bits - 1)) if signed else 0
    return low, low + 2**bits - 1


def uniform_grid(
    w: Tensor,
    bits: int,
    *,
    per: str = "channel",
    group: int = 64,
    symmetric: bool = True,
    range: str = "minmax",
    percentile: float = 99.9,
    ends: tuple[float, float] | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize w [O, I] to (codes [O, I], scale, zero); scale and zero are [1, 1], [O, 1] or [O, G].

    codes int8 (from 9 bits int16); scale float32; zero None if symmetric, else int16 (from 9 bits int32, so
    that codes - zero cannot overflow). The range always contains 0, and 0 is decoded exactly. `ends`: (low,
    high) of range "fixed". Weights with `keep` False do not influence the grid. SettingError for settings out
    of range, and for NaN or infinity.
    """
    check_bits("uniform_grid", bits, 1, 16)
    check_units("uniform_grid", w.shape, per, group, keep)
    check_choice("uniform_grid", "range", range, RANGES)
    if symmetric and bits == 1:
        raise SettingError(
            "uniform_grid: bits=1 with symmetric=True has only the code 0. Use symmetric=False (levels 0 and "
            "one end), or binary weights (levels -scale and +scale)"
        )
    if range == "percentile":
        check_percentile("uniform_grid", percentile)
    w = finite("uniform_grid", w)
    x, mask = to_units(w, per, group), unit_mask(w, keep, per, group)
    if range == "mse":
        scale, zero = _least_squares(x, mask, bits, symmetric)
    else:
        if range == "minmax":
            low, high = minmax_range(x, mask)
        elif range == "percentile":
            low, high = percentile_range(x, mask, percentile, symmetric)
        elif range == "fixed":
            low, high = (x.new_full((len(x),), end, dtype=torch.float64) for end in fixed(ends))
        else:
            low, high = entropy_range(x, mask, bits)
        scale, zero = spanning(low, high, bits, symmetric)
    scale = unit_table(scale, w.shape, per)
    shifts = (
        None if symmetric else unit_table(zero, w.shape, per).to(torch.int16 if bits <= 8 else torch.int32)
    )
    return requantize(w, scale, shifts, bits, group, symmetric), scale, shifts


def fixed(ends: tuple[float, float] | None) -> tuple[float, float]:
    if ends is None or not ends[0] <= 0 <= ends[1]:
        raise SettingError(
            f"uniform_grid: ends={ends}, but a fixed range needs (low, high) with low <= 0 <= high"
        )
    return ends


def requantize(  # noqa: PLR0917  a grid has five parameters
    w: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | Tensor, symmetric: bool
) -> Tensor:
    """Codes [O, I] of w on a given grid."""
    low, high = limits(bits, symmetric)
    found = torch.empty(w.shape, dtype=torch.int8 if bits <= 8 else torch.int16, device=w.device)
    step = max(1, AT_ONCE // max(w.shape[1], 1))
    for first in range(0, len(w), step):  # in blocks of rows, whose float copies stay in cache
        block = slice(first, first + step)
        codes = w[block].detach().float().div(expand(rows_of(scale, block), group, w.shape[1])).round_()
        if zero is not None:
            codes.add_(expand(rows_of(zero, block), group, w.shape[1]))
        found[block] = codes.clamp_(low, high)
    return found


def rows_of(table: Tensor, block: slice) -> Tensor:
    """These rows of a table. A table with one row applies to all rows."""
    return table if len(table) == 1 else table[block]


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, group: int | Tensor) -> Tensor:
    """(codes - zero) * scale, float32 [O, I]."""
    steps = codes.to(scale.dtype, copy=True)
    if zero is not None:
        steps -= expand(zero, group, codes.shape[1])
    factors = expand(scale, group, codes.shape[1])
    # In place, to avoid a second copy of a large layer. The gradient of a trained scale needs the steps.
    return steps * factors if factors.requires_grad else steps.mul_(factors)


def spanning(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) float32 [U] of the grid that spans low..high [U], float64 with low <= 0 <= high."""
    first, last = limits(bits, symmetric)
    if symmetric:
        scale = _storable(torch.maximum(-low, high) / last, bits, symmetric)
        return scale, torch.zeros_like(scale)
    if bits == 1:
        up = high >= -low
        low, high = low.masked_fill(up, 0), high.masked_fill(~up, 0)
    scale = _storable((high - low) / (last - first), bits, symmetric)
    return scale, (first - low / scale).round().clamp(first, last).float()


def _storable(scale: Tensor, bits: int, symmetric: bool) -> Tensor:
    """scale as float32, above 0, and small enough that no decoded weight overflows (clips beyond 1.7e38)."""
    first, last = limits(bits, symmetric)
    return scale.clamp(TINY, HUGE * (1 - 1e-6) / (last if symmetric else last - first)).float()


def _least_squares(x: Tensor, mask: Tensor | None, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) [U] with the least squared error, searched for a block of units at a time."""
    step = max(1, AT_ONCE // x.shape[1])
    if mask is not None:
        x = x * mask  # 0 is decoded exactly, so masked weights add no error
    parts = [_search(x[u : u + step], bits, symmetric) for u in range(0, len(x), step)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _search(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Shrink both ends, then each end, then refit the scale to the codes. Never worse than minmax."""
    power = exponent(x)
    x = shift(x, -power[:, None])
    first, last = limits(bits, symmetric)
    low, high = minmax_range(x, None)
    low0, high0 = low, high
    scale, zero = spanning(low, high, bits, symmetric)
    best = _error(x, scale, zero, first, last)

    def offer(s: Tensor, z: Tensor) -> Tensor:
        nonlocal scale, zero, best
        error = _error(x, s, z, first, last)
        better = error < best
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        best = torch.where(better, error, best)
        return better

    def shrink(down: float, up: float) -> None:
        nonlocal low, high
        better = offer(*spanning(low0 * down, high0 * up, bits, symmetric))
        low, high = torch.where(better, low0 * down, low), torch.where(better, high0 * up, high)

    for k in range(1, COARSE):
        shrink(SHRINK**k, SHRINK**k)
    for k in range(COARSE) if bits == 1 else ():
        shrink(SHRINK**k, 0)
        shrink(0, SHRINK**k)
    for ends in ((1, 1),) if symmetric else ((1, 1), (1, 0), (0, 1)):
        low0, high0 = low, high
        for k in (-3, -2, -1, 1, 2, 3):
            f = SHRINK ** (k / 4)
            shrink(f if ends[0] else 1, f if ends[1] else 1)
    for _ in range(4):
        steps = _steps(x, scale, zero, first, last)
        weight = steps.square().sum(1, dtype=torch.float64)
        fit = (steps * x).sum(1, dtype=torch.float64) / weight.clamp_min(1)
        offer(torch.where(fit > 0, fit, scale).float(), zero)
    return _storable(scale.double() * torch.exp2(power.double()), bits, symmetric), zero


def _steps(x: Tensor, scale: Tensor, zero: Tensor, first: int, last: int) -> Tensor:
    """codes - zero, as floats [U, S]."""
    shift_by = zero[:, None]
    return x.div(scale[:, None]).round_().add_(shift_by).clamp_(first, last).sub_(shift_by)


def _error(x: Tensor, scale: Tensor, zero: Tensor, first: int, last: int) -> Tensor:
    """Squared error [U], float64."""
    gap = _steps(x, scale, zero, first, last).mul_(scale[:, None]).sub_(x)
    return gap.square_().sum(1, dtype=torch.float64)
