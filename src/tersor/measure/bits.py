"""Bits: the bits that a form stores, and the lower bound for order-0 coding of its leaves.

bound = sum over leaves of N * H(histogram of its symbols)      masks: log2 C(N, k); hidden elements are free
Floats count as they are stored, coded or not: hardly any two are equal, so their histogram is no useful
bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.forms import At, Dense, Form
from tersor.maths.statistics import entropy_bits, log2_choose


@dataclass(frozen=True)
class Bits:
    """Bits of one site. `weights`: number of decoded elements."""

    weights: int
    stored: int
    bound: float

    @property
    def per_weight(self) -> float:
        return self.stored / max(self.weights, 1)

    @property
    def bound_per_weight(self) -> float:
        return self.bound / max(self.weights, 1)


def bits_of(form: Form) -> Bits:
    """Stored bits of a form, and their bound."""
    return Bits(math.prod(form.shape), 8 * form.nbytes, sum(map(bound, At(form).down())))


def bound(at: At) -> float:
    """The bound of a leaf, without the elements that the mask above hides. 0 for a node with children."""
    if at.node.children():
        return 0.0
    array = at.node.decode(at.keep)
    array = array if at.keep is None else array[at.keep]
    if array.dtype is torch.bool:
        return log2_choose(array.numel(), int(array.sum()))
    if array.is_floating_point() or array.is_complex():
        return 8.0 * (array.nbytes if isinstance(at.node, Dense) else at.node.nbytes)
    return array.numel() * entropy_bits(counts_of(array).tolist())


def counts_of(array: Tensor) -> Tensor:
    """How often each value of the integers occurs."""
    if array.dtype.itemsize > 1:
        return torch.unique(array, return_counts=True)[1]
    counts = torch.bincount(array.reshape(-1).view(torch.uint8))  # several times as fast
    return counts[counts > 0]
