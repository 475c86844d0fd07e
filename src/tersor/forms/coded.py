"""Coded: a leaf as the bytes of an entropy coder (Huffman, rANS, raw), without loss.

w = decode(data)        the stream's first byte names the coder: docs/streams.md
stored  about the order-0 entropy of the leaf's bytes; elements wider than a byte are coded plane by plane
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tersor.errors import FormatError
from tersor.forms.dense import Dense
from tersor.forms.form import Form, as_bytes

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Coded(Form):
    """A leaf stored as a coded stream."""

    name: ClassVar[str] = "coded"
    data: Tensor  # uint8, one dimension: the planes' streams, one behind the other
    size: tuple[int, ...]  # shape of the leaf
    dtype: str  # dtype of the leaf
    planes: tuple[int, ...]  # bytes of each plane's stream, lowest byte of the elements first
    pack: bool = False  # a mask, eight elements to a byte before coding
    kept: bool = False  # only the elements that the mask above keeps are in the stream

    def decode(self, keep: Tensor | None = None) -> Tensor:
        count = math.prod(self.size)
        if self.dtype not in DTYPES:
            raise FormatError(f"a coded leaf has dtype {self.dtype[:40]!r}; known are {', '.join(DTYPES)}")
        if self.kept:
            if keep is None or tuple(keep.shape) != tuple(self.size):
                raise FormatError(
                    "a coded leaf leaves out what a mask hides, but no mask of its shape stands above it"
                )
            flat = torch.zeros(count, dtype=DTYPES[self.dtype])
            flat[keep.reshape(-1).cpu()] = self._elements(int(keep.sum()))
        else:
            flat = self._elements(count)
        return flat.reshape(self.size)

    def _elements(self, count: int) -> Tensor:
        from tersor.coders import decode  # brings numba, which `import tersor` must not

        dtype = DTYPES[self.dtype]
        data = self.data.cpu().numpy()
        ends = np.cumsum((0, *self.planes))
        if len(self.planes) != dtype.itemsize or ends[-1] != len(data):
            raise FormatError(
                f"a coded leaf has streams of {self.planes} bytes for {self.dtype} in {len(data)} bytes"
            )
        symbols = -(-count // 8) if self.pack else count
        planes = [decode(data[a:b], symbols) for a, b in zip(ends, ends[1:], strict=False)]
        if dtype is torch.bool:
            if self.pack:
                return torch.from_numpy(np.unpackbits(planes[0], count=count).view(np.bool_))
            return torch.from_numpy(planes[0]) != 0
        return torch.from_numpy(np.stack(planes, axis=-1).reshape(-1)).view(dtype)

    def take(self, axis: int, index: Tensor) -> Dense:
        return Dense(self.decode()).take(axis, index)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)


def coded(array: Tensor, keep: Tensor | None = None, coder: str = "auto") -> Coded:
    """The leaf as a stream; with `keep` (bool, its shape) only what is kept is in it. A mask is tried both
    ways: an element a symbol, and eight elements to a byte."""
    from tersor.coders import encode

    size, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    elements = array.reshape(-1) if keep is None else array[keep]
    flat = as_bytes(elements).reshape(-1, array.dtype.itemsize)
    streams = [encode(np.ascontiguousarray(plane), coder) for plane in flat.T]
    pack = False
    if array.dtype is torch.bool:
        packed = [encode(np.packbits(flat), coder)]
        pack = len(packed[0]) < len(streams[0])
        streams = packed if pack else streams
    data = torch.from_numpy(np.frombuffer(b"".join(streams), np.uint8).copy())
    return Coded(data, size, dtype, tuple(map(len, streams)), pack, keep is not None)


def uncoded(form: Form, keep: Tensor | None = None) -> Form:
    """The same tree with plain leaves in place of coded ones; `keep` is the mask above, as in Form.decode."""
    if isinstance(form, Coded):
        return Dense(form.decode(keep))
    within = getattr(form, "within", None)  # a mask narrows what the nodes below it must store
    inner = within(keep) if within else keep
    fields = {
        key: uncoded(child, inner if key in form.aligned else None) for key, child in form.children().items()
    }
    same = all(fields[key] is child for key, child in form.children().items())
    return form if same else form.replace(**fields)
