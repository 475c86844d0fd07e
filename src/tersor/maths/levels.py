"""Levels: logarithmic grids, whose levels are powers of two or sums of two powers of two, times a scale.

w ~ sign(code) * levels[|code|] * scale            levels sorted, from 0 to 1
terms=1   0 and 2^0, 2^-1, ... 2^-(L - 2)          Miyashita, Lee, Murmann 2016
terms=2   p + q, p and q each 0 or a power of two  APoT: Li, Dong, Wang 2020, section 2.2
stored    1 bit of sign and bits - 1 of level, so L = 2^(bits - 1); a product needs only shifts and adds

A weight is rounded to the nearest level in w, not in log w, because squared error affects later layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.units import (
    HUGE,
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

LOG_RANGES = ("minmax", "mse")
STRETCH = 1.35  # the search starts above the largest weight, since powers of two are far apart
SHRINK = 0.93
FINE = 6  # finer steps on each side of the best coarse step
COARSE = 56  # coarse steps, down to 1.35 * 0.93**55 = 2.5 % of the largest weight


def log_levels(bits: int, terms: int) -> Tensor:
    """The magnitudes, float32 [L], sorted from 0 to 1.

    Two terms use disjoint sets of exponents, so every sum occurs once. With an even number of magnitude bits
    the exponents alternate between the terms, as in the paper. With an odd number the first term has one bit
    more and takes two of every three exponents; for 3 bits these are the magnitudes of the authors' code.
    """
    check_bits("log_levels", bits, 2, 8)
    if terms not in (1, 2):
        raise SettingError(
            f"log_levels: terms={terms}, but a level is one power of two or the sum of two: use 1 or 2"
        )
    count = 2 ** (bits - 1)
    if terms == 1:
        return torch.tensor([0.0] + [2.0**-e for e in range(count - 2, -1, -1)])
    many, few = (2 ** ((bits - 1 + odd) // 2) - 1 for odd in (1, 0))
    cycle = "ab" if many == few else "aab"
    whose = [cycle[e % len(cycle)] for e in range(many + few)]
    p, q = ([0.0] + [2.0**-e for e, term in enumerate(whose) if term == mine] for mine in "ab")
    sums = sorted(x + y for x in p for y in q)
    return torch.tensor([s / sums[-1] for s in sums], dtype=torch.float64).float()


def log_grid(
    w: Tensor,
    bits: int,
    *,
    terms: int = 1,
    per: str = "channel",
    group: int = 64,
    range: str = "mse",
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize w [O, I] to (codes int8 [O, I], scale float32 [1, 1], [O, 1] or [O, G]).

    A code is the sign times the level's index. range "minmax": the top level is the largest weight. "mse":
    the scale with the least squared error, searched from there, so never worse. Weights with `keep` False do
    not influence the grid. SettingError for bad settings, NaN or infinity.
    """
    levels = log_levels(bits, terms).to(w.device)
    check_units("log_grid", w.shape, per, group, keep)
    check_choice("log_grid", "range", range, LOG_RANGES)
    w = finite("log_grid", w)
    x, mask = to_units(w, per, group), unit_mask(w, keep, per, group)
    if mask is not None:
        x = x * mask  # 0 is a level, so masked weights add no error
    power = exponent(x)
    x = shift(x.abs(), -power[:, None])
    scale = x.amax(1).clamp_min(TINY)
    if range == "mse":
        scale = _search(x, levels, scale)
    scale = (scale.double() * torch.exp2(power.double())).clamp(TINY, HUGE).float()
    scale = unit_table(scale, w.shape, per)
    return to_levels(w, scale, bits, terms, group), scale


def to_levels(w: Tensor, scale: Tensor, bits: int, terms: int, group: int | Tensor) -> Tensor:
    """Codes [O, I] of w on a given grid."""
    levels = log_levels(bits, terms).to(w.device)
    w = w.detach().float()
    index = _nearest(w.abs() / expand(scale, group, w.shape[1]), levels)
    return torch.where(w < 0, -index, index).to(torch.int8)


def from_levels(codes: Tensor, scale: Tensor, bits: int, terms: int, group: int | Tensor) -> Tensor:
    """sign(code) * levels[|code|] * scale, float32 [O, I]."""
    levels = log_levels(bits, terms).to(codes.device)
    both = torch.cat([-levels[1:].flip(0), levels])  # [2 L - 1]: one lookup gives sign and magnitude
    return both[codes.long() + len(levels) - 1].to(scale.dtype) * expand(scale, group, codes.shape[1])


def _nearest(size: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level. size >= 0, in units of the scale."""
    return torch.bucketize(size.contiguous(), (levels[1:] + levels[:-1]) / 2)


def _search(x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Scale [U] with the least squared error for magnitudes x [U, S]: coarse steps, fine steps, refits."""

    def steps(s: Tensor) -> Tensor:
        return levels[_nearest(x / s[:, None], levels)]

    def error(s: Tensor) -> Tensor:
        return steps(s).mul_(s[:, None]).sub_(x).square_().sum(1, dtype=torch.float64)

    best, top = error(scale), scale

    def offer(trial: Tensor) -> None:
        nonlocal scale, best
        now = error(trial)
        scale, best = torch.where(now < best, trial, scale), torch.minimum(now, best)

    for k in range(COARSE):
        offer(top * (STRETCH * SHRINK**k))
    near = scale
    for k in range(-FINE, FINE + 1):
        offer(near * SHRINK ** (k / (FINE + 1)))
    for _ in range(4):
        codes = steps(scale)
        weight = codes.square().sum(1, dtype=torch.float64).clamp_min(1e-30)
        fit = ((codes * x).sum(1, dtype=torch.float64) / weight).float()
        offer(torch.where(fit > 0, fit, scale))
    return scale
