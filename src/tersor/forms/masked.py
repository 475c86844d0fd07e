"""Masked: weights, some of which are exactly zero.

w = body where keep, else 0
stored  the mask (at best log2 C(N, k) bits) and the kept elements of the body
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.forms.coded import uncoded
from tersor.forms.form import Fact, Facts, Form, Shape, demand


@dataclass(frozen=True, eq=False, repr=False)
class Masked(Form):
    """A body that is used only where `keep` is true, and is zero elsewhere."""

    name: ClassVar[str] = "masked"
    aligned: ClassVar[tuple[str, ...]] = ("body",)
    inner: ClassVar[tuple[str, ...]] = ("body",)
    mask: ClassVar[str] = "keep"
    keep: Form  # bool, the shape of the weight
    body: Form

    def decode(self, keep: Tensor | None = None) -> Tensor:
        mask = self.within(keep)
        body = self.body.decode(mask)
        return torch.where(mask, body, body.new_zeros(()))

    def within(self, keep: Tensor | None) -> Tensor:
        """This form's mask, narrowed by the mask above."""
        mask = self.keep.decode()
        return mask if keep is None else mask & keep

    def take(self, axis: int, index: Tensor) -> Masked:
        plain = uncoded(self).children()  # hidden elements were not coded
        return Masked(plain["keep"].take(axis, index), plain["body"].take(axis, index))

    @property
    def shape(self) -> Shape:
        return self.keep.shape

    def zeroed(self, where: Tensor) -> Form | None:
        body = self.body.zeroed(where)
        return None if body is None else self.replace(body=body)

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        mask, body = facts["keep"], facts["body"]
        demand(mask.dtype is torch.bool, f"a mask of {mask.dtype}")
        demand(mask.shape == body.shape, f"mask {list(mask.shape)}, body {list(body.shape)}")
        return body
