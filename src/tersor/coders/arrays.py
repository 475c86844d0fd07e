"""Arrays: elements of one or more bytes, coded as one stream for each byte plane.

Plane k holds byte k of every element. The streams of all planes follow each other. To save memory on large
tensors, a plane of a long array is read and coded piece by piece, and all planes are decoded together, one
slice of elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np

from tersor.coders.bytes.planes import AT_ONCE, Plane, Read, join
from tersor.coders.choice import decode, decode_parts, encode_onto
from tersor.coders.pages import LARGE
from tersor.coders.plan import Output, longest_stream
from tersor.errors import FormatError

LONG = 1 << 20  # elements: planes of longer arrays are not held in memory


def encode_array(
    read: Read, count: int, itemsize: int, *, turned: bool, coder: str, width: int,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, list[int]]:  # fmt: skip
    """(all streams uint8, bytes of each stream) for `count` elements that `read` returns.

    `turned`: the elements are floats, and each is first rotated left by one bit (planes.py). `coder`, `width`
    and `keep` as in `encode`.
    """
    streams, ends = Output(itemsize * longest_stream(count)), [0]
    for k in range(itemsize):
        plane = Plane(read, count, itemsize, k, turned=turned)
        symbols = plane if count > LONG else plane[:]
        encode_onto(streams, symbols, coder, width=width, keep=keep, floats=turned)
        ends.append(len(streams))
    found = streams.view()
    # A small buffer is copied to free its unused end. The unused pages of a large one were never allocated.
    return found if len(streams.data) >= LARGE else found.copy(), [b - a for a, b in pairwise(ends)]


def decode_array(
    streams: np.ndarray, lengths: Sequence[int], itemsize: int, count: int,
    *, turned: bool, width: int, keep: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Inverse of `encode_array`: bytes uint8 [count * itemsize]. FormatError if the streams do not fit."""
    planes = planes_in(streams, lengths, itemsize)
    if itemsize == 1:
        return decode(planes[0], count, width=width, keep=keep)
    out = np.empty(count * itemsize, dtype=np.uint8)
    for begin, parts in in_slices(planes, count, AT_ONCE, width, keep):
        join(parts, itemsize, out[itemsize * begin : itemsize * (begin + AT_ONCE)], turned=turned)
    return out


def decode_slices(
    streams: np.ndarray, lengths: Sequence[int], itemsize: int, count: int,
    *, turned: bool, width: int, step: int,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Like `decode_array`, in slices of `step` elements. An empty array is one empty slice."""
    planes = planes_in(streams, lengths, itemsize)
    for _, parts in in_slices(planes, count, step, width, None):
        out = np.empty(len(parts[0]) * itemsize, dtype=np.uint8)
        join(parts, itemsize, out, turned=turned)
        yield out


def planes_in(streams: np.ndarray, lengths: Sequence[int], itemsize: int) -> list[np.ndarray]:
    """The stream of each plane."""
    ends = [0, *accumulate(lengths)]
    if len(lengths) != itemsize or ends[-1] != len(streams):
        raise FormatError(
            f"coded array: streams of {tuple(lengths)} bytes, but {itemsize} streams of {len(streams)} bytes "
            "in all are needed"
        )
    return [streams[a:b] for a, b in pairwise(ends)]


def in_slices(
    planes: Sequence[np.ndarray], count: int, step: int, width: int, keep: np.ndarray | None
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(index of the first element, symbols of each plane) for each slice of `step` elements."""
    parts = [SymbolQueue(decode_parts(plane, count, width=width, keep=keep)) for plane in planes]
    for begin in range(0, max(count, 1), step):
        yield begin, [part.take(min(step, count - begin)) for part in parts]


class SymbolQueue:
    """Regroups an iterator of symbol arrays into arrays of requested sizes."""

    def __init__(self, parts: Iterator[np.ndarray]) -> None:
        self.parts, self.rest = parts, next(parts)

    def take(self, size: int) -> np.ndarray:
        """The next `size` symbols."""
        found, missing = [self.rest[:size]], size - len(self.rest)
        self.rest = self.rest[size:]
        while missing > 0:
            part = next(self.parts)
            found.append(part[:missing])
            self.rest = part[missing:]
            missing -= len(part)
        return found[0] if len(found) == 1 else np.concatenate(found)
