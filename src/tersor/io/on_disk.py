"""On disk: a weight that stays in its file. Each access reads it again, a slice of it if that suffices.

Work on slices (a digest, a check, coding a plane) needs little memory. A step that needs the whole tensor
gets it and may drop it. The system caches recent reads, so a second access is a copy from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.forms import Dense, Form
from tersor.forms.form import SLICE, as_bytes

Elements = Callable[[int, int], Tensor]  # (begin, end) -> those elements, flat


class OnDisk(Dense):
    """A dense leaf whose array is read from its file on each access."""

    _dtype: torch.dtype
    _shape: tuple[int, ...]
    _read: Elements

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], read: Elements) -> None:
        for key, value in {"_dtype": dtype, "_shape": shape, "_read": read}.items():
            object.__setattr__(self, key, value)

    @property
    def array(self) -> Tensor:
        return self._read(0, math.prod(self._shape)).reshape(self._shape)

    def children(self) -> dict[str, Form]:
        return {}  # this and the methods below do not read the array

    def settings(self) -> dict[str, Any]:
        return {}

    def slices(self) -> Iterator[Tensor]:
        count = math.prod(self._shape)
        return (self._read(at, min(at + SLICE, count)) for at in range(0, max(count, 1), SLICE))

    def payload(self) -> Iterator[np.ndarray]:
        return map(as_bytes, self.slices())

    def reader(self) -> Callable[[int, int], np.ndarray]:
        return lambda begin, end: as_bytes(self._read(begin, end))

    def outlines(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"array": (self._dtype, self._shape)}

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape
