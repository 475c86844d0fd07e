"""Rounding: fake quantization of a tensor on a uniform grid, and gradients to train the step size.

q = clamp(round(x / s) + z, low, high)      y = (q - z) * s
dy/dx = 1 inside the grid's range, else 0                          straight-through (Bengio 2013)
dy/ds = round(x / s) - x / s inside, low - z or high - z outside   learned step size (LSQ, Esser 2020)

The zero point is added after rounding, as in runtimes; added before, it would change how ties are rounded.
A dynamic grid spans the tensor that it rounds, and clips nothing:
s = (high - low) / 255      z = round(-low / s)      low <= 0 <= high: the ends of x; s = 1 if all of x is 0
This is DynamicQuantizeLinear of ONNX (opset 11).

Computed in float32 (float64 for float64). `on_grid` and `learned` return the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.maths.units import TINY

BYTE = (0, 255)  # codes of a dynamic grid


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Tensor:
    """y in x's dtype. scale and zero are broadcast to x. Infinities are clipped, NaN stays."""
    v = _wide(x)
    s, z = scale.to(v.dtype), zero.to(v.dtype)
    return (v / s).round_().add_(z).clamp_(*limits).sub_(z).mul_(s).to(x.dtype)


def learned(x: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int], ease: float) -> Tensor:
    """The same y, with gradients for x and scale. The gradient of scale is multiplied by `ease`.

    Only |scale| is used. The gradients are written explicitly with plain operators, which all transformations
    of torch support. Autograd of the division would give 0 * inf near a scale of 0.
    """
    v = _wide(x)
    size = scale.abs().to(v.dtype)
    s, z = size.detach().clamp_min(TINY), zero.to(v.dtype)
    low, high = limits
    exact = v.detach() / s
    steps = exact.round().add_(z).clamp_(low, high).sub_(z)  # q - z
    inside = (exact >= low - z) & (exact <= high - z)
    slope = torch.where(inside, steps - exact, steps)
    y = steps.mul_(s) + torch.where(inside, v - v.detach(), 0)  # v - v is 0 and has v's gradient
    return torch.addcmul(y, slope, (size - size.detach()) * ease).to(x.dtype)


def dynamic(x: Tensor) -> Tensor:
    """x on the grid of 256 levels that spans it, in x's dtype; gradients pass as if nothing were rounded. NaN
    and infinities have no grid: all values may become NaN with them."""
    v = _wide(x)
    y = on_grid(v.detach(), *dynamic_range(v.detach()), BYTE)
    return (y + (v - v.detach()) if v.requires_grad else y).to(x.dtype)


def dynamic_range(v: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the grid that spans v and 0, both []."""
    if not v.numel():
        return v.new_ones(()), v.new_zeros(())
    low, high = v.amin().clamp_max(0), v.amax().clamp_min(0)
    scale = (high - low) / BYTE[1]
    scale = torch.where(scale == 0, 1.0, scale)  # the range may also be too small for floats
    return scale, (-low / scale).clamp(*BYTE).round()


def scale_gradient_factor(shape: torch.Size, scales: int, high: int) -> float:
    """LSQ's factor for the gradient of a scale: 1 / sqrt(N * highest code), where N is the number of features
    of one sample of x [B, ...] that share the scale. Without it a scale would change faster than weights."""
    return (max(math.prod(shape[1:]) // scales, 1) * max(high, 1)) ** -0.5


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
