"""Smoothing: factors that move outliers of a layer's inputs into its weights, before both become integers.

y = W x = (W s) (x / s)        s_j = max|x_j|^a / max_i|w_ij|^(1 - a)     SmoothQuant (Xiao et al. 2023)
noise = step_x^2 / 12 |W s|^2 + sum_i step_i^2 / 12 sum_j E x_j^2 / s_j^2
step_x is the grid's step for x / s, step_i that of row i of W s.
clipped = sum_j |W_j s_j|^2 max(0, |x_j / s_j| - range)^2 / samples
of the largest values of one half of the samples, with factors and range of the other half. A channel of
which calibration saw little gets a small factor, and other data may leave its range by far.
`a` is the one of ALPHAS with the least sum of both, so nothing has to be tuned, and layers that gain nothing
are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.maths.activation_ranges import Range, union
from tersor.maths.units import TINY

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def smoothing(
    w: Tensor, halves: tuple[Range, Range], power: Tensor, samples: float, *, bits: int, input_bits: int
) -> tuple[Tensor, float]:
    """(s [I], noise over that without smoothing). w [O, I]; `halves`: the ranges (low, high) [I], float64, of
    the inputs in the two halves of the samples; power [I]: their mean squares; `samples`: their number,
    infinite if nothing will be clipped. Weights have a symmetric grid per row, inputs one range."""
    w, power = w.double(), power.double()
    low, high = union(halves)
    first, second = halves

    def cost(alpha: float | None) -> float:
        s = factors(w, low, high, alpha)
        out = clipped(w, *first, *second, alpha) + clipped(w, *second, *first, alpha)
        return noise(w, low, high, power, s, bits, input_bits) + out / samples

    before = cost(None)
    costs: dict[float | None, float] = {None: before} | {alpha: cost(alpha) for alpha in ALPHAS}
    best = min(costs, key=costs.__getitem__)
    return factors(w, low, high, best), costs[best] / before if before > 0 else 1.0


def factors(w: Tensor, low: Tensor, high: Tensor, alpha: float | None) -> Tensor:
    """s [I], whose geometric mean is 1, for inputs in [low, high]; ones if `alpha` is None."""
    peak, most = torch.maximum(high, -low), w.abs().amax(0)
    used = (peak > 0) & (most > 0)  # the others are 0 in any case
    if alpha is None or not used.any():
        return torch.ones_like(peak)
    s = peak.clamp_min(TINY) ** alpha / most.clamp_min(TINY) ** (1 - alpha)
    return torch.where(used, s / s[used].log().mean().exp(), 1.0)


def clipped(  # noqa: PLR0917  two ranges
    w: Tensor, low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor, alpha: float | None
) -> float:
    """The squared error of all outputs if inputs at the ends of the other range are clipped to this one."""
    s = factors(w, low, high, alpha)
    above = (other_high / s - (high / s).amax().clamp_min(0)).clamp_min(0)
    below = ((low / s).amin().clamp_max(0) - other_low / s).clamp_min(0)
    return float((w * s).square().sum(0) @ (above.square() + below.square()))


def noise(  # noqa: PLR0917  a layer has seven parameters here
    w: Tensor, low: Tensor, high: Tensor, power: Tensor, s: Tensor, bits: int, input_bits: int
) -> float:
    """The expected squared rounding error of all outputs together."""
    scaled = w * s
    step = ((high / s).amax().clamp_min(0) - (low / s).amin().clamp_max(0)) / (2**input_bits - 1)
    steps = scaled.abs().amax(1) / (2 ** (bits - 1) - 1)  # [O]
    inputs = step.square() / 12 * scaled.square().sum()
    return float(inputs + steps.square().sum() / 12 * (power / s.square()).sum())
