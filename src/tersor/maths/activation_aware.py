"""Activation-aware scales: factors of a layer's inputs, so that the weights of large ones get finer steps.

y = W x = (W s) (x / s)        s_j = (E x_j^2)^(a / 2), geometric mean 1        AWQ (Lin 2024)
error of outputs = tr (Q(W s) / s - W) H (Q(W s) / s - W)^T      H [I, I] the second moment of the inputs
`a` is the one of EXPONENTS with the least error, 0 among them: no factors. AWQ takes the mean of |x_j|, where
this takes its root mean square, which the statistics have.
cost    O * I * I for each exponent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.maths.units import TINY

EXPONENTS = tuple(k / 20 for k in range(1, 21))


def aware_scales(
    weights: Sequence[Tensor], moment: Tensor, rounded: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """(s [I], error of outputs over that without factors) for layers [O, I] that read the same. `rounded`: a
    weight as it is decoded from its grid. float64."""
    moment = moment.double()
    power = moment.diagonal().clamp_min(0)
    used = power > 0
    size = torch.where(used, power, 1.0).clamp_min(TINY).sqrt()
    best = torch.ones_like(size)
    before = least = error(weights, moment, best, rounded)
    for exponent in EXPONENTS if before > 0 else ():
        s = torch.where(used, size**exponent, 1.0)
        s = torch.where(used, s / s[used].log().mean().exp(), 1.0) if bool(used.any()) else s
        if (found := error(weights, moment, s, rounded)) < least:
            best, least = s, found
    return best, least / before if before > 0 else 1.0


def error(weights: Sequence[Tensor], moment: Tensor, s: Tensor, rounded: Callable[[Tensor], Tensor]) -> float:
    """The mean square error of all outputs together, with factors s [I]."""
    total = 0.0
    for w in weights:
        gap = rounded((w.double() * s).float()).double() / s - w.double()
        total += float(((gap @ moment) * gap).sum())
    return total
