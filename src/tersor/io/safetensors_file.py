"""Tensors: a safetensors file read and written one tensor at a time.

Plain reads, no memory map: a mapped page counts as memory of this process for as long as it is looked at.
Writing needs the header first and knows it last, so the payload waits in a temporary file, on disk if large.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from tersor.coders.pages import pages
from tersor.dtypes import as_numbers, unheld
from tersor.errors import FormatError, RefusedError, StorageError
from tersor.forms import Dense
from tersor.forms.form import as_bytes
from tersor.io.header import LONGEST, Slot, build_header, parse_header
from tersor.io.on_disk import OnDisk
from tersor.io.sniff import sniff

IN_MEMORY = 8 << 20  # bytes of payload that wait in memory
HELD = 4 << 20  # bytes of a weight that is read once and held; a larger one stays in its file
CHUNK = 4 << 20  # bytes copied at once


class TensorFile:
    """An open safetensors file. FormatError for what is none, StorageError for what cannot be read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_byteorder()
        self.path = Path(path)
        self.file = Ranges(self.path)
        try:
            self.nbytes = self.file.nbytes
            self.slots, self.metadata = self._header()
        except FormatError as error:
            self.file.close()
            raise FormatError(f"{self.path}: {error}") from None
        except StorageError:
            self.file.close()
            raise

    def _header(self) -> tuple[dict[str, Slot], dict[str, str]]:
        head = self.bytes(0, min(self.nbytes, 64))
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or length > LONGEST or head[8:9] != b"{":
            raise FormatError(sniff(head))
        if 8 + length > self.nbytes:
            raise FormatError(
                f"it is cut off: its header has {length:,} bytes, and the file ends after {self.nbytes:,}"
            )
        return parse_header(self.bytes(8, 8 + length), self.nbytes - 8 - length)

    def bytes(self, begin: int, end: int) -> bytes:
        return self.file.read(begin, end).numpy().tobytes()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        slot = self.slots[name]
        return as_tensor(self.file.read(slot.begin, slot.end), slot.dtype, slot.shape, name)

    def form(self, name: str) -> Dense:
        """One tensor; a large one stays in the file."""
        slot = self.slots[name]
        if slot.nbytes <= HELD:
            return Dense(self.read(name))
        return OnDisk(slot.dtype, slot.shape, partial(self.file.elements, name, slot))

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Ranges:
    """An open file, of which any thread reads any range."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        try:
            self.file: BinaryIO = open(path, "rb")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise cannot_read(path, error) from None
        self.nbytes = os.fstat(self.file.fileno()).st_size

    def read(self, begin: int, end: int) -> Tensor:
        """Bytes as a tensor of their own, with no second copy in memory."""
        data = torch.from_numpy(pages(end - begin)) if end > begin else bytes_tensor(b"")
        view, at = data.numpy().data, 0
        try:
            with self.lock:
                self.file.seek(begin)
                while at < len(data):
                    count = self.file.readinto(view[at:])  # type: ignore[attr-defined]
                    if not count:
                        raise FormatError(f"{self.path}: it became shorter while it was read")
                    at += count
        except OSError as error:
            raise cannot_read(self.path, error) from None
        return data

    def elements(self, name: str, slot: Slot, begin: int, end: int) -> Tensor:
        """Some elements of a tensor, flat."""
        size = slot.dtype.itemsize
        data = self.read(slot.begin + begin * size, slot.begin + end * size)
        return as_tensor(data, slot.dtype, (end - begin,), name)

    def close(self) -> None:
        self.file.close()


def cannot_read(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read: {error.strerror or error}")


def bytes_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor; PyTorch makes none of an empty buffer by itself."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def check_byteorder() -> None:
    """Files have the low byte first, and tensors are written and read as this machine holds them."""
    if sys.byteorder != "little":
        raise RefusedError(
            f"this machine is {sys.byteorder}-endian; files are read and written on others only"
        )


def as_tensor(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    """Bytes as a tensor; a bool that is neither 0 nor 1 is refused, for PyTorch would carry it on."""
    if dtype is torch.bool and len(data) and int(data.max()) > 1:
        raise FormatError(f"{name}: a bool is {int(data.max())}, but it is 0 or 1: the file is damaged")
    return data.view(dtype).reshape(shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(as_numbers(tensor).isfinite().all())


class TensorWriter:
    """Collects tensors, then writes header and payload."""

    def __init__(self, folder: Path) -> None:
        check_byteorder()
        self.spool = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(folder))  # noqa: SIM115
        self.entries: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []  # ..., nbytes, where
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in; it may be dropped afterwards."""
        data = as_bytes(tensor)
        if why := unheld(tensor.dtype):
            raise RefusedError(f"{name}: it is {why}")
        if len(data) > IN_MEMORY:
            self.spool.rollover()  # or it would be copied into memory first
        self.spool.write(data.data)
        self.entries.append((name, tensor.dtype, tuple(tensor.shape), len(data), self.nbytes))
        self.nbytes += len(data)

    def finish(self, out: BinaryIO, metadata: Mapping[str, str]) -> int:
        """Write the file, wide elements first. Returns its bytes."""
        order = sorted(self.entries, key=lambda entry: -entry[1].itemsize)
        header = build_header([entry[:4] for entry in order], metadata)
        out.write(header)
        for *_, nbytes, where in order:
            self.spool.seek(where)
            for at in range(0, nbytes, CHUNK):
                out.write(self.spool.read(min(CHUNK, nbytes - at)))
        return len(header) + sum(entry[3] for entry in order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.spool.close()
