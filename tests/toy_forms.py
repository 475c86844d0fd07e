"""Two forms that the project does not have, each with its trainable part: what a new form is, and all of it.

Scaled   body * factor[o]            a structure: its body is weights, and any form
Fixed    codes * 2^-point            a body: it holds the numbers
Rescale  a step that stores weights in both
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.dtypes import FLOATS
from tersor.encode import refine
from tersor.forms import Dense, Form
from tersor.forms.form import Fact, Facts, Shape, demand, from_rows, to_rows
from tersor.forms.ongrid import rows_of
from tersor.model.trainable_parts import Part, RoundedPart, Structure
from tersor.record.events import Edit, Group, Note, site_group


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Form):
    name: ClassVar[str] = "scaled"
    aligned: ClassVar[tuple[str, ...]] = ("body",)
    inner: ClassVar[tuple[str, ...]] = ("body",)
    body: Form
    factor: Form  # float [O, 1]
    axis: int = 0

    def decode(self, keep: Tensor | None = None) -> Tensor:
        body = self.body.decode(keep)
        return from_rows(to_rows(body, self.axis) * self.factor.decode(), tuple(body.shape), self.axis)

    def take(self, axis: int, index: Tensor) -> Scaled:
        cut = axis % len(self.shape) == self.axis and len(self.shape) > 1
        factor = self.factor.take(0, index) if cut else self.factor
        return self.replace(body=self.body.take(axis, index), factor=factor)

    @property
    def shape(self) -> Shape:
        return self.body.shape

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        body, factor = facts["body"], facts["factor"]
        demand(factor.shape == (rows_of(body.shape, self.axis)[0], 1), f"a factor of {list(factor.shape)}")
        demand(body.dtype in FLOATS and body.dtype is factor.dtype, f"{body.dtype} times {factor.dtype}")
        return body


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Form):
    name: ClassVar[str] = "fixed"
    aligned: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Form  # int16
    point: int

    def decode(self, keep: Tensor | None = None) -> Tensor:
        return self.codes.decode(keep).float() * 2.0**-self.point

    def take(self, axis: int, index: Tensor) -> Fixed:
        return self.replace(codes=self.codes.take(axis, index))

    @property
    def shape(self) -> Shape:
        return self.codes.shape

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        demand(facts["codes"].dtype is torch.int16, f"codes of {facts['codes'].dtype}")
        return Fact(facts["codes"].shape, torch.float32)


class ScaledPart(Structure):
    def __init__(self, form: Scaled, *inner: Part):
        super().__init__(form, *inner)
        self.form = form

    def join(self, *values: Tensor) -> Tensor:
        rows = to_rows(values[0], self.form.axis) * self.form.factor.decode()
        return from_rows(rows, tuple(values[0].shape), self.form.axis)

    def fold(self) -> Form:
        return self.form.replace(**{name: part.fold() for name, part in self.parts()})


class FixedPart(RoundedPart):
    def __init__(self, form: Fixed, keep: Tensor | None = None):
        super().__init__()
        self.form = form
        self.w = nn.Parameter(form.decode().clone())

    def value(self) -> Tensor:
        return self.w + (self.fold().decode() - self.w).detach()

    def fold(self) -> Form:
        return fixed(self.w.detach(), self.form.point)


def fixed(w: Tensor, point: int) -> Fixed:
    return Fixed(Dense((w.float() * 2.0**point).round().clamp(-32767, 32767).to(torch.int16)), point)


def scaled(w: Tensor, axis: int, point: int = 8) -> Scaled:
    rows = to_rows(w.float(), axis)
    factor = rows.abs().amax(1, keepdim=True).clamp_min(1e-3)
    return Scaled(
        fixed(from_rows(rows / factor, tuple(w.shape), axis).contiguous(), point), Dense(factor), axis
    )


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """Store weights as fixed-point numbers times a factor a row."""

    name: ClassVar[str] = "rescale"
    where: str = "*"

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def run(self, view: View) -> Iterator[Group]:
        for site in view.each(self.where):
            after, how = refine(view.form(site), lambda w, keep, axis: scaled(w, axis), site.axis)
            edit = Edit(site.name, view.form(site), after, how)
            yield site_group(site.name, edit, Note(site.name, "done", "rescaled"))
