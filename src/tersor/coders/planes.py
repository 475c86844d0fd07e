"""Planes: elements wider than a byte as streams of bytes that are alike, and back.

Floats are turned by one bit first, the sign to the lowest place: the highest byte is then the exponent, which
codes well, and signs keep company with the mantissas, which hardly code at all.
Cost: one pass over the bytes, compiled for 2 and 4 bytes.
"""

from __future__ import annotations

import numpy as np


def split(data: np.ndarray, itemsize: int, turned: bool) -> np.ndarray:
    """Bytes uint8 [N * itemsize], low bytes first -> planes [itemsize, N], the lowest first."""
    from tersor.coders import planes_loops

    if turned and itemsize == 2:
        return planes_loops.split16(data.view(np.uint16))
    if turned and itemsize == 4:
        return planes_loops.split32(data.view(np.uint32))
    if turned:
        words = data.view(f"u{itemsize}")
        data = ((words << 1) | (words >> (8 * itemsize - 1))).view(np.uint8)
    return np.ascontiguousarray(data.reshape(-1, itemsize).T)


def join(planes: list[np.ndarray], turned: bool) -> np.ndarray:
    """The inverse: bytes uint8 [N * itemsize]."""
    from tersor.coders import planes_loops

    if turned and len(planes) == 2:
        return planes_loops.join16(*planes).view(np.uint8)
    if turned and len(planes) == 4:
        return planes_loops.join32(*planes).view(np.uint8)
    data = planes[0] if len(planes) == 1 else np.stack(planes, axis=-1).reshape(-1)
    if turned:
        words = data.view(f"u{len(planes)}")
        data = ((words >> 1) | (words << (8 * len(planes) - 1))).view(np.uint8)
    return data
