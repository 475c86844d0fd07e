"""Unit scores: how important each unit (channel, head, neuron) is, from the slices of weights that it owns.

norm      sum over slices of |w| or w^2, over the family's mean             Li et al. 2017; DepGraph 2023
taylor    (sum over slices of g w)^2, mean over batches                     Molchanov et al. 2019
reading   sum over columns of |W_u|^2 H_uu, what is read from the unit      Wanda (Sun 2024), for whole units
median    distance of a unit's weights to those of all others               FPGM (He et al. 2019)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.maths.units import TINY


def by_unit(values: Tensor, axis: int, index: Tensor) -> Tensor:
    """The sum of the values [..] in each unit's slices along an axis; index [U, K] -> [U]."""
    along = values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1)  # [size]
    return along[index].sum(1)


def rows_of(w: Tensor, axis: int, index: Tensor) -> Tensor:
    """Each unit's slices as a row, [U, K * rest]."""
    return w.movedim(axis, 0).flatten(1)[index].flatten(1) if w.ndim > 1 else w[index]


def norm_scores(slices: Sequence[tuple[Tensor, int, Tensor]], power: int) -> Tensor:
    """slices: (weight, axis, index [U, K]). Scaled to a mean of 1, so that families compare."""
    parts = [
        by_unit(w.double().abs() ** power, axis, index) / (w.numel() / w.shape[axis])
        for w, axis, index in slices
    ]
    total = torch.stack(parts).sum(0)
    return total / total.mean().clamp_min(TINY)


def reading_scores(readers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """readers: (weight [O, I], second moment of its inputs [I, I], columns [U, K])."""
    found = [
        ((w.double().square().sum(0) * h.double().diagonal())[columns]).sum(1) for w, h, columns in readers
    ]
    return torch.stack(found).sum(0)


def median_scores(slices: Sequence[tuple[Tensor, int, Tensor]]) -> Tensor:
    """The sum of distances to the other units, scaled to a mean of 1."""
    rows = torch.cat([rows_of(w.double(), axis, index) for w, axis, index in slices], 1)
    total = torch.cdist(rows, rows).sum(1)
    return total / total.mean().clamp_min(TINY)


def in_order(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(units from the least important, total score after each removal [U + 1])."""
    order = scores.argsort(stable=True)
    zero = torch.zeros(1, dtype=torch.float64)
    return order, torch.cat([zero, scores[order].double().clamp_min(0).cumsum(0)])
