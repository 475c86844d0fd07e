"""Scaled rows: a form with each row multiplied by a number; its mask, factors, codes and tables stay.

w'[o, ...] = factor[o] * w[o, ...]
Dense       the array                Masked      its body; zeros stay zeros
LowRank     its left factor          Sum         both parts
Affine, LogGrid    scale * |factor|, in a row of its own; codes change sign where the factor is negative
Codebook    its scales, or the tables of its rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.dtypes import HALVES
from tersor.forms import Affine, At, Codebook, Dense, Form, LogGrid, LowRank, Masked, Sum
from tersor.forms.form import from_rows, to_rows
from tersor.maths.uniform_grid import limits


def scaled(form: Form, factor: Tensor, axis: int) -> Form | None:
    """The form of decode() * factor, one factor for each index of the axis. None if the form cannot hold it.
    Coded leaves are not known: give uncoded(form)."""
    if isinstance(form, Dense):
        return times(form, along(factor, axis, len(form.shape)))
    if isinstance(form, Masked):
        body = scaled(form.body, factor, axis)
        return None if body is None else form.replace(body=body)
    if isinstance(form, LowRank):
        side = "left" if axis == 0 else "right"
        part = scaled(form.children()[side], factor, axis)
        return None if part is None else form.replace(**{side: part})
    if isinstance(form, Sum):
        a, b = scaled(form.a, factor, axis), scaled(form.b, factor, axis)
        return None if a is None or b is None else Sum(a, b)
    if isinstance(form, (Affine, LogGrid, Codebook)) and form.axis == axis and len(form.shape) > 1:
        return scaled_codebook(form, factor) if isinstance(form, Codebook) else scaled_grid(form, factor)
    return None


def multiplied(form: Form, whole: Tensor) -> Form | None:
    """The form of decode() * whole, of any shape that broadcasts. Only arrays, masked or not, can hold it."""
    if isinstance(form, Masked):
        body = multiplied(form.body, whole)
        return None if body is None else form.replace(body=body)
    return times(form, whole) if isinstance(form, Dense) else None


def widened(form: Form, dtype: torch.dtype) -> Form:
    """The form with its 16-bit floats in the weight's own dtype, if that is wider: rounded again, a product
    would be another function."""

    def change(at: At) -> Form | None:
        if not at.body:
            return None if at.weights else at.node
        if isinstance(at.node, Dense) and at.node.dtype in HALVES.values() and dtype.itemsize > 2:
            return Dense(at.node.array.to(dtype))
        return at.node

    return At(form).rebuilt(change)


def times(form: Dense, whole: Tensor) -> Dense:
    return Dense((form.array.double() * whole).to(form.dtype))


def along(factor: Tensor, axis: int, axes: int) -> Tensor:
    """[N] with axes of length 1 around it."""
    return factor.reshape([-1 if k == axis else 1 for k in range(axes)])


def scaled_grid(form: Affine | LogGrid, factor: Tensor) -> Form | None:
    rows = to_rows(form.codes.decode(), form.axis)  # [O, I]
    zero = None if not isinstance(form, Affine) or form.zero is None else form.zero.decode()
    codes = turned(rows, factor, 0 if zero is None else 1)
    low, high = limits(form.bits, zero is None)
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        return None
    fields: dict[str, Form] = {
        "codes": Dense(from_rows(codes.to(rows.dtype), form.shape, form.axis).contiguous()),
        "scale": own_rows(form.scale, torch.where(factor == 0, 1.0, factor.abs())),
    }
    if zero is not None:
        fields["zero"] = Dense(turned(zero.expand(len(rows), -1), factor, 1).to(zero.dtype).contiguous())
    return form.replace(**fields)


def turned(codes: Tensor, factor: Tensor, shift: int) -> Tensor:
    """int32 codes [O, N], or zero points, with the sign of the row's factor; 0 where that is 0.

    Beside a zero point the lowest code has no negative: there c becomes -1 - c, and so does the zero point.
    """
    sign, codes = factor.sign()[:, None], codes.to(torch.int32)
    return torch.where(sign < 0, -shift - codes, codes).masked_fill(sign == 0, 0)


def scaled_codebook(form: Codebook, factor: Tensor) -> Form:
    book = form.book.decode()
    if book.ndim == 2:
        return form.replace(book=times(Dense(book), factor[:, None]))
    scale = Dense(torch.ones(1, 1, dtype=book.dtype)) if form.scale is None else form.scale
    return form.replace(scale=own_rows(scale, factor))


def own_rows(table: Form, factor: Tensor) -> Form:
    """A table of scales [1, 1], [O, 1] or [O, G] times the factors, with a row for each of them."""
    if table.shape[0] == len(factor) and (found := scaled(table, factor, 0)) is not None:
        return found
    return times(Dense(table.decode().expand(len(factor), -1).contiguous()), factor[:, None])
