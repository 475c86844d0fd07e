"""Torch records: where the tensors of a torch.save file are, so that they can be read one by one."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

from tersor.errors import FormatError

# What reading a damaged file of torch.save raises.
DAMAGED = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, AssertionError,
    ArithmeticError, ImportError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def records_of(path: Path) -> dict[int, int]:
    """Records of a checkpoint: offset -> bytes, for a zip that is not compressed and is little-endian. Empty
    for other files, which must be loaded whole."""
    if not zipfile.is_zipfile(path):
        return {}
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
            if orders not in ([], [b"little"]):
                return {}
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    return {}
                # The central directory points to a record's own header: 30 bytes, a name, extra fields.
                file.seek(entry.header_offset)
                name, extra = struct.unpack("<26x2H", file.read(30))
                found[entry.header_offset + 30 + name + extra] = entry.file_size
    except (OSError, *DAMAGED) as error:
        raise FormatError(f"{path}: it is a damaged zip file: {error}") from None
    return found
