"""Pieces: a long stream cut where its statistics change, each piece coded by itself, all cores decoding.

bits ~ sum of N * H(histogram) over the pieces, and a table for each
Rows that were rounded, or never trained, are told apart from the rest; and pieces have a largest size, so
that one tensor keeps every core busy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tersor.coders.alphabet import SYMBOLS
from tersor.coders.bits import BitReader, BitWriter
from tersor.coders.plain import RAW
from tersor.coders.plan import first_byte
from tersor.coders.static import NOISE, fewest, histogram, order0, read_static
from tersor.errors import FormatError

PIECES = 6
UNIT = 1 << 15  # symbols: pieces are whole numbers of units, but for the last
LARGEST = 32  # units of a piece, where a stream is long enough for more than one core
TABLE = 2000.0  # bits that another table must save: it takes 600, and time to read
ORDER = 15  # of the exp-Golomb code of a stream's bytes
PARALLEL = 1 << 18  # symbols from which threads are worth their start


def plan_pieces(symbols: np.ndarray, width: int, keep: np.ndarray | None = None) -> bytes | None:
    """The stream of symbols uint8 [N]; None where there is one piece only, or all of it is noise."""
    if len(symbols) < 2 * UNIT:
        return None
    sizes = cut(symbols)
    if len(sizes) < 2:
        return None
    ends = np.minimum(np.cumsum([0, *sizes]) * UNIT, len(symbols)).tolist()
    ranges = list(zip(ends, ends[1:], strict=False))
    streams = on_all_cores(lambda ab: coded_piece(symbols[ab[0] : ab[1]]), ranges, len(symbols))
    if all(stream[0] == RAW for stream in streams):  # as one piece they are read without a copy
        return None
    head = BitWriter()
    head.golomb(len(sizes) - 2)
    for size in sizes[:-1]:
        head.golomb(size - 1)
    for stream in streams[:-1]:
        head.golomb(len(stream), ORDER)
    return first_byte(PIECES) + head.to_bytes() + b"".join(streams)


def coded_piece(symbols: np.ndarray) -> bytes:
    return fewest(symbols, histogram(symbols), NOISE)


def cut(symbols: np.ndarray) -> list[int]:
    """The units of each piece: neighbors are merged as long as that costs less than a table."""
    whole = len(symbols) // UNIT
    unit = symbols[: whole * UNIT].reshape(whole, UNIT)
    counts = np.stack([np.bincount(row, minlength=SYMBOLS) for row in unit])  # [U, 256]
    sizes, pools, costs = [1], [counts[0]], [order0(counts[0])]
    for row in counts[1:]:
        own, both = order0(row), pools[-1] + row
        merged = order0(both)
        if merged <= costs[-1] + own + TABLE and sizes[-1] < LARGEST:
            sizes[-1], pools[-1], costs[-1] = sizes[-1] + 1, both, merged
        else:
            sizes.append(1)
            pools.append(row)
            costs.append(own)
    sizes[-1] += len(symbols) > whole * UNIT  # the rest goes to the last
    return sizes


def on_all_cores(work: Callable[[Any], Any], items: list[Any], size: int) -> list[Any]:
    """[work(item)] in order; the compiled loops run side by side."""
    if (os.cpu_count() or 1) < 2 or len(items) < 2 or size < PARALLEL:
        return [work(item) for item in items]
    return list(threads().map(work, items))


@functools.cache
def threads() -> ThreadPoolExecutor:
    """One pool for all streams, since starting threads takes as long as decoding a small one. Its tasks never
    wait for each other."""
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)  # threads do not survive a fork


def read_pieces(
    settings: int, data: memoryview, count: int, width: int, keep: np.ndarray | None = None
) -> np.ndarray:
    source = BitReader(data, 1)
    units = -(-count // UNIT)
    number = source.golomb() + 2
    if settings or number > units:
        raise FormatError(f"coded stream: settings {settings} and {number} pieces for {count} symbols")
    sizes = [source.golomb() + 1 for _ in range(number - 1)]
    lengths = [source.golomb(ORDER) for _ in range(number - 1)]
    at = source.byte_end()
    ends = np.cumsum([0, *sizes]) * UNIT
    places = np.cumsum([at, *lengths])
    if ends[-1] >= count or places[-1] >= len(data):
        raise FormatError(f"coded stream: pieces of more than {count} symbols or {len(data)} bytes")
    out = np.empty(count, dtype=np.uint8)
    begin, place = [*ends.tolist(), count], [*places.tolist(), len(data)]

    def work(k: int) -> None:
        read_static(data[place[k] : place[k + 1]], out[begin[k] : begin[k + 1]])

    on_all_cores(work, list(range(number)), count)
    return out
