"""Streams: a second, simple and slow decoder of coded streams, by docs/streams.md. Does not use Tersor.

decode(stream, count, width, keep)      returns symbols as a uint8 array, or raises BadStream with the reason
"""

from __future__ import annotations

import numpy as np
from mixing import mixing
from predictive import predictive
from static import BadStream, Bits, check, static

__all__ = ["BadStream", "decode"]


# 2. The first byte


def decode(
    stream: bytes | np.ndarray, count: int, width: int = 0, keep: np.ndarray | None = None
) -> np.ndarray:
    """Decode `count` symbols. width: columns of the matrix, 0 for one row. keep: bool mask of the matrix."""
    data = bytes(stream)
    check(len(data) > 0, "no bytes")
    if count == 0:
        check(data == b"\0", "a stream of no symbols must be the byte 0")
        return np.zeros(0, dtype=np.uint8)
    check(count > 0, "a count below 0")
    settings, coder = divmod(data[0], 8)
    if coder < 4:
        return static(data, count)
    check(coder < 7, f"unknown coder {coder}")
    check(keep is None or int(keep.sum()) == count, "a mask that keeps another number of symbols")
    elements = count if keep is None else keep.size
    width = width or elements
    check(elements % width == 0, "the matrix has no whole number of rows")
    if coder == 6:
        return pieces(settings, data, count)
    matrix_coder = mixing if coder == 5 else predictive
    return np.array(matrix_coder(settings, data, count, width, keep), dtype=np.uint8)


# 12. pieces


def pieces(settings: int, data: bytes, count: int) -> np.ndarray:
    source = Bits(data, 1)
    n = 2 + source.g(0)
    check(settings == 0 and n <= -(-count // 2**15), "bad settings, or more pieces than units")
    sizes = [(1 + source.g(0)) * 2**15 for _ in range(n - 1)]
    lengths = [source.g(15) for _ in range(n - 1)]
    at = source.padding()
    check(sum(sizes) < count and at + sum(lengths) < len(data), "pieces beyond the end")
    found = []
    for size, length in zip([*sizes, count - sum(sizes)], [*lengths, len(data)], strict=True):
        stream = data[at : at + length]
        check(len(stream) > 0 and stream[0] % 8 < 4, "a piece is not by a static coder")
        found.append(static(stream, size))
        at += length
    return np.concatenate(found)
