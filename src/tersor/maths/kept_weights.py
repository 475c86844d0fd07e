"""Kept weights: the values of the weights that a mask keeps, so that the outputs of their layer change least.

min (q - w) H (q - w)^T + pull |q - w|^2      q [O, I] is 0 where the mask is; H [I, I] moments of inputs
Each row has a mask of its own, so each is a system of equations of its own. All are solved together by
conjugate gradients on the kept weights (Hestenes, Stiefel 1952; for masks: ALPS, Meng 2024), with the
diagonal as preconditioner. Unlike SparseGPT's, column by column (Frantar 2023), it is exact in the limit.
Cost: O * I * I for each of at most STEPS steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 200
CLOSE = 1e-3  # of the first residual, in the preconditioner's norm: then it ends
LEAST = 1e-300  # divisors are at least this


def kept_weights(w: Tensor, h: Tensor, pull: Tensor, keep: Tensor) -> Tensor:
    """The values float64 [G, O, I], 0 where `keep`, bool of that shape, is False. w [G, O, I], h [G, I, I],
    pull [G].

    A row that conjugate gradients make worse, as overflow does, is `w` with zeros.
    """
    w, h = w.double(), h.double()
    h = h + pull[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    scale = h.diagonal(dim1=1, dim2=2)[:, None].clamp_min(LEAST)  # [G, 1, I]
    begin = torch.where(keep, w, 0.0)
    q = begin.clone()
    residual = torch.where(keep, (w - q) @ h, 0.0)
    step = residual / scale
    size = first = (residual * step).sum(-1, keepdim=True)  # [G, O, 1]
    for _ in range(STEPS):
        if bool((size <= CLOSE**2 * first).all()):
            break
        turned = torch.where(keep, step @ h, 0.0)
        far = size / (step * turned).sum(-1, keepdim=True).clamp_min(LEAST)
        q += far * step
        residual -= far * turned
        new = residual / scale
        size, before = (residual * new).sum(-1, keepdim=True), size
        step = new + size / before.clamp_min(LEAST) * step
    better = cost(q, w, h) < cost(begin, w, h)
    return torch.where(better, q, begin)


def cost(q: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """(q - w) h (q - w)^T of each row, [G, O, 1]."""
    gap = q - w
    return ((gap @ h) * gap).sum(-1, keepdim=True)
