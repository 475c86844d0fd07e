"""Choice: choose the coder for a stream, and decode streams of any coder.

encode(symbols) tries the coders of a profile and keeps the shortest stream. decode(data, count) checks all it
reads.

"fast"   static coders, with one table for all symbols or for each long piece: about 1 GB/s a core
"max"    also the matrix coders: 3 to 120 million symbols a second on a core

The first byte of a stream names its coder. A stream does not store its length or its count: docs/streams.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tersor.coders.alphabet import SYMBOLS
from tersor.coders.bytes.plain import RAW, plan_constant, plan_raw, write_raw
from tersor.coders.mixing.mixing import MIXING, plan_mixing, read_mixing, rows_from, sample, usual_mixing
from tersor.coders.pieces import PIECES, count_units, each_piece, plan_pieces, read_pieces, write_pieces
from tersor.coders.plan import ID_BITS, Coder, MatrixCoder, Output, Plan, Symbols, longest_stream
from tersor.coders.predictive.predictive import PREDICTIVE, plan_predictive, read_predictive
from tersor.coders.static import CODERS, NOISE, fewest, histogram, is_noise, order0, orders0
from tersor.errors import FormatError, SettingError, did_you_mean

__all__ = ["CODERS", "MATRIX_CODERS", "PROFILES", "coder_of", "decode", "encode", "order0_bits"]

MATRIX_CODERS: dict[str, MatrixCoder] = {
    "pieces": MatrixCoder(PIECES, plan_pieces, read_pieces),
    "predictive": MatrixCoder(PREDICTIVE, plan_predictive, read_predictive),
    "mixing": MatrixCoder(MIXING, plan_mixing, read_mixing),
}
PROFILES = ("max", "fast")
EMPTY = bytes([RAW])
DENSE = 2  # bits a symbol: streams above this count as dense
SHORTEST = 12  # bytes: a coder with a header cannot shorten such a stream
WORTH = 20  # on dense codes mixing must save 1 / WORTH of the bytes
NEAR = 0.975  # and 2.5 % on samples, where adaptation costs relatively more, and only one option is tried
MIXING_BITS, MIXING_COUNT = 4.5, 1 << 15  # bits a symbol, symbols: above both, mixing gains too little


def encode(
    symbols: np.ndarray, coder: str = "fast", *, width: int = 0, keep: np.ndarray | None = None
) -> bytes:
    """Encode symbols [N] uint8 with a profile ("max": fewest bytes; "fast") or with one named coder.

    Equal symbols give equal bytes. `width`: columns of the matrix, whose elements in row-major order are the
    symbols (0: one row). `keep` (bool): mask of the matrix; then the symbols are only the kept elements.
    No symbols at all are stored raw, and a single repeated symbol as a constant, with every coder.
    SettingError for an unknown coder, another dtype or shape, or a matrix that the coder does not accept.
    """
    known = [*PROFILES, *CODERS, *MATRIX_CODERS]
    if coder not in known:
        raise SettingError(f"encode: coder={coder!r}; {did_you_mean(coder, known)}")
    symbols = np.asarray(symbols)
    if symbols.dtype != np.uint8 or symbols.ndim != 1:
        raise SettingError(
            f"encode: symbols of dtype {symbols.dtype} and shape {list(symbols.shape)}, but they must be "
            "uint8 in one dimension. Shift the values to 0..255 and call .astype(np.uint8).ravel()"
        )
    mismatch = mismatch_in(len(symbols), width, keep)
    if mismatch:
        raise SettingError(f"encode: {mismatch}")
    if not len(symbols):
        return EMPTY
    out = Output(longest_stream(len(symbols)))
    encode_onto(out, np.ascontiguousarray(symbols), coder, width=width, keep=keep)
    return out.tobytes()


def encode_onto(
    out: Output, symbols: Symbols, coder: str, *, width: int = 0, keep: np.ndarray | None = None,
    floats: bool = False,
) -> None:  # fmt: skip
    """Append the stream of `symbols`. A stream in pieces reads them in parts, to save memory. `floats`: they
    are a byte of each float; those that no histogram shortens are noise."""
    if not len(symbols):
        out.append(EMPTY)
        return
    units = count_units(symbols)
    counts = units.sum(0, dtype=np.int64)
    columns = width or size_of(symbols, keep)
    if coder in PROFILES:
        by_profile(out, symbols, units, profile=coder, width=columns, keep=keep, floats=floats)
        return
    whole = symbols[:]
    if np.count_nonzero(counts) == 1:
        plan: Plan | None = plan_constant(counts)
    elif coder in MATRIX_CODERS:
        stream = MATRIX_CODERS[coder].plan(whole, columns, keep)
        if stream is None:
            raise SettingError(
                f"encode: coder={coder!r} cannot code {len(symbols)} symbols in rows of {width}. "
                "Use coder='max'"
            )
        out.append(stream)
        return
    else:
        plan = CODERS[coder].plan(counts)
    if plan is None:
        raise SettingError(
            f"encode: coder={coder!r} codes one symbol, but {np.count_nonzero(counts)} different symbols "
            "were given. Use coder='fast'"
        )
    out.append(plan.write(whole))


def by_profile(
    out: Output, symbols: Symbols, units: np.ndarray, *, profile: str, width: int, keep: np.ndarray | None,
    floats: bool,
) -> None:  # fmt: skip
    """Append the shortest stream of a profile's coders. `units` [U, 256]: a histogram of each unit."""
    counts, start = units.sum(0, dtype=np.int64), len(out)
    plain = floats and profile == "fast"
    if np.count_nonzero(counts) > 1 and write_pieces(out, symbols, units, floats=plain):
        pass  # pieces are hardly ever longer than one static stream
    elif (floats or profile == "fast") and is_noise(counts, floats=floats):
        if counts[SYMBOLS // 2 :].any():  # of 8 bits: needs no copy
            write_raw(out, symbols)
        else:
            out.append(plan_raw(counts).write(symbols[:]))
    else:
        out.append(fewest(symbols[:], counts, floats=plain))
    if len(out) - start <= SHORTEST:
        return
    for name in ("predictive", "mixing") if profile == "max" else ():
        nbytes = len(out) - start
        if not promising(name, nbytes, counts, floats):
            continue
        # For many dense codes mixing must save 5 %, since it decodes twenty times as slowly.
        slow = name == "mixing" and len(symbols) > MIXING_COUNT and 8 * nbytes > DENSE * len(symbols)
        if slow and not mixes_well(symbols[:], width, keep, 8 * nbytes / orders0(units).sum()):
            continue
        stream = MATRIX_CODERS[name].plan(symbols[:], width, keep)
        if stream is not None and len(stream) < nbytes - (nbytes // WORTH if slow else 0):
            out.truncate(start)
            out.append(stream)


def promising(name: str, nbytes: int, counts: np.ndarray, floats: bool) -> bool:
    """Whether a coder may beat `nbytes` and is worth a try. Trying it on noise would only cost time."""
    bits = 8 * nbytes / counts.sum()
    if name == "mixing":  # few symbols may have an order that no histogram shows, but not those of floats
        return bool(bits < MIXING_BITS or (counts.sum() <= MIXING_COUNT and (bits < 8 or not floats)))
    return bool(bits < NOISE)


def mixes_well(symbols: np.ndarray, width: int, keep: np.ndarray | None, others: float) -> bool:
    """Whether mixing beats the other coders on two samples together, of rows from a quarter and from three
    quarters on: the first rows of an embedding are often special tokens, unlike the others, and an order that
    one half alone has still saves much of the whole.

    `others`: bits of the best other stream, as a fraction of the order-0 bits of its units, since pieces
    have a table each. Mixing on a sample is measured in the same way.
    """
    mixed = allowed = 0.0  # bits
    for quarter in (1, 3):
        rows = rows_from(symbols, width, keep, quarter)
        part, part_width, part_keep = sample(*rows, MIXING_COUNT)
        if not len(part):  # the mask keeps nothing there
            continue
        mixed += 8 * len(usual_mixing(part, part_width, part_keep))
        allowed += NEAR * others * order0(histogram(part))
    return mixed < allowed


def mismatch_in(count: int, width: int, keep: np.ndarray | None) -> str:
    """What is wrong with a matrix of `count` symbols, or an empty string."""
    if keep is not None and (keep.dtype != np.bool_ or int(keep.sum()) != count):
        return (
            f"a mask of dtype {keep.dtype} that keeps {int(keep.sum())} of {keep.size} elements, but it must "
            f"be bool and keep {count}"
        )
    total = count if keep is None else keep.size
    if width < 0 or (width and total % width):
        return f"width={width}, but it must divide the {total} elements of the matrix"
    return ""


def size_of(symbols: Symbols, keep: np.ndarray | None) -> int:
    return len(symbols) if keep is None else keep.size


def decode(
    data: bytes | np.ndarray, count: int, *, width: int = 0, keep: np.ndarray | None = None
) -> np.ndarray:
    """Decode a stream to its `count` symbols, uint8 [count]. `width` and `keep` as given to `encode`.

    FormatError if the data is not a stream of `count` symbols.
    """
    stream = as_bytes(data)
    name = coder_of(stream)
    if count < 0:
        raise FormatError(f"coded stream: a count of {count} symbols, but it is 0 or more")
    if (count == 0) != (stream == EMPTY):
        raise FormatError(f"coded stream: {len(stream)} bytes of {name} are no stream of {count} symbols")
    if not count:
        return np.empty(0, dtype=np.uint8)
    settings = stream[0] >> ID_BITS
    if name in CODERS:
        try:
            out = np.empty(count, dtype=np.uint8)
        except (MemoryError, ValueError):  # numpy raises ValueError for sizes beyond any address space
            raise FormatError(f"coded stream: {count} symbols do not fit in memory") from None
        CODERS[name].read(settings, stream, out)
        return out
    mismatch = mismatch_in(count, width, keep)
    if mismatch:
        raise FormatError(f"coded stream: {mismatch}")
    columns = width or (count if keep is None else keep.size)
    return MATRIX_CODERS[name].read(settings, stream, count, columns, keep)


def decode_parts(
    data: np.ndarray, count: int, *, width: int = 0, keep: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Like `decode`, in parts. Only the pieces in work are in memory, and raw bytes are not copied."""
    if count > 0 and coder_of(data) == "pieces":
        mismatch = mismatch_in(count, width, keep)
        if mismatch:
            raise FormatError(f"coded stream: {mismatch}")
        yield from each_piece(int(data[0]) >> ID_BITS, data.data, count)
    elif count > 0 and data[0] == RAW and len(data) == 1 + count:
        yield data[1:]
    else:
        yield decode(data, count, width=width, keep=keep)


def coder_of(data: bytes | memoryview | np.ndarray) -> str:
    """Name of the coder that wrote a stream, from the stream's first byte."""
    if not len(data):
        raise FormatError("coded stream: it is empty, but the shortest stream has 1 byte")
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
    """A memoryview: slices of it are no copies."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise FormatError(
                f"coded stream: got {data.dtype} of shape {list(data.shape)}, but it must be uint8 in one "
                "dimension"
            )
        return np.ascontiguousarray(data).data
    return memoryview(data)


def order0_bits(symbols: np.ndarray) -> float:
    """N * H(histogram) in bits: the lower bound for an order-0 coder, without its table."""
    return order0(histogram(np.asarray(symbols).ravel()))
