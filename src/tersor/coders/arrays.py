"""Arrays: elements of one byte or more as streams, a plane of bytes each, one behind the other.

Each plane is dropped when it is coded, and decoded when its turn comes: of a large tensor every copy counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tersor.coders import decode, encode
from tersor.coders.planes import join, split
from tersor.errors import FormatError


def encode_array(
    data: np.ndarray, itemsize: int, *, turned: bool, coder: str, width: int, keep: np.ndarray | None = None
) -> tuple[bytearray, list[int]]:
    """(streams, bytes of each) of elements given as bytes uint8 [N * itemsize], low bytes first.

    `turned`: they are floats, turned by one bit first. The rest as in `encode`.
    """
    planes = split(data, itemsize, turned)
    streams, lengths = bytearray(), []
    while planes:
        stream = encode(planes.pop(0), coder, width=width, keep=keep)
        streams += stream
        lengths.append(len(stream))
    return streams, lengths


def decode_array(
    streams: np.ndarray, lengths: Sequence[int], itemsize: int, count: int,
    *, turned: bool, width: int, keep: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The inverse, bytes uint8 [count * itemsize]; FormatError where these are no streams of them."""
    ends = np.cumsum((0, *lengths))
    if len(lengths) != itemsize or ends[-1] != len(streams):
        raise FormatError(f"streams of {tuple(lengths)} bytes for {itemsize} planes in {len(streams)} bytes")
    planes = (decode(streams[a:b], count, width=width, keep=keep) for a, b in pairwise(ends))
    if not count:
        return np.concatenate(list(planes))  # nothing, which is for decode to check
    return join(planes, itemsize, count, turned)
