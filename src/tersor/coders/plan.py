"""Plan: what a coder would make of a histogram, before it codes a symbol. Coder: how to plan and to read.

Sizes are known before coding (of rANS, a little less than the truth): choosing costs one coding, not four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from tersor.coders.pages import pages
from tersor.errors import StorageError

ID_BITS = 3  # of the first byte; the coder's settings are above


class Symbols(Protocol):
    """Symbols uint8 [N], whose parts are made when they are asked for: an array, or a plane of elements."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Output:
    """Bytes that grow at their end, at most so many. Memory is taken as they come."""

    def __init__(self, most: int) -> None:
        self.data, self.size = pages(most), 0

    def __len__(self) -> int:
        return self.size

    def append(self, stream: bytes | np.ndarray) -> None:
        self.insert(self.size, stream)

    def insert(self, at: int, stream: bytes | np.ndarray) -> None:
        """Put bytes before what follows from `at` on."""
        end = self.size + len(stream)
        if end > len(self.data):  # of a coder that was asked for by name, and makes its symbols longer
            self.data = np.concatenate([self.data[: self.size], np.empty(end, dtype=np.uint8)])
        data = self.data.data  # numpy would copy what it moves
        data[at + len(stream) : end] = data[at : self.size]
        data[at : at + len(stream)] = memoryview(stream)  # type: ignore[arg-type]
        self.size = end

    def cut(self, at: int) -> None:
        self.size = at

    def tobytes(self) -> bytes:
        return self.found().tobytes()

    def found(self) -> np.ndarray:
        return self.data[: self.size]


def longest(count: int) -> int:
    """Bytes of a stream of so many symbols, but for unwise coders."""
    return count + (count >> 12) + 512


class Plan(NamedTuple):
    """One way to code a given stream."""

    nbytes: int  # the stream will not be shorter
    write: Callable[[np.ndarray], bytes]  # symbols [N] uint8 -> the whole stream


class Coder(NamedTuple):
    """One row of the table CODERS: a static coder, which sees single symbols."""

    id: int
    plan: Callable[[np.ndarray], Plan | None]  # counts [256], N >= 1 in all; None where this coder cannot
    read: Callable[[int, memoryview, np.ndarray], None]  # settings, the whole stream, where its symbols go


def first_byte(coder_id: int, settings: int = 0) -> bytes:
    return bytes([coder_id | settings << ID_BITS])


def changed() -> StorageError:
    """What is taken from a file twice, to be counted and to be coded, must be the same."""
    return StorageError(
        "the weights changed while they were coded: another program writes their file. Try again when it is "
        "done, or with a copy of the file"
    )


class MatrixCoder(NamedTuple):
    """One row of the table GRID_CODERS: a coder that sees symbols as a matrix, perhaps masked."""

    id: int
    plan: Callable[[np.ndarray, int, np.ndarray | None], bytes | None]  # symbols [N], columns, mask -> stream
    read: Callable[
        [int, memoryview, int, int, np.ndarray | None], np.ndarray
    ]  # settings, stream, N, columns, mask
