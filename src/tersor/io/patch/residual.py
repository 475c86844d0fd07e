"""Residual: streams that code an array as its difference from an earlier array, the base.

bytes    new - base mod 256; elements with base 0 have their own stream: pruned weights mostly stay zero
wider    differences of words that are ordered by value, sign in the lowest bit, one stream per plane; floats
         are grouped by the exponent of the base, since training moves similar floats by similar amounts
cost     about that of coders.encode; about 50 bytes of memory per element of a piece
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tersor.coders import decode, encode
from tersor.encode.leaves import MANY_FLOATS
from tersor.errors import FormatError
from tersor.forms.coded import columns
from tersor.forms.form import as_bytes

PIECE = 1 << 22  # elements in a piece, for elements wider than a byte
LEAST = 1 << 12  # fewest elements in a group: a frequency table for fewer costs more than it saves
MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}  # bits


def fitted(old: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """`old` cut or zero-padded to the new shape and dtype. None if axes or dtypes do not fit."""
    if old.ndim != len(shape) or (old.dtype != dtype and not {old.dtype, dtype} <= MANTISSA.keys()):
        return None
    old = old.to(dtype)
    if tuple(old.shape) == shape:
        return old
    base = torch.zeros(shape, dtype=dtype)
    both = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
    base[both] = old[both]
    return base


def residual_streams(
    new: Tensor, base: Tensor | None, keep: Tensor | None = None, profile: str = "max"
) -> Iterator[bytes]:
    """Yield the streams that code `new` against `base` (same dtype and shape; None: without a base).

    With `keep` (bool, same shape) only the kept elements are coded.
    """
    if new.dtype.itemsize == 1:
        yield from byte_streams(new, base, keep, profile)
        return
    words, before = kept_words(new, keep), None if base is None else kept_words(base, keep)
    floats = new.dtype.is_floating_point
    if floats and len(words) > MANY_FLOATS:
        profile = "fast"
    for piece in pieces(len(words)):
        if before is None:
            yield from (encode(plane, profile) for plane in planes(rotated(words[piece], floats)))
            continue
        steps = folded(ordered(words[piece], floats) - ordered(before[piece], floats))
        for group in groups(before[piece], new.dtype):
            yield from (encode(plane, profile) for plane in planes(steps[group]))


def rebuild(
    streams: Iterator[bytes],
    base: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    keep: Tensor | None = None,
) -> Tensor:
    """The inverse of residual_streams: the array, 0 where `keep` is false. FormatError for bad streams."""
    if dtype.itemsize == 1:
        return rebuild_bytes(streams, base, dtype, shape, keep)
    floats = dtype.is_floating_point
    before = None if base is None else kept_words(base, keep)
    flat = np.zeros(math.prod(shape), dtype=f"u{dtype.itemsize}")
    words = flat if keep is None else np.empty(int(keep.sum()), dtype=flat.dtype)
    for piece in pieces(len(words)):
        if before is None:
            words[piece] = rotated_back(joined(streams, len(words[piece]), words.dtype), floats)
            continue
        values = ordered(before[piece], floats)
        for group in groups(before[piece], dtype):
            values[group] += unfolded(joined(streams, len(group), words.dtype))
        words[piece] = unordered(values, floats)
    if keep is not None:
        flat[mask_of(keep)] = words
    if not len(flat):
        return torch.empty(shape, dtype=dtype)  # view() to another dtype refuses empty arrays
    return torch.from_numpy(flat.view(np.uint8)).view(dtype).reshape(shape)


def byte_streams(new: Tensor, base: Tensor | None, keep: Tensor | None, profile: str) -> Iterator[bytes]:
    mask, width = mask_of(keep), columns(tuple(new.shape))
    if base is None:
        flat = as_bytes(new)
        yield encode(flat if mask is None else flat[mask], profile, width=width, keep=mask)
        return
    before = as_bytes(base)
    step = as_bytes(new) - before
    for where in halves(before, mask):
        yield encode(step[where], profile, width=width, keep=where)


def rebuild_bytes(
    streams: Iterator[bytes],
    base: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    keep: Tensor | None,
) -> Tensor:
    mask, width = mask_of(keep), columns(shape)
    flat = np.zeros(math.prod(shape), dtype=np.uint8)
    if base is None:
        where = slice(None) if mask is None else mask
        flat[where] = decode(next_stream(streams), len(flat[where]), width=width, keep=mask)
    else:
        before = as_bytes(base)
        for half in halves(before, mask):
            step = decode(next_stream(streams), int(half.sum()), width=width, keep=half)
            flat[half] = before[half] + step
    if dtype is torch.bool and flat.max(initial=0) > 1:
        raise FormatError("a bool is neither 0 nor 1")
    return torch.from_numpy(flat).view(dtype).reshape(shape)


def next_stream(streams: Iterator[bytes]) -> bytes:
    stream = next(streams, None)
    if stream is None:
        raise FormatError("it has fewer streams than its elements need")
    return stream


def pieces(count: int) -> Iterator[slice]:
    return (slice(at, at + PIECE) for at in range(0, count, PIECE))


def mask_of(keep: Tensor | None) -> np.ndarray | None:
    return None if keep is None else keep.reshape(-1).numpy()


def halves(before: np.ndarray, mask: np.ndarray | None) -> Iterator[np.ndarray]:
    """Masks of the elements that are coded together: with base 0, then the others."""
    for where in (before == 0, before != 0):
        yield where if mask is None else where & mask


def kept_words(array: Tensor, keep: Tensor | None) -> np.ndarray:
    """The kept elements as unsigned words with the same bits, [N]."""
    words = as_bytes(array).view(f"u{array.dtype.itemsize}")
    return words if keep is None else words[mask_of(keep)]


def groups(words: np.ndarray, dtype: torch.dtype) -> list[np.ndarray]:
    """Indices of the elements that are coded together: floats by the exponent of the base, lowest first,
    integers by whether the base is 0. A group of fewer than LEAST elements is joined with the next one."""
    if dtype in MANTISSA:
        classes = (words << 1 >> (MANTISSA[dtype] + 1)).astype(np.int64)
    else:
        classes = (words != 0).astype(np.int64)
    cuts, begin, end = [], 0, 0
    for count in np.bincount(classes).tolist():
        end += count
        if end - begin >= LEAST and len(classes) - end >= LEAST:
            cuts.append(end)
            begin = end
    return np.split(np.argsort(classes, kind="stable"), cuts)


def ordered(words: np.ndarray, floats: bool) -> np.ndarray:
    """A copy of the words whose order is that of the values; integers are unchanged."""
    if not floats:
        return words.copy()
    top = words.dtype.type(1) << (8 * words.itemsize - 1)
    # The bits of negative floats are in reverse order; they must come below all positive ones.
    return np.where(words & top, ~words, words | top)


def unordered(words: np.ndarray, floats: bool) -> np.ndarray:
    """The inverse of `ordered`."""
    if not floats:
        return words
    top = words.dtype.type(1) << (8 * words.itemsize - 1)
    return np.where(words & top, words & ~top, ~words)


def folded(step: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: small steps of either sign become small numbers (zigzag)."""
    sign = step >> (8 * step.itemsize - 1)
    return (step << 1) ^ (0 - sign).astype(step.dtype)


def unfolded(step: np.ndarray) -> np.ndarray:
    return (step >> 1) ^ (0 - (step & 1)).astype(step.dtype)


def rotated(words: np.ndarray, floats: bool) -> np.ndarray:
    """Floats rotated left by one bit: the exponent fills the high byte, the sign is the lowest bit."""
    return words << 1 | words >> (8 * words.itemsize - 1) if floats else words


def rotated_back(words: np.ndarray, floats: bool) -> np.ndarray:
    return words >> 1 | words << (8 * words.itemsize - 1) if floats else words


def planes(words: np.ndarray) -> Iterator[np.ndarray]:
    """The planes of the words, lowest bytes first."""
    data = words.view(np.uint8)
    return (np.ascontiguousarray(data[k :: words.itemsize]) for k in range(words.itemsize))


def joined(streams: Iterator[bytes], count: int, dtype: np.dtype) -> np.ndarray:
    """The words whose planes are in the next streams."""
    data = np.empty(count * dtype.itemsize, dtype=np.uint8)
    for k in range(dtype.itemsize):
        data[k :: dtype.itemsize] = decode(next_stream(streams), count)
    return data.view(dtype)
