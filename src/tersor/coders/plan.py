"""Plan: the size of a stream, computed from a histogram before any symbol is coded.

Sizes are exact, except that the plan of rANS is slightly below the real size. So usually only one coder has
to code the symbols, and not raw, constant, Huffman and rANS. The module also defines Coder, MatrixCoder and
Output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from tersor.coders.pages import pages
from tersor.errors import StorageError

ID_BITS = 3  # low bits of the first byte; the high bits are the coder's settings


class Symbols(Protocol):
    """Symbols uint8 [N] that are sliced on demand: an array, or a plane of elements."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Output:
    """A growing byte buffer of at most `most` bytes. Pages take memory when they are first written."""

    def __init__(self, most: int) -> None:
        self.data, self.size = pages(most), 0

    def __len__(self) -> int:
        return self.size

    def append(self, stream: bytes | np.ndarray) -> None:
        self.insert(self.size, stream)

    def insert(self, at: int, stream: bytes | np.ndarray) -> None:
        """Insert bytes at index `at`."""
        end = self.size + len(stream)
        if end > len(self.data):  # a coder chosen by name may make the symbols longer
            self.data = np.concatenate([self.data[: self.size], np.empty(end, dtype=np.uint8)])
        data = self.data.data  # a memoryview moves overlapping bytes without the temporary copy of numpy
        data[at + len(stream) : end] = data[at : self.size]
        data[at : at + len(stream)] = memoryview(stream)  # type: ignore[arg-type]
        self.size = end

    def truncate(self, at: int) -> None:
        self.size = at

    def tobytes(self) -> bytes:
        return self.view().tobytes()

    def view(self) -> np.ndarray:
        return self.data[: self.size]


def longest_stream(count: int) -> int:
    """Maximum bytes of a stream of `count` symbols, for a coder that suits them."""
    return count + (count >> 12) + 512


class Plan(NamedTuple):
    """One way to code a given stream."""

    nbytes: int  # lower bound for the length of the stream
    write: Callable[[np.ndarray], bytes]  # symbols [N] uint8 -> the whole stream


class Coder(NamedTuple):
    """One row of the table CODERS: an order-0 coder."""

    id: int
    plan: Callable[[np.ndarray], Plan | None]  # counts [256], N >= 1 in all; None: the coder cannot code them
    read: Callable[[int, memoryview, np.ndarray], None]  # settings, the whole stream, output [N]


def first_byte(coder_id: int, settings: int = 0) -> bytes:
    return bytes([coder_id | settings << ID_BITS])


def changed() -> StorageError:
    """Weights are read from their file twice, for the histogram and for coding. Both must be equal."""
    return StorageError(
        "the weights changed while they were coded: another program writes to their file. Try again when it "
        "has finished, or use a copy of the file"
    )


class MatrixCoder(NamedTuple):
    """One row of the table MATRIX_CODERS: a coder for symbols of a matrix, which may be masked."""

    id: int
    plan: Callable[[np.ndarray, int, np.ndarray | None], bytes | None]  # symbols [N], columns, mask -> stream
    read: Callable[
        [int, memoryview, int, int, np.ndarray | None], np.ndarray
    ]  # settings, stream, N, columns, mask
