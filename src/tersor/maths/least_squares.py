"""Least squares: the weights that fit given outputs best, from moments.

w' = argmin E |w' x - y|^2 + pull |w' - w|^2 = w + (E y x^T - w H) (H + pull)^-1      H = E x x^T
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_fit(w: Tensor, h: Tensor, c: Tensor, pull: Tensor, floor: Tensor | None = None) -> Tensor:
    """w' float64 [G, O, I] of w [G, O, I], h = E x x^T [G, I, I], c = E y x^T [G, O, I], pull [G]; `floor`
    [G, I, I] is added to the pull. w itself where nothing finite is found."""
    ridge = (pull[:, None, None] + 1e-30) * torch.eye(h.shape[1], dtype=h.dtype)
    if floor is not None:
        ridge = ridge + floor
    new = w + torch.linalg.solve(h + ridge, (c - w @ h).mT).mT
    return new if bool(new.isfinite().all()) else w
