"""Pieces: a long stream cut where its statistics change; pieces are coded and decoded in parallel.

bits ~ sum of N * H(histogram) over the pieces, and one table for each

Rows that were rounded or never trained, for example, get tables of their own. Pieces have a maximum size, so
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
from tersor.coders.plan import Output, Symbols, first_byte, longest_stream
from tersor.coders.static import NOISE, fewest, histogram, is_noise, order0, orders0, read_static
from tersor.errors import FormatError
from tersor.threads import threads

Found = TypeVar("Found")

PIECES = 6
UNIT = 1 << 15  # symbols: every piece but the last is a whole number of units
LARGEST = 32  # units of a piece, at most
TABLE = 2000.0  # bits that another table must save: it takes 600 bits, and time to decode
ORDER = 15  # of the exp-Golomb code of a stream's bytes
MANY = 1 << 10  # units whose entropies are computed at a time
PARALLEL = 1 << 18  # symbols: below, starting threads costs more than it saves


def plan_pieces(symbols: np.ndarray, width: int, keep: np.ndarray | None = None) -> bytes | None:
    """The stream of symbols uint8 [N]. None if there is only one piece, or all pieces are noise."""
    out = Output(longest_stream(len(symbols)))
    return out.tobytes() if write_pieces(out, symbols, count_units(symbols)) else None


def write_pieces(out: Output, symbols: Symbols, counts: np.ndarray, *, floats: bool = False) -> bool:
    """Append the stream, piece by piece. Returns False and appends nothing if there is only one piece, or if
    all pieces are noise: one raw stream is then as short, and is decoded without a copy.

    `counts` [U, 256]: a histogram of each unit. `floats` as in static.fewest. No second copy of the
    symbols or the streams is held.
    """
    if len(symbols) < 2 * UNIT:
        return False
    costs = np.concatenate([orders0(counts[at : at + MANY]) for at in range(0, len(counts), MANY)])
    if (costs >= NOISE * counts.sum(-1)).all():
        return False  # a pool of units has at least the mean of their entropies
    sizes = piece_sizes(symbols, counts, costs)
    if len(sizes) < 2:
        return False
    ends = np.cumsum([0, *sizes]).tolist()
    pools = [counts[a:b].sum(0, dtype=np.int64) for a, b in pairwise(ends)]
    if all(is_noise(pool, floats=floats) for pool in pools):
        return False

    def coded(k: int) -> bytes:
        return fewest(symbols[ends[k] * UNIT : ends[k + 1] * UNIT], pools[k], NOISE, floats=floats)

    start, lengths, raw = len(out), [], True
    for stream in on_all_cores(coded, range(len(sizes)), len(symbols)):
        out.append(stream)
        lengths.append(len(stream))
        raw = raw and stream[0] == RAW
    if raw:
        out.truncate(start)
        return False
    head = BitWriter()
    head.golomb(len(sizes) - 2)
    for size in sizes[:-1]:
        head.golomb(size - 1)
    for length in lengths[:-1]:
        head.golomb(length, ORDER)
    out.insert(start, first_byte(PIECES) + head.to_bytes())  # its length is known only now
    return True


def count_units(symbols: Symbols) -> np.ndarray:
    """Histogram of each unit, [U, 256]. A stream too short for pieces is one unit."""
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


def piece_sizes(symbols: Symbols, counts: np.ndarray, costs: np.ndarray) -> list[int]:
    """Number of units of each piece: neighbors are merged as long as that costs less than a table. `counts`
    [U, 256] and `costs` [U] in bits: of each unit."""
    whole = len(symbols) // UNIT  # whole units only
    sizes, pool, cost = [1], counts[0], float(costs[0])
    for row, own in zip(counts[1:whole], costs[1:whole].tolist(), strict=True):
        both = pool + row
        merged = order0(both)
        if merged <= cost + own + TABLE and sizes[-1] < LARGEST:
            sizes[-1], pool, cost = sizes[-1] + 1, both, merged
        else:
            sizes.append(1)
            pool, cost = row, own
    sizes[-1] += len(symbols) % UNIT > 0  # a short last unit belongs to the last piece
    return sizes


def on_all_cores(work: Callable[[int], Found], items: Sequence[int], size: int) -> Iterator[Found]:
    """Yield work(item) for each item in order, computed ahead by one thread for each core. The compiled loops
    release the GIL.

    Below PARALLEL symbols (`size`) everything runs in the calling thread.
    """
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
    """Yield the symbols of each piece, in order."""
    pieces = pieces_in(settings, data, count)

    def work(k: int) -> np.ndarray:
        begin, end, stream = pieces[k]
        out = np.empty(end - begin, dtype=np.uint8)
        read_static(stream, out)
        return out

    yield from on_all_cores(work, range(len(pieces)), count)


def pieces_in(settings: int, data: memoryview, count: int) -> list[tuple[int, int, memoryview]]:
    """(first symbol, end, stream) of each piece."""
    source = BitReader(data, 1)
    units = -(-count // UNIT)
    number = source.golomb() + 2
    if settings or number > units:
        raise FormatError(
            f"coded stream: pieces with settings {settings} and {number} pieces, but {count} symbols allow "
            f"settings 0 and at most {units} pieces"
        )
    sizes = [source.golomb() + 1 for _ in range(number - 1)]
    lengths = [source.golomb(ORDER) for _ in range(number - 1)]
    at = source.byte_end()
    ends = (np.cumsum([0, *sizes]) * UNIT).tolist()
    places = np.cumsum([at, *lengths]).tolist()
    if ends[-1] >= count or places[-1] >= len(data):
        raise FormatError(f"coded stream: its pieces need more than {count} symbols or {len(data)} bytes")
    ranges = zip(pairwise([*ends, count]), pairwise([*places, len(data)]), strict=True)
    return [(begin, end, data[first:last]) for (begin, end), (first, last) in ranges]
