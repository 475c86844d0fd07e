"""Form: how one weight is stored, as a small tree of frozen values.

A leaf holds arrays; an inner node says how to decode its children. A field that is a Form is a child, a
tensor is an array, None is absent, anything else is a setting. Digest, size and walking follow from the
fields alone, so a form is its dataclass, `decode` and `take`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

SLICE = 1 << 18  # elements looked at at a time: what is asked of each may take ten times their bytes
DIGEST = 16  # hex digits of a digest: 64 bits, for telling states apart, not against forgers


@dataclass(frozen=True, eq=False)
class Form:
    """How one weight is stored. Arrays are never written to once they are in a form."""

    name: ClassVar[str]
    aligned: ClassVar[tuple[str, ...]] = ()  # children with one element for each element of this form

    def decode(self, keep: Tensor | None = None) -> Tensor:
        """The tensor that this form stands for.

        `keep` is a mask from above (bool, this form's shape): where it is False any value may come back, so
        that a mask's body need not store what the mask hides.
        """
        raise TypeError(f"{type(self).__name__} has no decode")

    def slices(self) -> Iterator[Tensor]:
        """What decode returns, flat and in order, SLICE elements at a time; of none one slice. Leaves do not
        make the whole for it."""
        yield from self.decode().reshape(-1).split(SLICE)

    def take(self, axis: int, index: Tensor) -> Form:
        """The form of decode().index_select(axis, index); index is int64, 1-D."""
        raise TypeError(f"{type(self).__name__} has no take")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what decode returns."""
        raise TypeError(f"{type(self).__name__} has no shape")

    def children(self) -> dict[str, Form]:
        return {key: value for key, value in self._fields() if isinstance(value, Form)}

    def arrays(self) -> dict[str, Tensor]:
        return {key: value for key, value in self._fields() if isinstance(value, Tensor)}

    def outlines(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each array."""
        return {key: (array.dtype, tuple(array.shape)) for key, array in self.arrays().items()}

    def payload(self) -> Iterator[np.ndarray]:
        """The bytes of the arrays, in order."""
        return (as_bytes(array) for array in self.arrays().values())

    def settings(self) -> dict[str, Any]:
        """Fields that are neither children nor arrays nor at their default: what JSON says of this node."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            key: value
            for key, value in self._fields()
            if not isinstance(value, (Form, Tensor)) and value != defaults[key]
        }

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    @cached_property
    def digest(self) -> str:
        """Changes when any array, setting or child does; the same on every machine."""
        sha = hashlib.sha256()
        head = {
            "form": self.name,
            "settings": self.settings(),
            "children": {key: child.digest for key, child in self.children().items()},
            "arrays": {key: [str(dtype), list(shape)] for key, (dtype, shape) in self.outlines().items()},
        }
        sha.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        for data in self.payload():
            sha.update(data.data)
        return sha.hexdigest()[:DIGEST]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in this tree."""
        return sum(
            math.prod(shape) * dtype.itemsize
            for _, node in self.walk()
            for dtype, shape in node.outlines().values()
        )

    def walk(self, path: str = "") -> Iterator[tuple[str, Form]]:
        """(path, node) for this node and all below it; the root's path is "", a child's "codes" or
        "body.codes"."""
        yield path, self
        for key, child in self.children().items():
            yield from child.walk(f"{path}.{key}" if path else key)

    def replace(self, **fields: Any) -> Self:
        return dataclasses.replace(self, **fields)

    def __repr__(self) -> str:
        inside = [repr(child) for child in self.children().values()]
        inside += [f"{key}={value!r}" for key, value in self.settings().items()]
        inside += [f"{str(array.dtype)[6:]}{list(array.shape)}" for array in self.arrays().values()]
        return f"{type(self).__name__}({', '.join(inside)})"


def as_bytes(array: Tensor) -> np.ndarray:
    """The array's bytes in row-major order, as a flat uint8 view where no copy is needed."""
    flat = array.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def to_rows(w: Tensor, axis: int) -> Tensor:
    """[..., O at axis, ...] -> [O, I]; a vector or a scalar is one row, so that it can share one grid."""
    if w.ndim <= 1:
        return w.reshape(1, -1)
    return w.movedim(axis, 0).flatten(1)  # reshape(O, -1) would not know I where O is 0


def from_rows(rows: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The inverse of to_rows, for a tensor of this shape."""
    if len(shape) <= 1:
        return rows.reshape(shape)
    order = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(order).movedim(0, axis)
