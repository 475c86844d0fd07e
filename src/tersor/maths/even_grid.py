"""Even grids: small integers times a scale.

w[o, i] ~ (codes[o, i] - zero[o, g]) * scale[o, g]     round to nearest; zero is absent on a symmetric grid
range "mse"   the clipping that makes sum (w - decoded)^2 least, by search; other ranges: see ranges.py
cost          one pass over the weights; "mse" about 60 (symmetric) or 80 (not)

One bit has two levels: 0 and one end, the farther one (or the better one, for "mse"). A symmetric grid of one
bit would be 0 alone and is refused: for plus and minus one scale there is signs.binary.
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
    "PER", "RANGES", "code_limits", "dequantize", "even_grid", "expand", "limits", "requantize", "spanning"
]  # fmt: skip

RANGES = ("minmax", "percentile", "mse", "entropy", "fixed")
SHRINK = 0.92  # ratio of neighbors among the coarse ranges that "mse" tries
COARSE = 48  # down to 0.92**47 = 2 % of the range


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and highest code."""
    half = 2 ** (bits - 1)
    return (1 - half if symmetric else -half), half - 1


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and highest code on an edge, where signed codes use their whole range."""
    low = -(2 ** (bits - 1)) if signed else 0
    return low, low + 2**bits - 1


def even_grid(
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
    """codes [O, I] (int8, from 9 bits int16), scale float32 and zero [1, 1], [O, 1] or [O, G].

    zero is None where symmetric, else int16 (from 9 bits int32, so that codes - zero cannot overflow).
    The range always holds 0, so 0 is decoded exactly. `ends` are those of range "fixed". Where `keep` is
    False a weight does not shape the grid.
    """
    check_bits("even_grid", bits, 1, 16)
    check_units("even_grid", w.shape, per, group, keep)
    check_choice("even_grid", "range", range, RANGES)
    if symmetric and bits == 1:
        raise SettingError(
            "even_grid: bits=1 with symmetric=True leaves only the code 0. Use symmetric=False (0 and one "
            "end), or binary weights (plus and minus one scale)"
        )
    if range == "percentile" and not 50 < percentile <= 100:
        raise SettingError(
            f"even_grid: percentile={percentile}, but it is in percent: 50 < percentile <= 100"
        )
    w = finite("even_grid", w)
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
        raise SettingError(f"even_grid: ends={ends}, but a fixed range is low <= 0 <= high")
    return ends


def requantize(  # noqa: PLR0917  a grid is its five numbers
    w: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | Tensor, symmetric: bool
) -> Tensor:
    """Codes [O, I] of w on a grid that stands."""
    low, high = limits(bits, symmetric)
    found = torch.empty(w.shape, dtype=torch.int8 if bits <= 8 else torch.int16, device=w.device)
    step = max(1, AT_ONCE // max(w.shape[1], 1))
    for first in range(0, len(w), step):  # rows at a time: their floats stay in the cache, and are few
        block = slice(first, first + step)
        codes = w[block].detach().float().div(expand(rows_of(scale, block), group, w.shape[1])).round_()
        if zero is not None:
            codes.add_(expand(rows_of(zero, block), group, w.shape[1]))
        found[block] = codes.clamp_(low, high)
    return found


def rows_of(table: Tensor, block: slice) -> Tensor:
    """These rows of a table; one row serves all."""
    return table if len(table) == 1 else table[block]


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, group: int | Tensor) -> Tensor:
    """(codes - zero) * scale, float32 [O, I]."""
    steps = codes.to(scale.dtype, copy=True)
    if zero is not None:
        steps -= expand(zero, group, codes.shape[1])
    factors = expand(scale, group, codes.shape[1])
    # In place: of a layer with 400 MB of weights no second copy is held. A scale that learns needs the steps.
    return steps * factors if factors.requires_grad else steps.mul_(factors)


def spanning(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid that spans low..high [U], float64 with low <= 0 <= high: scale and zero, float32 [U]."""
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
    """As float32, never 0, never so large that a decoded weight overflows (this can clip beyond 1.7e38)."""
    first, last = limits(bits, symmetric)
    return scale.clamp(TINY, HUGE * (1 - 1e-6) / (last if symmetric else last - first)).float()


def _least_squares(x: Tensor, mask: Tensor | None, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """scale, zero [U] of least squared error, searched a block of units at a time."""
    step = max(1, AT_ONCE // x.shape[1])
    if mask is not None:
        x = x * mask  # zero is decoded exactly, so what does not count adds no error
    parts = [_search(x[u : u + step], bits, symmetric) for u in range(0, len(x), step)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _search(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Shrink both ends, then each end, then refit the scale to the codes. Starts at minmax: never worse."""
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
