"""Change: an array told by an earlier one of its shape: what a patch holds of a tensor.

integers of a byte   new - old mod 256, coded apart where old is zero and where not: pruned weights stay pruned
wider, and floats    the difference of ordered words, or what of their bits differs: planes of bytes
grids that moved     old codes are rounded to the new grid first, so that only what really changed is coded
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tersor.coders import decode, encode
from tersor.errors import FormatError
from tersor.forms.coded import DTYPES, MANY_FLOATS, columns
from tersor.forms.form import as_bytes

SUBTRACT, XOR = "subtract", "xor"
SAMPLE = 1 << 16  # elements that tell which of the two is shorter


def fitted(old: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """`old` where it overlaps the new shape, zero elsewhere; None where they have nothing in common."""
    if old.dtype != dtype or old.ndim != len(shape):
        return None
    if tuple(old.shape) == shape:
        return old
    base = torch.zeros(shape, dtype=dtype)
    both = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
    base[both] = old[both]
    return base


def tell(new: Tensor, base: Tensor, keep: Tensor | None = None) -> tuple[str, list[bytes]]:
    """(how, streams) that rebuild `new` from `base`; with `keep` (bool, their shape) only where it is true."""
    if new.dtype.itemsize == 1:
        return SUBTRACT, tell_bytes(new, base, keep)
    mine, theirs = words_of(new, keep), words_of(base, keep)
    told = {how: difference(mine, theirs, how) for how in (SUBTRACT, XOR)}
    sizes = {how: sum(len(s) for s in planes(d[:SAMPLE], "fast")) for how, d in told.items()}
    how = min(sizes, key=lambda how: sizes[how])
    many = new.dtype.is_floating_point and len(mine) > MANY_FLOATS
    return how, planes(told[how], "fast" if many else "max")


def rebuild(how: str, streams: list[bytes], base: Tensor, keep: Tensor | None = None) -> Tensor:
    """The inverse of `tell`: [base's shape], zero where `keep` is false."""
    if how not in (SUBTRACT, XOR):
        raise FormatError(f"a change is told by {how[:20]!r}; known are {SUBTRACT} and {XOR}")
    if base.dtype.itemsize == 1:
        return rebuild_bytes(streams, base, keep)
    theirs = words_of(base, keep)
    if len(streams) != base.dtype.itemsize:
        raise FormatError(f"{len(streams)} streams for elements of {base.dtype.itemsize} bytes")
    found = [decode(stream, len(theirs)) for stream in streams]
    told = np.stack(found, axis=-1).reshape(-1).view(theirs.dtype)
    if how == SUBTRACT:
        told = (told >> 1) ^ (0 - (told & 1)).astype(told.dtype)  # zigzag back
        words = theirs + told
    else:
        words = theirs ^ told
    return placed(unordered(words, base.dtype), base, keep)


def tell_bytes(new: Tensor, base: Tensor, keep: Tensor | None) -> list[bytes]:
    mine, theirs = (as_bytes(t) for t in (new, base))
    step = mine - theirs
    return [
        encode(step[where], "max", width=columns(tuple(new.shape)), keep=where)
        for where in (theirs == 0, theirs != 0)
        for where in [where if keep is None else where & keep.reshape(-1).numpy()]
    ]


def rebuild_bytes(streams: list[bytes], base: Tensor, keep: Tensor | None) -> Tensor:
    if len(streams) != 2:
        raise FormatError(f"{len(streams)} streams for elements of a byte, where 2 are needed")
    theirs = as_bytes(base)
    step = np.zeros(len(theirs), dtype=np.uint8)
    for where, stream in zip((theirs == 0, theirs != 0), streams, strict=True):
        mine = where if keep is None else where & keep.reshape(-1).numpy()
        step[mine] = decode(stream, int(mine.sum()), width=columns(tuple(base.shape)), keep=mine)
    flat = theirs + step
    if keep is not None:
        flat[~keep.reshape(-1).numpy()] = 0
    if base.dtype is torch.bool and flat.max(initial=0) > 1:
        raise FormatError("a bool of the patch is neither 0 nor 1")
    return torch.from_numpy(flat).view(base.dtype).reshape(base.shape)


def words_of(array: Tensor, keep: Tensor | None) -> np.ndarray:
    """The elements as unsigned words in the order of their values, [N]."""
    flat = array.reshape(-1) if keep is None else array[keep]
    words = as_bytes(flat).view(f"u{array.dtype.itemsize}")
    if not array.dtype.is_floating_point:
        return words
    top = words.dtype.type(1) << (8 * array.dtype.itemsize - 1)
    # Negative floats are ordered backward, and below all positive ones.
    return np.where(words & top, ~words, words | top)


def unordered(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        top = words.dtype.type(1) << (8 * dtype.itemsize - 1)
        words = np.where(words & top, words & ~top, ~words)
    return torch.from_numpy(np.ascontiguousarray(words).view(np.uint8)).view(dtype)


def difference(mine: np.ndarray, theirs: np.ndarray, how: str) -> np.ndarray:
    if how == XOR:
        return mine ^ theirs
    step = mine - theirs
    sign = step >> (8 * step.itemsize - 1)
    return (step << 1) ^ (0 - sign).astype(step.dtype)  # zigzag: small steps either way are small numbers


def planes(told: np.ndarray, profile: str) -> list[bytes]:
    split = told.view(np.uint8).reshape(-1, told.itemsize).T
    return [encode(np.ascontiguousarray(plane), profile) for plane in split]


def placed(elements: Tensor, base: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return elements.reshape(base.shape)
    whole = torch.zeros(base.shape, dtype=base.dtype)
    whole[keep] = elements
    return whole


def known(dtype: str) -> torch.dtype:
    """A dtype that a patch may name."""
    if dtype not in DTYPES:
        raise FormatError(f"a part of the patch has dtype {dtype[:20]!r}; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]
