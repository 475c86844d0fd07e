"""Arrays: elements of one byte or more as streams, a plane of bytes each, one behind the other.

Of a long array no plane is held whole: what codes in pieces is taken, coded and dropped piece by piece, and
all planes are decoded side by side, a slice of elements at a time. Of a large tensor every copy counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np

from tersor.coders.bytes.planes import AT_ONCE, Plane, Read, join
from tersor.coders.choice import decode, decode_parts, encode_onto
from tersor.coders.pages import LARGE
from tersor.coders.plan import Output, longest
from tersor.errors import FormatError

LONG = 1 << 20  # elements from which a plane is not taken whole


def encode_array(
    read: Read, count: int, itemsize: int, *, turned: bool, coder: str, width: int,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, list[int]]:  # fmt: skip
    """(streams, bytes of each) of `count` elements. `turned`: they are floats, turned by one bit first. The
    rest as in `encode`."""
    streams, ends = Output(itemsize * longest(count)), [0]
    for k in range(itemsize):
        plane = Plane(read, count, itemsize, k, turned=turned)
        encode_onto(streams, plane if count > LONG else plane[:], coder, width=width, keep=keep)
        ends.append(len(streams))
    found = streams.found()
    # Of small arrays what was not needed would be kept; of large ones it never was taken.
    return found if len(streams.data) >= LARGE else found.copy(), [b - a for a, b in pairwise(ends)]


def decode_array(
    streams: np.ndarray, lengths: Sequence[int], itemsize: int, count: int,
    *, turned: bool, width: int, keep: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The inverse, bytes uint8 [count * itemsize]; FormatError where these are no streams of them."""
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
    """The same, `step` elements at a time; of none one slice."""
    planes = planes_in(streams, lengths, itemsize)
    for _, parts in in_slices(planes, count, step, width, None):
        out = np.empty(len(parts[0]) * itemsize, dtype=np.uint8)
        join(parts, itemsize, out, turned=turned)
        yield out


def planes_in(streams: np.ndarray, lengths: Sequence[int], itemsize: int) -> list[np.ndarray]:
    """The stream of each plane."""
    ends = [0, *accumulate(lengths)]
    if len(lengths) != itemsize or ends[-1] != len(streams):
        raise FormatError(f"streams of {tuple(lengths)} bytes for {itemsize} planes in {len(streams)} bytes")
    return [streams[a:b] for a, b in pairwise(ends)]


def in_slices(
    planes: Sequence[np.ndarray], count: int, step: int, width: int, keep: np.ndarray | None
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(place of the first, symbols of each plane) of `step` elements at a time; of none one slice."""
    parts = [SymbolQueue(decode_parts(plane, count, width=width, keep=keep)) for plane in planes]
    for begin in range(0, max(count, 1), step):
        yield begin, [part.take(min(step, count - begin)) for part in parts]


class SymbolQueue:
    """Symbols that come in parts of any size, taken in others."""

    def __init__(self, parts: Iterator[np.ndarray]) -> None:
        self.parts, self.rest = parts, next(parts)

    def take(self, size: int) -> np.ndarray:
        """The next symbols, so many."""
        found, missing = [self.rest[:size]], size - len(self.rest)
        self.rest = self.rest[size:]
        while missing > 0:
            part = next(self.parts)
            found.append(part[:missing])
            self.rest = part[missing:]
            missing -= len(part)
        return found[0] if len(found) == 1 else np.concatenate(found)
