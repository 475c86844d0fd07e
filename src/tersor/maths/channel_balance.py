"""Channel balance: scales of channels, so that one grid for all of them wastes little on any.

x' = s x, W' = W / s       the grid of x' has steps of max(s high) - min(s low) over its levels
noise = sum_e step_e^2 / 12 sum_c a_c / s_c^2  +  sum_j sum_o step_jo^2 / 12 sum_c p_c s_c^2 / v_j
a_c      sum_j |W_jc|^2 / v_j: how much of an error in channel c the readers j see, over their outputs' power
         v_j = sum_c p_c |W_jc|^2; p_c: the mean square of channel c
s_c      r_c^-alpha a_c^beta, r_c the range of the channel; those of ALPHAS and BETAS with the least noise
The first part is of rounded activations, the second of rounded weights of the readers: as in SmoothQuant
(Xiao 2023), but between layers, so that no operator is added; Nagel 2019 (cross-layer equalization) balances
the ranges of weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tersor.maths.activation_ranges import Range
from tersor.maths.units import TINY

ALPHAS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875)
BETAS = (0.0, 0.25, 0.5)
LEVELS = 255
MOST = 2.0**12  # largest ratio of two scales
SIGMAS = 6  # standard deviations above its mean that a channel may reach on other data, as in Nagel 2019


class Reader(NamedTuple):
    """A weight that reads the channels: the largest |w| and the sum of w^2 between each output and each
    channel, [O, C] float64, 0 across groups."""

    peak: Tensor
    square: Tensor
    size: int  # weights between an output and a channel

    @classmethod
    def of(cls, weight: Tensor, groups: int, block: int) -> Reader:
        """weight [O, I / groups, ...], of which `block` adjacent inputs are of one channel."""
        flat = weight.double().flatten(2) if weight.ndim > 2 else weight.double()[..., None]  # [O, I / G, k]
        peak, square = (cells(x, groups, block) for x in (flat.abs().amax(2), flat.square().sum(2)))
        return cls(peak.amax(2), square.sum(2), flat.shape[2] * block)


def balanced(
    ranges: Sequence[Range],
    power: Tensor,
    readers: Sequence[Reader],
    bits: int,
    most: Tensor | None = None,
) -> tuple[Tensor, float]:
    """(s [C], noise over that without scales). `ranges`: (low, high) [C] of the channels on each edge; power
    [C]: their mean square. With `most` [C], at least 1, s is from 1 to it. float64"""
    low = torch.stack([low for low, _ in ranges]).double().amin(0)
    width = torch.stack([high for _, high in ranges]).double().amax(0) - low
    seen = torch.stack([r.square.sum(0) / output_power(r, power) for r in readers]).sum(0)
    used = (width > 0) & (seen > 0)
    plain = torch.ones_like(width)
    before = noise(plain, ranges, power, readers, seen, bits)
    if not used.any() or before <= 0:
        return plain, 1.0
    best, least = plain, before
    for alpha in ALPHAS:
        for beta in BETAS:
            s = torch.where(used, width.clamp_min(TINY) ** -alpha * seen.clamp_min(TINY) ** beta, plain)
            s = torch.where(used, within(s, used, most), plain)
            if (found := noise(s, ranges, power, readers, seen, bits)) < least:
                best, least = s, found
    return best, least / before


def within(s: Tensor, used: Tensor, most: Tensor | None) -> Tensor:
    """The scales [C] times a number, with a ratio of at most MOST; 1 <= s <= most if that is given."""
    if most is None:
        return (s / s[used].log().mean().exp()).clamp(MOST**-0.5, MOST**0.5)
    most = most.clamp_max(MOST)
    return torch.minimum((s / (s / most)[used].max()).clamp_min(1), most)


def room(top: float, high: Tensor, mean: Tensor, power: Tensor) -> Tensor:
    """How many times as large the channels may become below `top`, at least 1 [C]. `mean`, `power`: of the
    values before they are clipped, from which follows how far other data may go."""
    reach = mean + SIGMAS * (power - mean.square()).clamp_min(0).sqrt()
    return (top / torch.maximum(high, reach).clamp_min(TINY)).clamp_min(1)


def output_power(reader: Reader, power: Tensor) -> Tensor:
    return (reader.square @ power.double()).sum().clamp_min(TINY)


def cells(x: Tensor, groups: int, block: int) -> Tensor:
    """[O, I / groups] -> [O, C, block], 0 across groups"""
    return torch.block_diag(*x.chunk(groups)).unflatten(1, (-1, block))


def noise(  # noqa: PLR0917  a stream has six parameters here
    s: Tensor, ranges: Sequence[Range], power: Tensor, readers: Sequence[Reader], seen: Tensor, bits: int
) -> float:
    """The expected squared rounding error of the readers' outputs, over their power."""
    total = torch.zeros((), dtype=torch.float64)
    for low, high in ranges:
        step = ((high * s).amax().clamp_min(0) - (low * s).amin().clamp_max(0)) / LEVELS
        total = total + step.square() / 12 * (seen / s.square()).sum()
    for reader in readers:
        steps = (reader.peak / s).amax(1) / (2 ** (bits - 1) - 1)  # [O]
        inside = (reader.square > 0).double() @ (power * s.square())  # [O]
        total = total + reader.size * (steps.square() * inside).sum() / 12 / output_power(reader, power)
    return float(total)
