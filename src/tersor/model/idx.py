"""IDX: the array format of the MNIST family, read strictly.

0 0 dtype ndim, then ndim sizes of 4 bytes (big endian), then the values; dtype 8 is an unsigned byte.
LeCun, Cortes, Burges 1998. Cost: one read; memory is bounded by the file's data, not by its header's sizes.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np

from tersor.errors import TaskError

CHUNK = 1 << 20


def find(folder: Path, name: str) -> Path:
    """The file `name` in the folder, or `name`.gz; TaskError if there is neither."""
    for path in (folder / name, folder / f"{name}.gz"):
        if os.path.isfile(path):
            return path
    what = "it is not a folder" if not os.path.isdir(folder) else f"it has no {name} and no {name}.gz"
    raise TaskError(f"{folder}: {what}. Download the four IDX files of the data set into one folder.")


def read(path: Path, *, ndim: int) -> np.ndarray:
    """The file's array of unsigned bytes with `ndim` dimensions, uint8; TaskError for anything else."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(file, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: it cannot be read: {error}. Download it again.") from error


def _parse(file: gzip.GzipFile | BufferedReader, path: Path, ndim: int) -> np.ndarray:
    head = file.read(4 + 4 * ndim)
    if head[:4] != bytes((0, 0, 8, ndim)):
        raise TaskError(
            f"{path}: it starts with {head[:4].hex(' ') or 'nothing'}, but an IDX file of unsigned bytes in "
            f"{ndim} dimension{'s' if ndim > 1 else ''} starts with 00 00 08 {ndim:02x}."
        )
    if len(head) < 4 + 4 * ndim:
        raise TaskError(f"{path}: it is cut off in its header, after {len(head)} bytes. Download it again.")
    shape = struct.unpack(f">{ndim}I", head[4:])
    want, body = math.prod(shape), bytearray()
    while len(body) <= want and (block := file.read(min(CHUNK, want + 1 - len(body)))):
        body += block
    if len(body) != want:
        found = f"only {len(body)}" if len(body) < want else "more"
        raise TaskError(f"{path}: its header says {list(shape)} = {want} bytes, but it has {found}.")
    return np.frombuffer(body, np.uint8).reshape(shape)
