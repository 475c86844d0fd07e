"""Group penalty: an L2 penalty that grows during training, on whole units, until nothing of them is left.

P(w, t) = lambda_t / 2 * |w_U|^2        w_U: all weights of the units that are to go, in every coupled tensor
lambda_t = 2 penalty (t + 1) / (T (T + 1))      t = 0 .. T - 1: it grows linearly and sums to `penalty`
step     w_U <- w_U exp(-lambda_t): the exact flow of -grad P for a time of 1, apart from the optimizer's step
Without the loss, w_U ends at exp(-penalty) of what it was. An optimizer that divides by the gradient's size,
as Adam does, would make the strength meaningless; so the penalty is decoupled, like AdamW's weight decay.
Growing penalty: Wang 2021 (GReg-1); coupled groups: DepGraph (Fang 2023); decoupling: Loshchilov 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def strength(step: int, total: int, penalty: float) -> float:
    """lambda_t at this step of `total`."""
    return 2 * penalty * (step + 1) / (total * (total + 1))


def units_mask(shape: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Tensor:
    """Which elements belong to units that go: bool, of this shape. `kept`: the indices that stay, for axes
    that lose some."""
    stays = torch.ones(tuple(shape), dtype=torch.bool)
    for axis, some in kept.items():
        along = torch.zeros(shape[axis], dtype=torch.bool)
        along[torch.as_tensor(list(some), dtype=torch.int64)] = True
        stays &= along.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return ~stays


@torch.no_grad()
def shrink(tensor: Tensor, mask: Tensor, lambda_: float) -> None:
    """One step of the penalty, in place."""
    tensor.mul_(torch.ones_like(tensor).masked_fill_(mask, math.exp(-lambda_)))
