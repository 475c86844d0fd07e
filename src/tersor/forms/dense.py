"""Dense: the array itself.

w = array        any dtype, any shape; other leaves decode to this one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tersor.forms.form import Fact, Facts, Form, Shape, as_bytes


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Form):
    """A weight, or a part of one, stored as it is."""

    name: ClassVar[str] = "dense"
    array: Tensor

    def decode(self, keep: Tensor | None = None) -> Tensor:
        return self.array

    def take(self, axis: int, index: Tensor) -> Dense:
        return Dense(self.array.index_select(axis, index))

    def zeroed(self, where: Tensor) -> Dense:
        return Dense(torch.where(where.cpu(), self.array.new_zeros(()), self.array))

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        return Fact(self.shape, self.dtype)

    def reader(self) -> Callable[[int, int], np.ndarray]:
        """A function (begin, end) -> bytes of the elements begin to end."""
        data, size = as_bytes(self.array), self.dtype.itemsize
        return lambda begin, end: data[begin * size : end * size]

    @property
    def dtype(self) -> torch.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)
