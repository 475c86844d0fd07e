"""Filed: a weight that stays in its file. Each look reads it anew, a slice of it where that is enough.

What is looked at slice by slice (a digest, a check, a plane that is coded) takes no memory then; a step that
asks for the whole gets it, and may drop it. The system keeps what was just read: a second look is a copy.
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

Elements = Callable[[int, int], Tensor]  # from here to there, flat


class OnDisk(Dense):
    """A dense leaf whose array is read when it is asked for."""

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
        return {}  # found without a look at the array, as all that follows

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
