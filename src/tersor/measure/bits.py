"""Bits: the bits that a form stores, and the lower bound for order-0 coding of its leaves.

bound = sum over leaves of their order-0 entropy, order0.py     hidden elements are free
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tersor.forms import At, Form
from tersor.measure.order0 import order0_bits


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
    return order0_bits(array if at.keep is None else array[at.keep])
