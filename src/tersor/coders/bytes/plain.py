"""Plain: symbols in 1 to 8 bits each, and streams of a single symbol.

raw        1 + N * bits / 8 bytes; the largest symbol determines the bits
constant   2 bytes
"""

from __future__ import annotations

import numpy as np

from tersor.coders.plan import Output, Plan, Symbols, first_byte
from tersor.errors import FormatError

RAW, CONSTANT = 0, 1
CHUNK = 1 << 20  # symbols copied at a time


def plan_raw(counts: np.ndarray) -> Plan:
    bits = max(1, int(np.flatnonzero(counts)[-1]).bit_length())
    size = int(counts.sum())

    def write(symbols: np.ndarray) -> bytes:
        head = first_byte(RAW, 8 - bits)
        return head + (symbols.tobytes() if bits == 8 else squeeze(symbols, bits).tobytes())

    return Plan(1 + -(-size * bits // 8), write)


def write_raw(out: Output, symbols: Symbols) -> None:
    """Append symbols in 8 bits each, one chunk at a time."""
    out.append(first_byte(RAW))
    for at in range(0, len(symbols), CHUNK):
        out.append(symbols[at : at + CHUNK])


def squeeze(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Pack symbols of `bits` bits, most significant bit first: [N] -> [ceil(N * bits / 8)]."""
    groups = np.zeros((-(-len(symbols) // 8), 8), dtype=np.uint8)
    groups.reshape(-1)[: len(symbols)] = symbols
    packed = np.zeros((len(groups), bits), dtype=np.uint8)
    for k in range(8):
        byte, shift = k * bits // 8, 16 - bits - k * bits % 8
        pair = groups[:, k].astype(np.uint16) << shift
        packed[:, byte] |= (pair >> 8).astype(np.uint8)
        if shift < 8:
            packed[:, byte + 1] |= (pair & 255).astype(np.uint8)
    return packed.reshape(-1)[: -(-len(symbols) * bits // 8)]


def spread(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `squeeze`: [ceil(count * bits / 8)] -> [count]."""
    packed = np.zeros((-(-count // 8), bits), dtype=np.uint8)
    packed.reshape(-1)[: len(data)] = data
    groups = np.empty((len(packed), 8), dtype=np.uint8)
    for k in range(8):
        byte, shift = k * bits // 8, 16 - bits - k * bits % 8
        pair = packed[:, byte].astype(np.uint16) << 8
        if shift < 8:
            pair |= packed[:, byte + 1]
        groups[:, k] = (pair >> shift) & ((1 << bits) - 1)
    return groups.reshape(-1)[:count]


def read_raw(settings: int, data: memoryview, out: np.ndarray) -> None:
    if settings > 7:
        raise FormatError(f"coded stream: raw with settings {settings}, but 0 to 7 is allowed")
    bits = 8 - settings
    count = len(out)
    nbytes = 1 + -(-count * bits // 8)
    if len(data) != nbytes:
        raise FormatError(
            f"coded stream: {len(data)} bytes, but {count} raw symbols of {bits} bits take {nbytes}"
        )
    body = np.frombuffer(data, np.uint8, offset=1)
    if bits < 8 and data[-1] & ((1 << -count * bits % 8) - 1):
        raise FormatError("coded stream: the padding after its last symbol is not zero")
    out[:] = body if bits == 8 else spread(body, bits, count)


def plan_constant(counts: np.ndarray) -> Plan | None:
    present = np.flatnonzero(counts)
    if len(present) != 1:
        return None
    return Plan(2, lambda symbols: first_byte(CONSTANT) + bytes([int(present[0])]))


def read_constant(settings: int, data: memoryview, out: np.ndarray) -> None:
    if settings or len(data) != 2:
        raise FormatError(
            f"coded stream: a constant has 2 bytes and settings 0, but this one has {len(data)} bytes and "
            f"settings {settings}"
        )
    out[:] = data[1]
