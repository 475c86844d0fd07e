"""Texts: files beside the weights (configuration, tokenizer), coded against their earlier bytes.

new     the first bytes of OLD, a middle, the last bytes of OLD
middle  blocks, each deflated with a dictionary: OLD around the same place, then the bytes before the block
cost    one deflate of 40 kB for 8 kB of the middle. Ids that all moved by one cost a digit or two a line
docs/format.md section 12, "Texts".
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain

from tersor.errors import FormatError
from tersor.io.json_text import inflate_up_to

BLOCK = 1 << 13  # bytes of the middle in a block
AROUND = 3 << 13  # bytes of OLD in a block's dictionary
WINDOW = 32_256  # bytes of a dictionary that deflate can reach from the next byte


def text_streams(new: bytes, old: bytes) -> tuple[list[int], list[bytes]]:
    """([bytes of OLD first, bytes of the middle, bytes of OLD last], a stream for each block)."""
    first = common(new, old)
    last = common(new[first:][::-1], old[first:][::-1])
    middle, replaced = (data[first : len(data) - last] for data in (new, old))
    streams = []
    for at in range(0, len(middle), BLOCK):
        packer = zlib.compressobj(
            9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary(middle, at, len(middle), replaced)
        )
        streams.append(packer.compress(middle[at : at + BLOCK]) + packer.flush())
    return [first, len(middle), last], streams


def text_from(lengths: list[int], streams: Iterator[bytes], old: bytes) -> bytes:
    """The inverse of text_streams. FormatError for wrong lengths or streams."""
    first, size, last = lengths
    if first + last > len(old):
        raise FormatError(f"it takes {first + last:,} bytes of the old file, which has {len(old):,}")
    middle, replaced = bytearray(), old[first : len(old) - last]
    while len(middle) < size:
        stream = next(streams, None)
        if stream is None:
            raise FormatError("it has fewer streams than its length needs")
        most = min(BLOCK, size - len(middle))
        block, rest, whole = inflate_up_to(stream, most, dictionary(middle, len(middle), size, replaced))
        if len(block) != most or rest or not whole:
            raise FormatError("a block of its text has a wrong length: it is damaged")
        middle += block
    if next(streams, None) is not None:
        raise FormatError("it has more streams than its length needs")
    return b"".join(chain((old[:first], bytes(middle), old[len(old) - last :])))


def dictionary(middle: bytes | bytearray, at: int, size: int, replaced: bytes) -> bytes:
    """The dictionary of the block at byte `at`, in a middle of `size` bytes that replaces `replaced`."""
    centre = (at + BLOCK // 2) * len(replaced) // size
    begin = max(0, min(centre - AROUND // 2, len(replaced) - AROUND))
    around = replaced[begin : begin + AROUND]
    return around + bytes(middle[max(0, at + len(around) - WINDOW) : at])  # no more: it is copied


def common(one: bytes, other: bytes) -> int:
    """The number of equal bytes at the beginning of both."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # the longest equal beginning, by halving: comparing bytes one by one is slow
        half = (low + high + 1) // 2
        low, high = (half, high) if one[low:half] == other[low:half] else (low, half - 1)
    return low
