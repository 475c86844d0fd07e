"""Planes: elements wider than a byte as streams of bytes that are alike, and back.

Floats are turned by one bit first, the sign to the lowest place: the highest byte is then the exponent, which
codes well, and signs keep company with the mantissas, which hardly code at all.
Cost: one pass over the bytes, compiled for 2 and 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

MANY = 64 << 20  # bytes from which memory counts more than one pass more


def split(data: np.ndarray, itemsize: int, turned: bool) -> list[np.ndarray]:
    """Bytes uint8 [N * itemsize], low bytes first -> planes [N], the lowest first, in memory of their own."""
    from tersor.coders import planes_loops

    if turned and itemsize == 2:
        return list(planes_loops.split16(data.view(np.uint16)))
    if turned and itemsize == 4:
        return list(planes_loops.split32(data.view(np.uint32)))
    if turned:
        words = data.view(f"u{itemsize}")
        data = ((words << 1) | (words >> (8 * itemsize - 1))).view(np.uint8)
    return [np.ascontiguousarray(data[k::itemsize]) for k in range(itemsize)]


def join(planes: Iterable[np.ndarray], itemsize: int, count: int, turned: bool) -> np.ndarray:
    """The inverse, bytes uint8 [N * itemsize], from planes [N] one by one."""
    from tersor.coders import planes_loops

    if turned and itemsize in (2, 4) and count * itemsize < MANY:
        joined = planes_loops.join16 if itemsize == 2 else planes_loops.join32
        return joined(*planes).view(np.uint8)
    if itemsize == 1:
        (plane,) = planes
        return plane
    out = np.empty(count * itemsize, dtype=np.uint8)
    for k, plane in enumerate(planes):
        planes_loops.put(out, plane, itemsize, k)
        del plane  # before the next is decoded
    words = out.view(f"u{itemsize}")
    if turned and itemsize == 2:
        planes_loops.turn_back16(words)
    elif turned and itemsize == 4:
        planes_loops.turn_back32(words)
    elif turned:
        words[:] = (words >> 1) | (words << (8 * itemsize - 1))
    return out
