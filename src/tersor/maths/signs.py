"""Signs: binary and ternary weights with a scale.

binary    w ~ scale * {-1, 1}       scale = mean |w|, the least-squares optimum     Rastegari et al. 2016
ternary   w ~ scale * {-1, 0, 1}    scale = mean |w| of those above a threshold     Li, Liu 2016
stored    1 bit or log2(3) bits a weight, and 32 bits for each scale

Index k means book[k]; the books are BINARY and TERNARY. Ternary rules: "twn" uses the threshold
0.7 * mean |w|; "exact" is optimal: it keeps the k largest with maximal (their sum)^2 / k, by one sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.maths.units import (
    HUGE,
    TINY,
    check_choice,
    check_units,
    finite,
    from_units,
    to_units,
    unit_mask,
    unit_table,
)

BINARY = (-1.0, 1.0)
TERNARY = (-1.0, 0.0, 1.0)
RULES = ("twn", "exact")


def binary(
    w: Tensor, per: str = "channel", keep: Tensor | None = None, *, group: int = 64
) -> tuple[Tensor, Tensor]:
    """(index uint8 {0, 1} [O, I], scale float32 [1, 1], [O, 1] or [O, G]). Zero counts as positive."""
    check_units("binary", w.shape, per, group, keep)
    w = finite("binary", w)
    size, mask = to_units(w.abs(), per, group), unit_mask(w, keep, per, group)
    scale = _mean(size, torch.ones_like(size, dtype=torch.bool) if mask is None else mask)
    return (w >= 0).to(torch.uint8), unit_table(scale, w.shape, per)


def ternary(
    w: Tensor, per: str = "channel", keep: Tensor | None = None, rule: str = "twn", *, group: int = 64
) -> tuple[Tensor, Tensor]:
    """(index uint8 {0, 1, 2} [O, I], scale float32 [1, 1], [O, 1] or [O, G])."""
    check_units("ternary", w.shape, per, group, keep)
    check_choice("ternary", "rule", rule, RULES)
    w = finite("ternary", w)
    size, mask = to_units(w.abs(), per, group), unit_mask(w, keep, per, group)
    if mask is None:
        mask = torch.ones_like(size, dtype=torch.bool)
    if rule == "twn":
        large = size > 0.7 * _mean(size, mask)[:, None]
    else:
        large = size >= _best_threshold(size.masked_fill(~mask, 0))[:, None]
    large &= size > 0
    scale = unit_table(_mean(size, large & mask), w.shape, per)
    index = 1 + w.sign() * from_units(large, w.shape, per)
    return index.to(torch.uint8), scale


def _mean(size: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked elements, float32 [U]. TINY if there are none, since a scale is never 0."""
    mean = (size * mask).sum(1, dtype=torch.float64) / mask.sum(1).clamp_min(1)
    return mean.clamp(TINY, HUGE).float()


def _best_threshold(size: Tensor) -> Tensor:
    """Smallest magnitude kept, [U]. The optimum never separates equal magnitudes."""
    ordered = size.sort(1, descending=True).values
    unit = ordered[:, :1].double().clamp_min(torch.finfo(torch.float64).tiny)
    total = (ordered.double() / unit).cumsum(1)
    gain = total.square() / torch.arange(1, size.shape[1] + 1, device=size.device)
    return ordered.gather(1, gain.argmax(1, keepdim=True))[:, 0]
