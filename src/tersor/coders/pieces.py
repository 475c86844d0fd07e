"""Pieces: a long stream cut where its statistics change, each piece coded by itself, all cores decoding.

bits ~ sum of N * H(histogram) over the pieces, and a table for each
Rows that were rounded, or never trained, are told apart from the rest; and pieces have a largest size, so
that one tensor keeps every core busy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import TypeVar

import numpy as np

from tersor.coders.alphabet import SYMBOLS
from tersor.coders.bit_strings import BitReader, BitWriter
from tersor.coders.bytes.plain import RAW
from tersor.coders.plan import Output, Symbols, first_byte, longest
from tersor.coders.static import NOISE, fewest, histogram, is_noise, order0, read_static
from tersor.errors import FormatError
from tersor.threads import threads

Found = TypeVar("Found")

PIECES = 6
UNIT = 1 << 15  # symbols: pieces are whole numbers of units, but for the last
LARGEST = 32  # units of a piece, where a stream is long enough for more than one core
TABLE = 2000.0  # bits that another table must save: it takes 600, and time to read
ORDER = 15  # of the exp-Golomb code of a stream's bytes
PARALLEL = 1 << 18  # symbols from which threads are worth their start


def plan_pieces(symbols: np.ndarray, width: int, keep: np.ndarray | None = None) -> bytes | None:
    """The stream of symbols uint8 [N]; None where there is one piece only, or all of it is noise."""
    out = Output(longest(len(symbols)))
    return out.tobytes() if write_pieces(out, symbols, count_units(symbols)) else None


def write_pieces(out: Output, symbols: Symbols, counts: np.ndarray) -> bool:
    """Append the stream, piece by piece; False, and nothing, where there is one piece only, or all is noise:
    as one piece that is read without a copy.

    `counts` [U, 256] of each unit. Neither the symbols nor their streams are ever held a second time.
    """
    if len(symbols) < 2 * UNIT:
        return False
    sizes = cut(symbols, counts)
    if len(sizes) < 2:
        return False
    ends = np.cumsum([0, *sizes]).tolist()
    pools = [counts[a:b].sum(0, dtype=np.int64) for a, b in pairwise(ends)]
    if all(is_noise(pool) for pool in pools):
        return False

    def coded(k: int) -> bytes:
        return fewest(symbols[ends[k] * UNIT : ends[k + 1] * UNIT], pools[k], NOISE)

    start, lengths, raw = len(out), [], True
    for stream in on_all_cores(coded, range(len(sizes)), len(symbols)):
        out.append(stream)
        lengths.append(len(stream))
        raw = raw and stream[0] == RAW
    if raw:
        out.cut(start)
        return False
    head = BitWriter()
    head.golomb(len(sizes) - 2)
    for size in sizes[:-1]:
        head.golomb(size - 1)
    for length in lengths[:-1]:
        head.golomb(length, ORDER)
    out.insert(start, first_byte(PIECES) + head.to_bytes())  # only now its length is known
    return True


def count_units(symbols: Symbols) -> np.ndarray:
    """How often each symbol occurs in each unit, [U, 256]; the last unit may be short. What is too short for
    pieces is one unit."""
    if len(symbols) < 2 * UNIT:
        return histogram(symbols[:])[None]
    from tersor.coders.bytes import planes_loops

    counts = np.zeros((-(-len(symbols) // UNIT), SYMBOLS), dtype=np.int32)

    def count(unit: int) -> None:
        part = symbols[unit * UNIT : (unit + LARGEST) * UNIT]
        planes_loops.count_units(part, UNIT, counts[unit : unit + LARGEST])

    for _ in on_all_cores(count, range(0, len(counts), LARGEST), len(symbols)):
        pass
    return counts


def cut(symbols: Symbols, counts: np.ndarray) -> list[int]:
    """The units of each piece: neighbors are merged as long as that costs less than a table."""
    counts = counts[: len(symbols) // UNIT]  # the whole ones
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
    sizes[-1] += len(symbols) % UNIT > 0  # the rest goes to the last
    return sizes


def on_all_cores(work: Callable[[int], Found], items: Sequence[int], size: int) -> Iterator[Found]:
    """work(item) of each item in order, some ahead of whoever takes them; the compiled loops run side by
    side."""
    cores = os.cpu_count() or 1
    if cores < 2 or len(items) < 2 or size < PARALLEL:
        yield from map(work, items)
        return
    ahead: deque[Future[Found]] = deque()
    for item in items:
        if len(ahead) > cores:
            yield ahead.popleft().result()
        ahead.append(threads("pieces").submit(work, item))
    while ahead:
        yield ahead.popleft().result()


def read_pieces(
    settings: int, data: memoryview, count: int, width: int, keep: np.ndarray | None = None
) -> np.ndarray:
    pieces = pieces_in(settings, data, count)
    out = np.empty(count, dtype=np.uint8)

    def work(k: int) -> None:
        begin, end, stream = pieces[k]
        read_static(stream, out[begin:end])

    for _ in on_all_cores(work, range(len(pieces)), count):
        pass
    return out


def each_piece(settings: int, data: memoryview, count: int) -> Iterator[np.ndarray]:
    """The symbols of each piece, in order."""
    pieces = pieces_in(settings, data, count)

    def work(k: int) -> np.ndarray:
        begin, end, stream = pieces[k]
        out = np.empty(end - begin, dtype=np.uint8)
        read_static(stream, out)
        return out

    yield from on_all_cores(work, range(len(pieces)), count)


def pieces_in(settings: int, data: memoryview, count: int) -> list[tuple[int, int, memoryview]]:
    """Of each piece where its symbols begin and end, and its stream."""
    source = BitReader(data, 1)
    units = -(-count // UNIT)
    number = source.golomb() + 2
    if settings or number > units:
        raise FormatError(f"coded stream: settings {settings} and {number} pieces for {count} symbols")
    sizes = [source.golomb() + 1 for _ in range(number - 1)]
    lengths = [source.golomb(ORDER) for _ in range(number - 1)]
    at = source.byte_end()
    ends = (np.cumsum([0, *sizes]) * UNIT).tolist()
    places = np.cumsum([at, *lengths]).tolist()
    if ends[-1] >= count or places[-1] >= len(data):
        raise FormatError(f"coded stream: pieces of more than {count} symbols or {len(data)} bytes")
    ranges = zip(pairwise([*ends, count]), pairwise([*places, len(data)]), strict=True)
    return [(begin, end, data[first:last]) for (begin, end), (first, last) in ranges]
