"""Choice: which coder writes a stream, and reading what any of them wrote.

encode(symbols) tries coders and keeps the fewest bytes; decode(data, count) trusts nothing it reads.
    "fast"   static coders: a table for all symbols or for long pieces, about 1 GB/s a core
    "max"    also those that see the symbols as a matrix: 3 to 120 million symbols a second a core
A stream names its coder in its first byte and knows neither its length nor its count: docs/streams.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tersor.coders.bytes.plain import RAW, plan_constant, write_raw
from tersor.coders.mixing.mixing import MIXING, plan_mixing, read_mixing, sample
from tersor.coders.pieces import PIECES, count_units, each_piece, plan_pieces, read_pieces, write_pieces
from tersor.coders.plan import ID_BITS, Coder, MatrixCoder, Output, Plan, Symbols, longest
from tersor.coders.predictive.predictive import PREDICTIVE, plan_predictive, read_predictive
from tersor.coders.static import CODERS, NOISE, fewest, histogram, is_noise, order0
from tersor.errors import FormatError, SettingError, did_you_mean

__all__ = ["CODERS", "MATRIX_CODERS", "PROFILES", "coder_of", "decode", "encode", "order0_bits"]

MATRIX_CODERS: dict[str, MatrixCoder] = {
    "pieces": MatrixCoder(PIECES, plan_pieces, read_pieces),
    "predictive": MatrixCoder(PREDICTIVE, plan_predictive, read_predictive),
    "mixing": MatrixCoder(MIXING, plan_mixing, read_mixing),
}
PROFILES = ("max", "fast")
EMPTY = bytes([RAW])
DENSE = 2  # bits a symbol: above, few symbols are alike
SHORTEST = 12  # bytes: what no coder with a head can shorten
WORTH = 20  # what it must save then: a twentieth
NEAR = 0.97  # and on a part, which has more to learn for its size: 3 %
MIXING_BITS, MIXING_COUNT = 4.5, 1 << 15  # bits a symbol: above, mixing is slow and gains little


def encode(
    symbols: np.ndarray, coder: str = "fast", *, width: int = 0, keep: np.ndarray | None = None
) -> bytes:
    """Symbols [N] uint8 as bytes, by a profile ("max": the fewest bytes; "fast") or by one coder.

    The same symbols give the same bytes. `width` is the number of columns where the symbols are a matrix in
    row-major order (0: one row). `keep`: bool, where the symbols are what it keeps of a matrix of its size.
    No symbols at all are raw, and one symbol alone is a constant even where another coder was asked for.
    """
    known = [*PROFILES, *CODERS, *MATRIX_CODERS]
    if coder not in known:
        raise SettingError(f"encode: coder={coder!r}; {did_you_mean(coder, known)}")
    symbols = np.asarray(symbols)
    if symbols.dtype != np.uint8 or symbols.ndim != 1:
        raise SettingError(
            f"encode: symbols of type {symbols.dtype} and shape {list(symbols.shape)}, but it codes uint8 "
            "in one dimension. Shift the values to 0..255 and call .astype(np.uint8).ravel()"
        )
    misfit = misfits(len(symbols), width, keep)
    if misfit:
        raise SettingError(f"encode: {misfit}")
    if not len(symbols):
        return EMPTY
    out = Output(longest(len(symbols)))
    encode_onto(out, np.ascontiguousarray(symbols), coder, width=width, keep=keep)
    return out.tobytes()


def encode_onto(
    out: Output, symbols: Symbols, coder: str, *, width: int = 0, keep: np.ndarray | None = None
) -> None:
    """Append the stream of symbols that need not be in memory all at once; what is coded in pieces is not."""
    if not len(symbols):
        out.append(EMPTY)
        return
    units = count_units(symbols)
    counts = units.sum(0, dtype=np.int64)
    columns = width or size_of(symbols, keep)
    if coder in PROFILES:
        by_profile(out, symbols, units, profile=coder, width=columns, keep=keep)
        return
    whole = symbols[:]
    if np.count_nonzero(counts) == 1:
        plan: Plan | None = plan_constant(counts)
    elif coder in MATRIX_CODERS:
        stream = MATRIX_CODERS[coder].plan(whole, columns, keep)
        if stream is None:
            raise SettingError(
                f"encode: coder={coder!r} cannot hold {len(symbols)} symbols in rows of {width}. "
                "Use coder='max'"
            )
        out.append(stream)
        return
    else:
        plan = CODERS[coder].plan(counts)
    if plan is None:
        raise SettingError(
            f"encode: coder={coder!r} holds one symbol, but {np.count_nonzero(counts)} different ones "
            "were given. Use coder='fast'"
        )
    out.append(plan.write(whole))


def by_profile(
    out: Output, symbols: Symbols, units: np.ndarray, *, profile: str, width: int, keep: np.ndarray | None
) -> None:
    """Append the fewest bytes of the coders that a profile has. `units` [U, 256]: counts of each unit."""
    counts, start = units.sum(0, dtype=np.int64), len(out)
    if np.count_nonzero(counts) > 1 and write_pieces(out, symbols, units):
        pass  # hardly ever longer than a whole
    elif profile == "fast" and is_noise(counts):
        write_raw(out, symbols)
    else:
        out.append(fewest(symbols[:], counts, 8.0 if profile == "max" else NOISE))
    if len(out) - start <= SHORTEST:
        return
    for name in ("predictive", "mixing") if profile == "max" else ():
        nbytes = len(out) - start
        if not promising(name, nbytes, counts):
            continue
        # Of many dense codes mixing must save 5 %, for it takes twenty times as long to read.
        slow = name == "mixing" and len(symbols) > MIXING_COUNT and 8 * nbytes > DENSE * len(symbols)
        if slow and not mixes_well(symbols[:], width, keep, 8 * nbytes / order0(counts)):
            continue
        stream = MATRIX_CODERS[name].plan(symbols[:], width, keep)
        if stream is not None and len(stream) < nbytes - (nbytes // WORTH if slow else 0):
            out.cut(start)
            out.append(stream)


def promising(name: str, nbytes: int, counts: np.ndarray) -> bool:
    """Whether a coder may win over so many bytes: noise costs much time to find that it is noise."""
    bits = 8 * nbytes / counts.sum()
    if name == "mixing":
        return bool(bits < MIXING_BITS or counts.sum() <= MIXING_COUNT)
    return bool(bits < NOISE)


def mixes_well(symbols: np.ndarray, width: int, keep: np.ndarray | None, others: float) -> bool:
    """Whether mixing does so on some of the symbols, the others on all of them, both as shares of order 0."""
    part, part_width, part_keep = sample(symbols, width, keep, MIXING_COUNT)
    bits = 8 * len(plan_mixing(part, part_width, part_keep))
    return bits < NEAR * others * order0(histogram(part))


def misfits(count: int, width: int, keep: np.ndarray | None) -> str:
    """What is wrong with a matrix of `count` symbols, or an empty text."""
    if keep is not None and (keep.dtype != np.bool_ or int(keep.sum()) != count):
        return f"a mask of type {keep.dtype} that keeps {int(keep.sum())} of {keep.size}, for {count} symbols"
    total = count if keep is None else keep.size
    if width < 0 or (width and total % width):
        return f"width={width}, but it divides the {total} elements of the matrix"
    return ""


def size_of(symbols: Symbols, keep: np.ndarray | None) -> int:
    return len(symbols) if keep is None else keep.size


def decode(
    data: bytes | np.ndarray, count: int, *, width: int = 0, keep: np.ndarray | None = None
) -> np.ndarray:
    """The `count` symbols of a stream, uint8 [count]; FormatError if it is not a stream of so many.

    `width` and `keep` as they were given to encode.
    """
    stream = as_bytes(data)
    name = coder_of(stream)
    if count < 0:
        raise FormatError(f"coded stream: a count of {count} symbols; at least 0 is allowed")
    if (count == 0) != (stream == EMPTY):
        raise FormatError(f"coded stream: {len(stream)} bytes of {name} for {count} symbols")
    if not count:
        return np.empty(0, dtype=np.uint8)
    settings = stream[0] >> ID_BITS
    if name in CODERS:
        try:
            out = np.empty(count, dtype=np.uint8)
        except (MemoryError, ValueError):  # numpy's words for too much and for far too much
            raise FormatError(f"coded stream: {count} symbols are more than memory holds") from None
        CODERS[name].read(settings, stream, out)
        return out
    misfit = misfits(count, width, keep)
    if misfit:
        raise FormatError(f"coded stream: {misfit}")
    columns = width or (count if keep is None else keep.size)
    return MATRIX_CODERS[name].read(settings, stream, count, columns, keep)


def decode_parts(
    data: np.ndarray, count: int, *, width: int = 0, keep: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """What decode returns, in parts: of a stream in pieces only those in work are in memory, and raw bytes
    are looked at where they are."""
    if count > 0 and coder_of(data) == "pieces":
        misfit = misfits(count, width, keep)
        if misfit:
            raise FormatError(f"coded stream: {misfit}")
        yield from each_piece(int(data[0]) >> ID_BITS, data.data, count)
    elif count > 0 and data[0] == RAW and len(data) == 1 + count:
        yield data[1:]
    else:
        yield decode(data, count, width=width, keep=keep)


def coder_of(data: bytes | memoryview | np.ndarray) -> str:
    """The name of the coder that wrote this stream, from its first byte."""
    if not len(data):
        raise FormatError("coded stream: it is empty; the shortest has 1 byte")
    number = int(data[0]) & ((1 << ID_BITS) - 1)
    known: dict[str, Coder | MatrixCoder] = {**CODERS, **MATRIX_CODERS}
    for name, coder in known.items():
        if coder.id == number:
            return name
    raise FormatError(
        f"coded stream: coder {number} is unknown; this version reads "
        f"{', '.join(f'{coder.id} ({name})' for name, coder in known.items())}. A newer tersor may read it"
    )


def as_bytes(data: bytes | np.ndarray) -> memoryview:
    """Without a copy: a part of it is none either."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise FormatError(
                f"coded stream: given as {data.dtype} of shape {list(data.shape)}, "
                "but it is uint8 in one dimension"
            )
        return np.ascontiguousarray(data).data
    return memoryview(data)


def order0_bits(symbols: np.ndarray) -> float:
    """N * H(histogram) in bits: the least for a code of single symbols, its table not counted."""
    return order0(histogram(np.asarray(symbols).ravel()))
