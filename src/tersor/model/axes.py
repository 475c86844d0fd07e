"""Axes: forms with their axes named anew, without decoding: grids stay grids, streams stay streams.

with_ones   [O, I] -> [O, I, 1, 1]     a matrix as the weight of a convolution of one pixel
turned      [O, I] -> [I, O]           a table's factor as the weight of a linear layer
Exact: the new form decodes to the old one's numbers, each in its new place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.errors import RefusedError
from tersor.forms import Coded, Dense, Form, LowRank, Masked


def with_ones(form: Form, count: int) -> Form:
    """The form of decode()[..., None, None], with as many ones."""

    def place(array: Tensor) -> Tensor:
        return array.reshape(*array.shape, *[1] * count)

    def coded(leaf: Coded, keep: Tensor | None) -> Form:
        return leaf.replace(size=(*leaf.size, *[1] * count))  # rows and their columns stay as they are

    def product(form: LowRank) -> Form:
        return form.replace(right=with_ones(form.right, count))

    return _Moved(place, coded, product, lambda axis: axis).form(form) if count else form


def turned(form: Form) -> Form:
    """The form of decode().T, for a matrix."""
    if len(form.shape) != 2:
        raise RefusedError(f"a form of shape {list(form.shape)} is no matrix: it has no other side up")

    def place(array: Tensor) -> Tensor:
        return array.T.contiguous()

    def coded(leaf: Coded, keep: Tensor | None) -> Form:
        return Dense(place(leaf.decode(keep)))  # the order of its elements is another

    def product(form: LowRank) -> Form:
        return LowRank(turned(form.right), turned(form.left))

    return _Moved(place, coded, product, lambda axis: 1 - axis).form(form)


@dataclass(frozen=True)
class _Moved:
    """One way of moving axes, for every form: what has an element for each element moves with it."""

    place: Callable[[Tensor], Tensor]  # of an array
    coded: Callable[[Coded, Tensor | None], Form]  # of a stream, with the mask above it
    product: Callable[[LowRank], Form]
    axis: Callable[[int], int]  # of rows

    def form(self, form: Form, keep: Tensor | None = None) -> Form:
        if isinstance(form, Dense):
            return Dense(self.place(form.array))
        if isinstance(form, Coded):
            return self.coded(form, keep)
        if isinstance(form, LowRank):
            return self.product(form)
        within = form.within(keep) if isinstance(form, Masked) else keep
        fields: dict[str, Any] = {
            key: self.form(child, within) for key, child in form.children().items() if key in form.aligned
        }
        if isinstance(form, Masked):
            fields["keep"] = self.form(form.keep)
        if "axis" in {field.name for field in dataclasses.fields(form)}:
            fields["axis"] = self.axis(form.axis)  # type: ignore[attr-defined]
        return form.replace(**fields)
