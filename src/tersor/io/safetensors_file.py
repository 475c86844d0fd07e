"""Safetensors file: read and write one tensor at a time.

Plain reads, no memory map: mapped pages count as memory of this process while they are in use. The header is
written first but known last, so the payload is collected in a temporary file, on disk if it is large.
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
from tersor.dtypes import as_numbers, unsupported
from tersor.errors import FormatError, RefusedError, StorageError
from tersor.forms import Dense
from tersor.forms.form import as_bytes
from tersor.io.header import LONGEST, Slot, build_header, parse_header
from tersor.io.on_disk import OnDisk
from tersor.io.sniff import sniff

IN_MEMORY = 8 << 20  # bytes of payload collected in memory
HELD = 4 << 20  # bytes up to which a weight is held in memory; a larger one stays in its file
CHUNK = 4 << 20  # bytes copied at once


class TensorFile:
    """An open safetensors file. FormatError for other files, StorageError if it cannot be read."""

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
        """One tensor, in its own memory."""
        slot = self.slots[name]
        return as_tensor(self.file.read(slot.begin, slot.end), slot.dtype, slot.shape, name)

    def form(self, name: str) -> Dense:
        """One tensor as a dense form. A large one stays in the file."""
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
    """An open file. Any thread may read any range of bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        try:
            self.file: BinaryIO = open(path, "rb")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise cannot_read(path, error) from None
        self.nbytes = os.fstat(self.file.fileno()).st_size

    def read(self, begin: int, end: int) -> Tensor:
        """A range of bytes as a new uint8 tensor, without a second copy in memory."""
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
        """The elements begin to end of a tensor, flat."""
        size = slot.dtype.itemsize
        data = self.read(slot.begin + begin * size, slot.begin + end * size)
        return as_tensor(data, slot.dtype, (end - begin,), name)

    def close(self) -> None:
        self.file.close()


def cannot_read(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read: {error.strerror or error}")


def bytes_tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor. torch.frombuffer refuses an empty buffer."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def check_byteorder() -> None:
    """Refuse big-endian machines: files are little-endian and no bytes are swapped."""
    if sys.byteorder != "little":
        raise RefusedError(
            f"this machine is {sys.byteorder}-endian; files are read and written on little-endian ones only"
        )


def as_tensor(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    """Bytes as a tensor. FormatError for a bool other than 0 or 1, which PyTorch would not notice."""
    if dtype is torch.bool and len(data) and int(data.max()) > 1:
        raise FormatError(f"{name}: a bool is {int(data.max())}, not 0 or 1: the file is damaged")
    return data.view(dtype).reshape(shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(as_numbers(tensor).isfinite().all())


class TensorWriter:
    """Collects tensors, then writes header and payload."""

    def __init__(self, folder: Path) -> None:
        check_byteorder()
        self.spool = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(folder))  # noqa: SIM115
        self.entries: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []  # ..., nbytes, offset
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. Its bytes are copied, so the caller may drop it."""
        data = as_bytes(tensor)
        if why := unsupported(tensor.dtype):
            raise RefusedError(f"{name}: it is {why}")
        if len(data) > IN_MEMORY:
            self.spool.rollover()  # to disk now, else it would be copied into memory first
        self.spool.write(data.data)
        self.entries.append((name, tensor.dtype, tuple(tensor.shape), len(data), self.nbytes))
        self.nbytes += len(data)

    def finish(self, out: BinaryIO, metadata: Mapping[str, str]) -> int:
        """Write the file, tensors with wide elements first. Returns its size in bytes."""
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
