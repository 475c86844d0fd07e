"""Planes: split elements of several bytes into byte planes, and join them again.

Plane k is byte k of every element, since equal bytes of different elements have similar statistics. Floats
are first rotated left by one bit, which moves the sign to the lowest bit. The highest byte is then the
exponent, which compresses well, and the sign is in a plane of mantissa bits, which hardly compress. Cost: one
compiled pass over the elements for each plane. A plane is read in parts and never held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tersor.errors import FormatError

AT_ONCE = 1 << 18  # elements read at a time: they stay in cache, also when several threads read
Read = Callable[[int, int], np.ndarray]  # (begin, end) -> bytes uint8 of these elements, little-endian


class Plane:
    """Byte k of each element, as symbols. plane[a:b] is read on access."""

    def __init__(self, read: Read, count: int, itemsize: int, k: int, *, turned: bool) -> None:
        self.read, self.count, self.itemsize, self.k, self.turned = read, count, itemsize, k, turned

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self.count)
        if self.itemsize == 1:
            return self.read(begin, end)
        out = np.empty(max(end - begin, 0), dtype=np.uint8)
        for at in range(begin, end, AT_ONCE):
            data = self.read(at, min(at + AT_ONCE, end))
            out[at - begin : at - begin + AT_ONCE] = plane_of(data, self.itemsize, self.k, turned=self.turned)
        return out


def plane_of(data: np.ndarray, itemsize: int, k: int, *, turned: bool) -> np.ndarray:
    """Byte k of each element [N], from bytes uint8 [N * itemsize]. Elements of one byte are not rotated."""
    if not turned or itemsize == 1:
        return np.ascontiguousarray(data[k::itemsize])
    from tersor.coders.bytes import planes_loops

    return planes_loops.take(data.view(f"u{itemsize}"), k)


def join(planes: Sequence[np.ndarray], itemsize: int, out: np.ndarray, *, turned: bool) -> None:
    """Inverse: fill `out`, bytes uint8 [N * itemsize], from all planes [N], lowest byte first."""
    if any(len(plane) * itemsize != len(out) for plane in planes):
        raise FormatError(
            f"coded array: planes of {[len(plane) for plane in planes]} symbols do not make {len(out)} bytes"
        )
    if turned and itemsize in (2, 4):
        from tersor.coders.bytes import planes_loops

        joined = planes_loops.join16 if itemsize == 2 else planes_loops.join32
        joined(*planes, out.view(f"u{itemsize}"))
        return
    for k, plane in enumerate(planes):
        out[k::itemsize] = plane
    if turned:
        words = out.view(f"u{itemsize}")
        words[:] = (words >> 1) | (words << (8 * itemsize - 1))
