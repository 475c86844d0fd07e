"""Sum: two forms of the same shape, added.

w = a + b        low rank plus a sparse residual, a coarse grid plus a correction
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.dtypes import FLOATS
from tersor.forms.form import Fact, Facts, Form, Shape, demand, wider


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Form):
    """a + b."""

    name: ClassVar[str] = "sum"
    aligned: ClassVar[tuple[str, ...]] = ("a", "b")
    inner: ClassVar[tuple[str, ...]] = ("a", "b")
    a: Form
    b: Form

    def decode(self, keep: Tensor | None = None) -> Tensor:
        return self.a.decode(keep) + self.b.decode(keep)

    def take(self, axis: int, index: Tensor) -> Sum:
        return Sum(self.a.take(axis, index), self.b.take(axis, index))

    @property
    def shape(self) -> Shape:
        return self.a.shape

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        a, b = facts["a"], facts["b"]
        demand(a.shape == b.shape, f"a sum of {list(a.shape)} and {list(b.shape)}")
        demand(a.dtype in FLOATS and b.dtype in FLOATS, f"a sum of {a.dtype} and {b.dtype}")
        return Fact(a.shape, wider(a, b))
