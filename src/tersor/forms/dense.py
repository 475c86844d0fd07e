"""Dense: the array itself.

w = array        any dtype, any shape; the leaf that every other leaf decodes to
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.forms.form import Form


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Form):
    """A weight, or a part of one, stored as it is."""

    name: ClassVar[str] = "dense"
    array: Tensor

    def decode(self, keep: Tensor | None = None) -> Tensor:
        return self.array

    def take(self, axis: int, index: Tensor) -> Dense:
        return Dense(self.array.index_select(axis, index))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)
