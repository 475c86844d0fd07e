"""Short header: the tiny kind of .tersor file, for files of a few kB. docs/format.md section 11.

4 bytes of magic, 4 of CRC, the deflated text, then all leaves     about 100 bytes instead of 1,000
The file has no digests, no ledger and no separate tensors. It is read whole.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO

from tersor.errors import FormatError, RefusedError
from tersor.io.dictionary import TINY_DICTIONARY
from tersor.io.header import Slot
from tersor.io.json_text import allowed, deflate, inflate_up_to
from tersor.io.safetensors_file import TensorFile

MAGIC = b"TSR\x01"  # as the length of a safetensors header it is above the limit
LARGEST = 1 << 26  # bytes of a file, which is held in memory whole


class Source(TensorFile):
    """An open file of either kind. A tiny file is not read until read_short_header()."""

    tiny = False

    def _header(self) -> tuple[dict[str, Slot], dict[str, str]]:
        if self.bytes(0, min(self.nbytes, len(MAGIC))) != MAGIC:
            return super()._header()
        self.tiny = True
        return {}, {}


def write_short_header(out: BinaryIO, text: bytes, leaves: bytes) -> int:
    """Write the file and return its size. RefusedError if it is too large to be read whole."""
    body = deflate(text, TINY_DICTIONARY) + leaves
    size = len(MAGIC) + 4 + len(body)
    if size > LARGEST:
        raise RefusedError(
            f"tiny: the file would have {size:,} bytes, but one with the short header has at most "
            f"{LARGEST:,}, since it is read whole. Leave out --tiny (tiny=True)"
        )
    out.write(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)
    return size


def read_short_header(source: Source) -> tuple[bytes, bytes]:
    """(text, leaves)."""
    if not len(MAGIC) + 4 < source.nbytes <= LARGEST:
        raise FormatError(
            f"it has the short header and {source.nbytes:,} bytes, but such a file has more than 8 and at "
            f"most {LARGEST:,}: it is damaged"
        )
    data = source.bytes(len(MAGIC), source.nbytes)
    body = data[4:]
    if zlib.crc32(body) != int.from_bytes(data[:4], "little"):
        raise FormatError("it is damaged: the CRC of its bytes is not the one in its header")
    text, leaves, whole = inflate_up_to(body, allowed(len(body)), TINY_DICTIONARY)
    if not whole:
        raise FormatError(f"its text does not end within {len(text):,} bytes: the file is damaged")
    return text, leaves
