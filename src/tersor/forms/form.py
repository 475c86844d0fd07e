"""Form: how one weight is stored, as a small tree that decodes to a tensor.

structure   a form whose `inner` children decode to weights: a mask, a product, a sum
body        a form with no `inner` children: it holds the numbers, as codes and tables or as they are
A form defines its fields, `decode`, `take`, `shape`, `fact`, and the class variables about its children. Code
that traverses, prunes, quantizes, codes or checks a tree uses nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from tersor.errors import FormatError
from tersor.forms.node import DIGEST, Node, as_bytes  # noqa: F401  other modules import them from here

SLICE = 1 << 18  # elements processed at a time: temporaries can take ten times their bytes

Shape = tuple[int, ...]
Moments = tuple[Tensor | None, Tensor | None]  # F and H: full, a diagonal, or None for a diagonal of ones


class Fact(NamedTuple):
    """What a node decodes to."""

    shape: Shape
    dtype: torch.dtype


Facts = Mapping[str, Fact]  # of the children


@dataclass(frozen=True, eq=False, repr=False)
class Form(Node):
    """How one weight is stored."""

    aligned: ClassVar[tuple[str, ...]] = ()  # children with one element for each element of this form
    inner: ClassVar[tuple[str, ...]] = ()  # children that decode to weights
    mask: ClassVar[str] = ""  # the child that hides elements of the aligned ones
    rows: ClassVar[int | None] = None  # the axis of the inner children's rows; None: that of this form
    dtypes: ClassVar[Mapping[str, str]] = {
        "keep": "bool", "index": "uint8", "codes": "int8", "zero": "int16", "scale": "float32",
        "book": "float32", "member": "uint8",
    }  # of children in files, if not stated; others have their parent's  # fmt: skip

    def decode(self, keep: Tensor | None = None) -> Tensor:
        """The tensor that this form represents.

        `keep` is the mask above (bool, this form's shape). Where it is False any value may be returned, so
        a mask's body need not store hidden elements.
        """
        self._lacks("decode")

    def take(self, axis: int, index: Tensor) -> Form:
        """The form of decode().index_select(axis, index); index is int64, 1-D."""
        self._lacks("take")

    @property
    def shape(self) -> Shape:
        """Shape of what decode returns."""
        self._lacks("shape")

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        """Shape and dtype of the decoded tensor, from settings and the children's facts, without decoding.
        FormatError if they do not fit. `keep`: the shape of the mask above."""
        raise FormatError(f"no rule for the form {self.name}")

    def work(self, facts: Facts) -> int:
        """What decoding costs besides one step for each element of this form, in elements. `fact` holds."""
        return 0

    def bounds(self) -> dict[str, tuple[int, int, str]]:
        """Allowed elements by child: (lowest, highest, what they index, for the message)."""
        return {}

    def zeroed(self, where: Tensor) -> Form | None:
        """The form with zeros where `where` is true. None if single elements cannot be set to zero."""
        return None

    def weigh(self, rows: Tensor | None, columns: Tensor | None) -> tuple[Moments, ...]:
        """F and H of each inner child, given that an error E of this form costs tr(F E H E^T)."""
        return ((rows, columns),) * len(self.inner)

    def within(self, keep: Tensor | None) -> Tensor | None:
        """The mask for aligned children: the mask above, narrowed by this form's own if it has one."""
        return keep

    def slices(self) -> Iterator[Tensor]:
        """The decoded tensor, flat and in order, SLICE elements at a time. An empty tensor gives one slice.
        Leaves do not decode the whole tensor for it."""
        yield from self.decode().reshape(-1).split(SLICE)

    def children(self) -> dict[str, Form]:
        return cast(dict[str, Form], super().children())

    def walk(self, path: str = "") -> Iterator[tuple[str, Form]]:
        return cast(Iterator[tuple[str, Form]], super().walk(path))

    def _lacks(self, what: str) -> NoReturn:
        raise TypeError(f"{type(self).__name__} has no {what}")


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FormatError(otherwise)


def wider(a: Fact, b: Fact) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def to_rows(w: Tensor, axis: int) -> Tensor:
    """[..., O at axis, ...] -> [O, I]; a vector or a scalar becomes one row, so that it has one grid."""
    if w.ndim <= 1:
        return w.reshape(1, -1)
    return w.movedim(axis, 0).flatten(1)  # reshape(O, -1) would not know I where O is 0


def from_rows(rows: Tensor, shape: Shape, axis: int) -> Tensor:
    """The inverse of to_rows, for a tensor of this shape."""
    if len(shape) <= 1:
        return rows.reshape(shape)
    order = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(order).movedim(0, axis)
