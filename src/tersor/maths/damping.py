"""Damping: what is added to the diagonal of a second moment, before least squares trusts it.

H + d I          H [I, I]: the mean of x x^T over `count` samples
free(d) = sum_i e_i / (e_i + d)        e: eigenvalues of H; the degrees of freedom of a fit with d (Hastie,
                                       Tibshirani, Friedman 2009, section 3.4.1)
d is the least one with free(d) <= count / SAMPLES, and at least DAMP of the mean of H's diagonal. With fewer
samples than inputs any unit is rebuilt from the others without error, on these samples alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMP = 1e-3  # of the mean of the diagonal: the data have directions without values
SAMPLES = 4  # for each degree of freedom: the error on new samples is then (4 / 3)^2 that of the fit
HALVINGS = 60


def damping(moment: Tensor, count: int) -> float:
    """d, for a moment [I, I] of `count` samples."""
    diagonal = moment.diagonal().double()
    least = DAMP * float(diagonal.mean()) + 1e-12
    if count >= SAMPLES * len(moment) or not moment.isfinite().all():
        return least
    values = torch.linalg.eigvalsh(moment.double()).clamp_min(0)
    allowed = count / SAMPLES

    def free(d: float) -> float:
        return float((values / (values + d)).sum())

    if free(least) <= allowed:
        return least
    low, high = least, max(least, float(values.sum()) / allowed)  # free(d) <= sum of e / d
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if free(middle) > allowed else (low, middle)
    return high
