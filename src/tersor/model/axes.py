"""Axes: forms reshaped or transposed without decoding; grids stay grids, streams stay streams if possible.

with_ones   [O, I] -> [O, I, 1, 1]     a matrix as the weight of a 1x1 convolution
turned      [O, I] -> [I, O]           a table's factor as the weight of a linear layer
Exact: the new form decodes to the same numbers, reshaped or transposed.
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
    """The form of decode() with `count` axes of length 1 appended."""

    def place(array: Tensor) -> Tensor:
        return array.reshape(*array.shape, *[1] * count)

    def coded(leaf: Coded, keep: Tensor | None) -> Form:
        return leaf.replace(size=(*leaf.size, *[1] * count))  # rows and columns of the stream do not change

    def product(form: LowRank) -> Form:
        return form.replace(right=with_ones(form.right, count))

    return _Moved(place, coded, product, lambda axis: axis).form(form) if count else form


def transposed(form: Form) -> Form:
    """The form of decode().T, for a matrix. RefusedError for other shapes."""
    if len(form.shape) != 2:
        raise RefusedError(f"a form of shape {list(form.shape)} is not a matrix and cannot be transposed")

    def place(array: Tensor) -> Tensor:
        return array.T.contiguous()

    def coded(leaf: Coded, keep: Tensor | None) -> Form:
        return Dense(place(leaf.decode(keep)))  # a stream depends on the order of elements

    def product(form: LowRank) -> Form:
        return LowRank(transposed(form.right), transposed(form.left))

    return _Moved(place, coded, product, lambda axis: 1 - axis).form(form)


@dataclass(frozen=True)
class _Moved:
    """One change of axes, applied to every array of a form that has one element per weight."""

    place: Callable[[Tensor], Tensor]  # for an array
    coded: Callable[[Coded, Tensor | None], Form]  # for a stream, with the mask above it
    product: Callable[[LowRank], Form]
    axis: Callable[[int], int]  # for the axis of rows

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
