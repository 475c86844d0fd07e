"""Smoothing: factors that move outliers of a layer's inputs into its weights, before both become integers.

y = W x = (W s) (x / s)        s_j = max|x_j|^a / max_i|w_ij|^(1 - a)     SmoothQuant (Xiao et al. 2023)
noise = step_x^2 / 12 |W s|^2 + sum_i step_i^2 / 12 sum_j E x_j^2 / s_j^2
step_x is the grid's step for x / s, step_i that of row i of W s. `a` is the one of ALPHAS with the least
noise, so nothing has to be tuned, and layers that gain nothing are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.maths.units import TINY

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def smoothing(
    w: Tensor, low: Tensor, high: Tensor, power: Tensor, *, bits: int, input_bits: int
) -> tuple[Tensor, float]:
    """(s [I], noise over that without smoothing). w [O, I]; low, high [I]: the ranges of the inputs; power
    [I]: their mean squares. The weights' grid is symmetric, per row; the inputs' has one range. float64."""
    w, low, high, power = (x.double() for x in (w, low, high, power))
    peak = torch.maximum(high, -low)
    used = (peak > 0) & (w.abs().amax(0) > 0)  # the others are 0 in any case
    x, most = peak.clamp_min(TINY), w.abs().amax(0).clamp_min(TINY)
    plain = torch.ones_like(peak)
    before = noise(w, low, high, power, plain, bits, input_bits)
    best, least = plain, before
    for alpha in ALPHAS:
        s = x**alpha / most ** (1 - alpha)
        s = torch.where(used, s / s[used].log().mean().exp() if used.any() else s, plain)
        if (found := noise(w, low, high, power, s, bits, input_bits)) < least:
            best, least = s, found
    return best, float(least / before) if before > 0 else 1.0


def noise(  # noqa: PLR0917  a layer has seven parameters here
    w: Tensor, low: Tensor, high: Tensor, power: Tensor, s: Tensor, bits: int, input_bits: int
) -> float:
    """The expected squared rounding error of all outputs together."""
    scaled = w * s
    step = ((high / s).amax().clamp_min(0) - (low / s).amin().clamp_max(0)) / (2**input_bits - 1)
    steps = scaled.abs().amax(1) / (2 ** (bits - 1) - 1)  # [O]
    inputs = step.square() / 12 * scaled.square().sum()
    return float(inputs + steps.square().sum() / 12 * (power / s.square()).sum())
