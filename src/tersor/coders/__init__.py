"""Coders: integers to bytes and back, exactly.

encode(symbols) tries every coder and keeps the fewest bytes; decode(data, count) trusts nothing it reads.
A stream names its coder in its first byte and knows neither its length nor its count: docs/streams.md.
"""

from __future__ import annotations

import numpy as np

from tersor.coders.alphabet import SYMBOLS
from tersor.coders.huffman import HUFFMAN, plan_huffman, read_huffman
from tersor.coders.plain import CONSTANT, RAW, plan_constant, plan_raw, read_constant, read_raw
from tersor.coders.plan import ID_BITS, Coder
from tersor.coders.rans import RANS, plan_rans, read_rans
from tersor.errors import FormatError, SettingError, did_you_mean

__all__ = ["CODERS", "coder_of", "decode", "encode", "order0_bits"]

CODERS: dict[str, Coder] = {  # the fastest to decode first: it wins where sizes are equal
    "raw": Coder(RAW, plan_raw, read_raw),
    "constant": Coder(CONSTANT, plan_constant, read_constant),
    "huffman": Coder(HUFFMAN, plan_huffman, read_huffman),
    "rans": Coder(RANS, plan_rans, read_rans),
}
EMPTY = bytes([RAW])
CHUNK = 1 << 20  # symbols counted at a time: numpy counts in 8 bytes each


def encode(symbols: np.ndarray, coder: str = "auto") -> bytes:
    """Symbols [N] uint8 as bytes; "auto" keeps the fewest. The same symbols give the same bytes.

    No symbols at all are raw, and one symbol alone is a constant even where huffman or rans was asked for.
    """
    if coder != "auto" and coder not in CODERS:
        raise SettingError(f"encode: coder={coder!r}; {did_you_mean(coder, ['auto', *CODERS])}")
    symbols = np.asarray(symbols)
    if symbols.dtype != np.uint8 or symbols.ndim != 1:
        raise SettingError(
            f"encode: symbols of type {symbols.dtype} and shape {list(symbols.shape)}, but it codes uint8 "
            "in one dimension. Shift the values to 0..255 and call .astype(np.uint8).ravel()"
        )
    if not len(symbols):
        return EMPTY
    symbols = np.ascontiguousarray(symbols)
    counts = histogram(symbols)
    if coder == "auto":
        return fewest(symbols, counts)
    plan = CODERS[coder].plan(counts)
    if plan is None and np.count_nonzero(counts) == 1:
        plan = plan_constant(counts)
    if plan is None:
        raise SettingError(
            f"encode: coder={coder!r} holds one symbol, but {np.count_nonzero(counts)} different ones "
            "were given. Use coder='auto'"
        )
    return plan.write(symbols)


def fewest(symbols: np.ndarray, counts: np.ndarray) -> bytes:
    """The shortest stream; a coder whose plan is no shorter than what we have is not run."""
    plans = [plan for coder in CODERS.values() if (plan := coder.plan(counts))]
    best = b""
    for plan in sorted(plans, key=lambda plan: plan.nbytes):
        if not best or plan.nbytes < len(best):
            stream = plan.write(symbols)
            best = stream if not best or len(stream) < len(best) else best
    return best


def decode(data: bytes | np.ndarray, count: int) -> np.ndarray:
    """The `count` symbols of a stream, uint8 [count]; FormatError if it is not a stream of so many."""
    stream = as_bytes(data)
    name = coder_of(stream)
    if count < 0:
        raise FormatError(f"coded stream: a count of {count} symbols; at least 0 is allowed")
    if (count == 0) != (stream == EMPTY):
        raise FormatError(f"coded stream: {len(stream)} bytes of {name} for {count} symbols")
    return CODERS[name].read(stream[0] >> ID_BITS, stream, count) if count else np.empty(0, dtype=np.uint8)


def coder_of(data: bytes | np.ndarray) -> str:
    """The name of the coder that wrote this stream, from its first byte."""
    if not len(data):
        raise FormatError("coded stream: it is empty; the shortest has 1 byte")
    number = int(data[0]) & ((1 << ID_BITS) - 1)
    for name, coder in CODERS.items():
        if coder.id == number:
            return name
    raise FormatError(
        f"coded stream: coder {number} is unknown; this version reads "
        f"{', '.join(f'{coder.id} ({name})' for name, coder in CODERS.items())}. A newer tersor may read it"
    )


def as_bytes(data: bytes | np.ndarray) -> bytes:
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise FormatError(
                f"coded stream: given as {data.dtype} of shape {list(data.shape)}, "
                "but it is uint8 in one dimension"
            )
        return data.tobytes()
    return bytes(data)


def histogram(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol occurs, [256] int64."""
    counts = np.zeros(SYMBOLS, dtype=np.int64)
    for start in range(0, len(symbols), CHUNK):
        counts += np.bincount(symbols[start : start + CHUNK], minlength=SYMBOLS)
    return counts


def order0_bits(symbols: np.ndarray) -> float:
    """N * H(histogram) in bits: the least for a code of single symbols, its table not counted."""
    counts = histogram(np.asarray(symbols).ravel())
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())
