"""Static: the order-0 coders, each with one table for the whole stream.

`fewest` tries them in order of planned size. A coder whose plan is no shorter than the best stream is not
run.
"""

from __future__ import annotations

import numpy as np

from tersor.coders.alphabet import SYMBOLS
from tersor.coders.bytes.huffman import HUFFMAN, plan_huffman, read_huffman
from tersor.coders.bytes.plain import CONSTANT, RAW, plan_constant, plan_raw, read_constant, read_raw
from tersor.coders.plan import ID_BITS, Coder
from tersor.coders.rans.rans import RANS, plan_rans, read_rans
from tersor.errors import FormatError

CODERS: dict[str, Coder] = {  # the fastest to decode first: it wins a tie
    "raw": Coder(RAW, plan_raw, read_raw),
    "constant": Coder(CONSTANT, plan_constant, read_constant),
    "huffman": Coder(HUFFMAN, plan_huffman, read_huffman),
    "rans": Coder(RANS, plan_rans, read_rans),
}
NOISE = 7.95  # bits a symbol: above, the bytes saved are not worth slower decoding than raw
CHUNK = 1 << 20  # symbols counted at a time: numpy converts each to 8 bytes


def fewest(symbols: np.ndarray, counts: np.ndarray, noise: float = 8.0, *, floats: bool = False) -> bytes:
    """The shortest static stream of symbols uint8 [N], N >= 1, with histogram `counts` [256].

    Symbols with an entropy of `noise` bits or more are stored raw. `floats`: they are a byte of each float,
    for which only rANS with a list is tried: the others would save 0.1 % and take most of the time.
    """
    if noise < 8 and is_noise(counts, noise, floats=floats):
        return plan_raw(counts).write(symbols)  # needs no other plan
    left_out = ("huffman",) if floats else ()
    plans = [
        plan for name, coder in CODERS.items() if name not in left_out
        if (plan := plan_rans(counts, shapes=not floats) if name == "rans" else coder.plan(counts))
    ]  # fmt: skip
    best = b""
    for plan in sorted(plans, key=lambda plan: plan.nbytes):
        if not best or plan.nbytes < len(best):
            stream = plan.write(symbols)
            best = stream if not best or len(stream) < len(best) else best
    return best


def is_noise(counts: np.ndarray, noise: float = NOISE, *, floats: bool = False) -> bool:
    """Whether the entropy is `noise` bits or more. `floats`: or below, but the histogram of few symbols saves
    less than a table takes, which has 2 to 4 bits for each symbol if it is no shape."""
    count, bits = int(counts.sum()), order0(counts)
    return bits >= noise * count or bool(floats and bits + 2 * np.count_nonzero(counts) >= 8 * count)


def order0(counts: np.ndarray) -> float:
    """N * H(counts) in bits."""
    return float(orders0(counts))


def orders0(counts: np.ndarray) -> np.ndarray:
    """The same for each histogram, [..., K] -> [...]."""
    count = np.maximum(counts.sum(-1, keepdims=True), 1)
    return (counts * np.log2(count / np.maximum(counts, 1))).sum(-1)


def read_static(stream: memoryview, out: np.ndarray) -> None:
    """Fill `out` [count], count >= 1, with the symbols of a static stream that is part of another stream."""
    for coder in CODERS.values():
        if stream and coder.id == stream[0] & ((1 << ID_BITS) - 1):
            coder.read(stream[0] >> ID_BITS, stream, out)
            return
    raise FormatError(
        f"coded stream: an inner stream of {len(stream)} bytes is empty or not by a static coder "
        f"({', '.join(CODERS)})"
    )


def histogram(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol occurs, [256] int64."""
    counts = np.zeros(SYMBOLS, dtype=np.int64)
    for start in range(0, len(symbols), CHUNK):
        counts += np.bincount(symbols[start : start + CHUNK], minlength=SYMBOLS)
    return counts
