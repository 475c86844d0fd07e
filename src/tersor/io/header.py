"""Header: names, dtypes, shapes and byte ranges of the tensors of a safetensors file, without payload.

8 bytes N, N bytes of JSON, then the tensors, concatenated     docs/format.md section 1
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tersor.dtypes import CODES
from tersor.errors import FormatError, RefusedError
from tersor.io.json_text import dump, parse

LONGEST = 100_000_000  # bytes of a header; the limit of the safetensors library
AXES = 16
ALIGN = 8  # the payload begins at a multiple of this, so that wide elements are aligned

DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Slot:
    """Dtype, shape and byte range of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # from the file's first byte
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def check_shape(value: Any, who: str) -> tuple[int, ...]:
    """A shape from JSON. FormatError unless it is a short list of lengths whose product is below 2^62."""
    fine = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    if not fine or len(value) > AXES or math.prod(v for v in value if v) >= 2**62:
        raise FormatError(f"{who} must be a short list of lengths, not {str(value)[:60]}")
    return tuple(value)


def parse_header(raw: bytes, room: int) -> tuple[dict[str, Slot], dict[str, str]]:
    """(slots by name, metadata). `room`: bytes after the header, which the tensors must fill exactly."""
    header: dict[str, Any] = parse(raw, "its header")  # an object: the caller checked that it begins with {
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ in its header must be an object of strings")
    slots = {name: parse_slot(name, entry, 8 + len(raw)) for name, entry in header.items()}
    at = 8 + len(raw)
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
        if slot.begin != at:
            what = "overlaps another" if slot.begin < at else "leaves a hole before it"
            raise FormatError(f"{name[:200]}: its range of bytes {what}")
        at = slot.end
    if at != 8 + len(raw) + room:
        missing = at - 8 - len(raw) - room
        what = (
            f"it is cut off: {missing:,} bytes are missing" if missing > 0 else f"{-missing:,} bytes too many"
        )
        raise FormatError(what)
    return slots, metadata


def parse_slot(name: str, entry: Any, start: int) -> Slot:
    who = f"{name[:200]}: its entry in the header"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{who} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(
            f"{who} has dtype {str(entry['dtype'])[:20]!r}; known are {', '.join(DTYPES)}. Store others as "
            f"bytes (U8)"
        )
    shape = check_shape(entry["shape"], f"{who}: shape")
    offsets = entry["data_offsets"]
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(v) is int and v >= 0 for v in offsets)
    ):
        raise FormatError(f"{who}: data_offsets must be two whole numbers, not {str(offsets)[:60]}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{who}: {entry['dtype']} {list(shape)} needs {math.prod(shape) * dtype.itemsize:,} bytes, "
            f"its range has {end - begin:,}"
        )
    return Slot(dtype, shape, start + begin, start + end)


def build_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Length, JSON and padding, for tensors (name, dtype, shape, nbytes) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape, nbytes in entries:
        if name in header or name == "__metadata__":
            raise RefusedError(
                f"{name}: two tensors of the file would have this name; rename one in the model"
            )
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    try:
        text = dump(header)
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"the name of a tensor cannot be encoded in UTF-8: {error.object!r:.200}"
        ) from None
    text += b" " * (-len(text) % ALIGN)
    if len(text) > LONGEST:
        raise RefusedError(f"the names of the tensors take {len(text):,} bytes; a file holds {LONGEST:,}")
    return len(text).to_bytes(8, "little") + text


def natural(digits: str) -> int | None:
    """A whole number in decimal digits; None for anything else."""
    return int(digits) if re.fullmatch(r"[0-9]{1,18}", digits) else None
