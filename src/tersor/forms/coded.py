"""Coded: a leaf as the bytes of an entropy coder, without loss.

w = decode(data)        the stream's first byte names the coder: docs/streams.md
stored  the order-0 entropy of the leaf's bytes, or less; one stream per plane, floats rotated left by one bit
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tersor.dtypes import CODED
from tersor.forms.at import At
from tersor.forms.dense import Dense
from tersor.forms.form import SLICE, Fact, Facts, Form, Shape, demand

MIXING, SLOW = 5, 4  # the id of the coder that mixes contexts, and how much longer it takes than the others
PROFILES = ("max", "fast", "huffman", "rans")  # how a leaf may be coded, and coded again after a cut


@dataclass(frozen=True, eq=False, repr=False)
class Coded(Form):
    """A leaf stored as a coded stream."""

    name: ClassVar[str] = "coded"
    data: Tensor  # uint8, one dimension: the streams of the planes, concatenated
    size: tuple[int, ...]  # shape of the leaf
    dtype: str  # dtype of the leaf
    planes: tuple[int, ...]  # bytes of each plane's stream, plane 0 (lowest bytes) first
    pack: bool = False  # a mask with eight elements packed into a byte before coding
    kept: bool = False  # the streams hold only the elements that the mask above keeps
    turned: bool = False  # floats rotated left by one bit, so that the exponent fills a plane
    coder: str = "max"  # the profile it was coded with

    def decode(self, keep: Tensor | None = None) -> Tensor:
        dtype = self.fact({}, None if keep is None else tuple(keep.shape)).dtype
        if not self.kept or keep is None:
            return self._elements(math.prod(self.size), dtype).reshape(self.size)
        flat, mask = torch.zeros(math.prod(self.size), dtype=dtype), keep.reshape(-1).cpu()
        # Not flat[mask] = ...: for a lone element that fills through a double, which quiets a signaling NaN.
        flat.masked_scatter_(mask, self._elements(int(mask.sum()), dtype, mask.numpy()))
        return flat.reshape(self.size)

    def slices(self) -> Iterator[Tensor]:
        if self.kept or self.pack:
            return super().slices()
        from tersor.coders.arrays import decode_slices  # brings numba, which `import tersor` must not

        dtype, data = self.fact({}, None).dtype, self.data.cpu().numpy()
        found = decode_slices(
            data, self.planes, dtype.itemsize, math.prod(self.size), turned=self.turned,
            width=columns(self.size), step=SLICE,
        )  # fmt: skip
        return (as_elements(part, dtype) for part in found)

    def _elements(self, count: int, dtype: torch.dtype, keep: np.ndarray | None = None) -> Tensor:
        from tersor.coders import decode
        from tersor.coders.arrays import decode_array

        data = self.data.cpu().numpy()
        if self.pack:
            return torch.from_numpy(np.unpackbits(decode(data, -(-count // 8)), count=count).view(np.bool_))
        found = decode_array(
            data, self.planes, dtype.itemsize, count, turned=self.turned, width=columns(self.size), keep=keep
        )
        return as_elements(found, dtype)

    def take(self, axis: int, index: Tensor) -> Dense:
        return Dense(self.decode()).take(axis, index)

    @property
    def shape(self) -> Shape:
        return tuple(self.size)

    def fact(self, facts: Facts, keep: Shape | None) -> Fact:
        demand(self.dtype in CODED, f"dtype {self.dtype[:40]!r} is not coded; coded are {', '.join(CODED)}")
        dtype, planes, data = CODED[self.dtype], self.planes, self.data
        demand(len(planes) == dtype.itemsize, f"{len(planes)} streams for {self.dtype}")
        fine = data.dtype is torch.uint8 and data.ndim == 1 and sum(planes) == len(data)
        demand(fine, f"streams of {list(planes)} bytes in {data.dtype} {list(data.shape)}")
        demand(not self.pack or dtype is torch.bool, f"pack is set for {self.dtype}, but only bool is packed")
        fine = not self.turned or dtype.is_floating_point
        demand(fine, f"turned is set for {self.dtype}, but only floats are turned")
        demand(not self.kept or keep == self.shape, "kept is set, but no mask of its shape is above it")
        fine = self.coder in PROFILES
        demand(fine, f"coder {self.coder[:40]!r} is not known; known are {', '.join(PROFILES)}")
        return Fact(self.shape, dtype)

    def work(self, facts: Facts) -> int:
        ids, at = [], 0
        for nbytes in self.planes:
            ids += [int(byte) & 7 for byte in self.data[at : at + 1]]
            at += nbytes
        return (SLOW - 1) * math.prod(self.size) * ids.count(MIXING)


def as_elements(data: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Bytes [N * itemsize] as elements [N]."""
    if not len(data):
        return torch.empty(0, dtype=dtype)
    elements = torch.from_numpy(data)
    return elements != 0 if dtype is torch.bool else elements.view(dtype)


def columns(size: tuple[int, ...]) -> int:
    """Columns of a leaf viewed as a matrix whose rows are its first axis; 0 if it has one row."""
    return math.prod(size[1:]) if len(size) > 1 else 0


def uncoded(form: Form, keep: Tensor | None = None) -> Form:
    """The same tree with dense leaves in place of coded ones; `keep` is the mask above, as in Form.decode."""

    def change(at: At) -> Form | None:
        mask = at.node.children().get(at.node.mask)
        if mask is not None and (plain := uncoded(mask)) is not mask:  # once for all that it hides
            return uncoded(at.node.replace(**{at.node.mask: plain}), at.keep)
        return Dense(at.node.decode(at.keep)) if isinstance(at.node, Coded) else None

    return At(form, given=keep).rebuilt(change)
