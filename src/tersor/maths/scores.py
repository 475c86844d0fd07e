"""Scores: pruning criteria, and masks of the weights to keep.

magnitude   |w|                                              Han et al. 2015
LAMP        w^2 / sum of the squares of all weights >= |w|   Lee et al. 2021; comparable across layers
n of m      the n largest of each m consecutive inputs       Mishra et al. 2021 (2:4); for a kernel, input
            channels at each kernel position
schedule    the share kept decreases along a cubic        Zhu, Gupta 2017
cost        one sort, or one selection for a single threshold

A mask is bool, True for weights to keep. Functions take weights or any nonnegative scores, since only |w| is
used. Exactly round(keep * n) of n weights are kept; ties are kept in memory order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import SettingError
from tersor.maths.units import check_units, exponent, finite, from_units, shift, to_units, unit_mask


def magnitude_keep(w: Tensor, keep: float, per: str = "tensor", group: int = 64) -> Tensor:
    """Mask bool [O, I] that keeps the round(keep * n) largest of each tensor, row or group of n, halves up.

    A short row or group may keep none. The tensor keeps at least its largest weight. SettingError for keep
    outside of 0 < keep <= 1, for a bad shape, NaN or infinity.
    """
    check_units("magnitude_keep", w.shape, per, group)
    _check_share("magnitude_keep", keep)
    scores = finite("magnitude_keep", w).abs()
    mask = unit_mask(w, None, per, group)
    units = to_units(scores, per, group, fill=-1)  # padding sorts last
    size = torch.full((len(units),), units.shape[1], device=w.device) if mask is None else mask.sum(1)
    count = (keep * size.double() + 0.5).floor().long()
    if not bool(count.any()):
        return _largest(scores.reshape(1, -1), count.new_ones(1)).reshape(w.shape)
    return from_units(_largest(units, count), w.shape, per)


def threshold_keep(w: Tensor, threshold: float) -> Tensor:
    """Mask bool in the shape of w that keeps |w| >= threshold; 0 keeps all."""
    if not threshold >= 0:
        raise SettingError(
            f"threshold_keep: threshold={threshold}, but it must be 0 or more: it is a bound of |w|"
        )
    return w.detach().abs() >= threshold


def global_keep(scores: Sequence[Tensor], keep: float) -> list[Tensor]:
    """Masks for several tensors of any shapes that keep round(keep * n) of all n scores, at least one.

    A tensor may lose all its weights, except with LAMP scores, where the largest of each tensor has score 1.
    """
    _check_share("global_keep", keep)
    if not scores:
        return []
    flat = torch.cat([finite("global_keep", s).abs().reshape(-1) for s in scores])
    count = max(1, math.floor(keep * flat.numel() + 0.5))
    kept = _largest(flat[None], torch.tensor([count], device=flat.device))[0]
    parts = kept.split([s.numel() for s in scores])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def lamp_scores(w: Tensor) -> Tensor:
    """LAMP scores float32 in the shape of w, 0 to 1; 1 for the largest. Ties: the first is higher."""
    flat = finite("lamp_scores", w).reshape(1, -1)
    size = shift(flat, -exponent(flat)[:, None])[0].double().square()  # scores are scale invariant
    ordered, order = size.sort(descending=True, stable=True)
    scores = torch.empty_like(size)
    scores[order] = ordered / ordered.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return scores.float().reshape(w.shape)


def n_m_keep(w: Tensor, n: int, m: int) -> Tensor:
    """Mask bool [O, I]: n largest of each m consecutive columns, ceil(n * L / m) of a last block of L."""
    if not 1 <= n <= m:
        raise SettingError(f"n_m_keep: n={n}, m={m}, but n of every m weights are kept: 1 <= n <= m")
    check_units("n_m_keep", w.shape, "group", m)
    mask = unit_mask(w, None, "group", m)
    units = to_units(finite("n_m_keep", w).abs(), "group", m, fill=-1)
    size = torch.full((len(units),), units.shape[1], device=w.device) if mask is None else mask.sum(1)
    return from_units(_largest(units, -(-n * size // m)), w.shape, "group")


def n_m_along(w: Tensor, n: int, m: int, axis: int, groups: int = 1) -> Tensor:
    """Mask bool in the shape of w: the n largest of each m consecutive elements along an axis, separately for
    each index of the other axes. Blocks do not cross the `groups` that the axis is divided into."""
    moved = w.movedim(axis, -1)  # [..., I]
    size = moved.shape[-1] // groups if moved.shape[-1] % groups == 0 else moved.shape[-1]
    keep = n_m_keep(moved.reshape(-1, size), n, m)
    return keep.reshape(moved.shape).movedim(-1, axis)


def cubic(step: int, begin: int, end: int, start_keep: float, end_keep: float) -> float:
    """Share kept at a step: start_keep until `begin`, end_keep from `end` on, changing mostly early."""
    if step >= end:
        return end_keep
    if step <= begin:
        return start_keep
    left = 1 - (step - begin) / (end - begin)
    return end_keep + (start_keep - end_keep) * left**3


def _check_share(who: str, keep: float) -> None:
    if not 0 < keep <= 1:
        raise SettingError(f"{who}: keep={keep}, but it is the share kept: 0 < keep <= 1")


def _largest(scores: Tensor, count: Tensor) -> Tensor:
    """Mask bool [U, S] of the count[u] largest scores of each row; among equals, the first."""
    units, size = scores.shape
    if units == 1:  # selection is faster than a sort; only single rows are long
        place = size - int(count[0]) + 1
        edge = scores.kthvalue(min(place, size), dim=1, keepdim=True).values
    else:
        ordered = scores.sort(1, descending=True).values
        edge = ordered.gather(1, (count - 1).clamp_min(0)[:, None])
    above = scores > edge
    spare = count[:, None] - above.sum(1, keepdim=True)
    level = scores == edge
    return (above | (level & (level.cumsum(1) <= spare))) & (count > 0)[:, None]
