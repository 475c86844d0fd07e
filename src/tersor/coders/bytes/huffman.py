"""Huffman: optimal prefix codes with a whole number of bits; one lookup decodes several symbols.

lengths   Huffman 1952; if a code is longer than 15 bits, package-merge (Larmore, Hirschberg 1990)
codes     canonical (Schwartz, Kallick 1964): the lengths determine the codes
cost      the table, and sum of n * length bits: at most 1 bit a symbol above the entropy, which is little for
          an alphabet of 200 symbols and too much for one of 2
"""

from __future__ import annotations

import numpy as np

from tersor.coders.alphabet import SYMBOLS, Alphabet, alphabet_bits, alphabets, read_alphabet, write_alphabet
from tersor.coders.bit_strings import BitReader, BitWriter, list_bits, read_list, write_list
from tersor.coders.plan import Plan, changed, first_byte
from tersor.errors import FormatError

HUFFMAN = 2
MAX_LENGTH = 15
LOOKUP, SMALL_LOOKUP = 12, 8  # bits of a lookup: 2^12 entries stay in L1 cache; 2^8 are built faster


def code_lengths(counts: np.ndarray, limit: int = MAX_LENGTH) -> np.ndarray:
    """Lengths [K] of the best code for counts [K] >= 1 with lengths up to `limit`; K from 2 to 2^limit."""
    free = free_lengths(counts)
    return free if free.max() <= limit else package_merge(counts, limit)


def free_lengths(counts: np.ndarray) -> np.ndarray:
    """Huffman's algorithm: merge the two rarest trees until one is left. A code's length is its depth."""
    from tersor.coders.bytes import huffman_loops

    order = counts.argsort(kind="stable")
    return huffman_loops.tree_depths(counts, order)  # [K]


def package_merge(counts: np.ndarray, limit: int) -> np.ndarray:
    """Package-merge: `limit - 1` times, pair the cheapest items and merge the pairs with all symbols.

    A symbol's length is the number of chosen items that contain it.
    """
    single = np.eye(len(counts), dtype=np.int64)  # [K, K]: how often each item contains each symbol
    order = counts.argsort(kind="stable")
    items, uses = counts[order], single[order]
    for _ in range(limit - 1):
        pairs = len(items) // 2
        items = np.concatenate([counts, items[: 2 * pairs].reshape(pairs, 2).sum(1)])
        uses = np.concatenate([single, uses[: 2 * pairs].reshape(pairs, 2, -1).sum(1)])
        order = items.argsort(kind="stable")
        items, uses = items[order], uses[order]
    return uses[: 2 * len(counts) - 2].sum(0)  # [K]


def canonical(lengths: np.ndarray) -> np.ndarray:
    """Canonical codes [K]: ordered by length, then by index."""
    order = lengths.argsort(kind="stable")
    ranks = lengths[order]
    room = 1 << (MAX_LENGTH - ranks)  # each code's part of the code space, in 2^-15
    codes = np.empty_like(lengths)
    codes[order] = (room.cumsum() - room) >> (MAX_LENGTH - ranks)
    return codes


def plan_huffman(counts: np.ndarray) -> Plan | None:
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return None
    lengths = np.zeros(SYMBOLS, dtype=np.int64)
    lengths[present] = code_lengths(counts[present])
    exact = [a for a in alphabets(counts) if len(a.offsets) == len(present)]
    alphabet = min(exact, key=lambda a: alphabet_bits(a) + int(list_bits(lengths[a.symbols] - 1).min()))
    head = head_of(alphabet, lengths)
    total = head.length + int(counts @ lengths)
    codes = np.zeros(SYMBOLS, dtype=np.uint32)
    codes[alphabet.symbols] = canonical(lengths[alphabet.symbols])

    def write(symbols: np.ndarray) -> bytes:
        from tersor.coders.bytes import huffman_loops

        have = head.length % 32
        words = np.zeros((total - head.length + have + 31) // 32, dtype=np.uint32)
        rest = head.value & ((1 << have) - 1)
        used = huffman_loops.huffman_encode(symbols, codes, lengths.astype(np.uint8), rest, have, words)
        if used != total - head.length + have:
            raise changed()
        front = (head.value >> have).to_bytes(head.length // 32 * 4, "big")
        return (front + words.astype(">u4").tobytes())[: -(-total // 8)]

    return Plan(-(-total // 8), write)


def head_of(alphabet: Alphabet, lengths: np.ndarray) -> BitWriter:
    """First byte, alphabet and lengths, as the front of the stream's one string of bits."""
    out = BitWriter()
    out.bits(first_byte(HUFFMAN)[0], 8)
    write_alphabet(out, alphabet)
    write_list(out, lengths[alphabet.symbols] - 1)
    return out


def read_huffman(settings: int, data: memoryview, out: np.ndarray) -> None:
    from tersor.coders.bytes import huffman_loops

    if settings:
        raise FormatError(f"coded stream: huffman with settings {settings}, but only 0 is allowed")
    source = BitReader(data, 1)
    alphabet = read_alphabet(source)
    lengths = 1 + read_list(source, len(alphabet.offsets), MAX_LENGTH - 1)  # [K]
    if (1 << (MAX_LENGTH - lengths)).sum() != 1 << MAX_LENGTH:
        raise FormatError("coded stream: its Huffman code lengths do not fill the code space exactly")
    count = len(out)
    if count * int(lengths.min()) > 8 * len(data) - source.at:
        raise FormatError(f"coded stream: {len(data)} bytes are too short for {count} Huffman codes")
    order = lengths.argsort(kind="stable")
    owners = np.repeat(alphabet.symbols[order], 1 << (MAX_LENGTH - lengths[order]))  # [2^15]
    by_symbol = np.zeros(SYMBOLS, dtype=np.uint8)
    by_symbol[alphabet.symbols] = lengths
    strings, steps = lookup_tables(owners, by_symbol, LOOKUP if count > 1 << LOOKUP else SMALL_LOOKUP)
    words = np.frombuffer(bytes(data) + bytes(-len(data) % 4), dtype=">u4").astype(np.uint32)
    source.at = huffman_loops.huffman_decode(words, source.at, strings, steps, owners, by_symbol, out)
    if source.at > 8 * len(data) or source.byte_end() != len(data):
        raise FormatError(
            f"coded stream: {count} Huffman codes end at bit {source.at}, but the stream has {8 * len(data)}"
        )


def lookup_tables(owners: np.ndarray, lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pattern of `width` bits: symbols of its whole codes, their number << 8 | their bits."""
    from tersor.coders.bytes import huffman_loops

    strings, steps = np.empty(1 << width, dtype=np.uint64), np.empty(1 << width, dtype=np.uint16)
    huffman_loops.huffman_lookup(owners, lengths, width, strings, steps)
    return strings, steps
