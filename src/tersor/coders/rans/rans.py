"""rANS: as near to the entropy as the table allows, in one multiplication a symbol.

x -> f * (x div M) + x mod M - S      Duda 2013; interleaved as in Giesen 2014; states of 32 bits, words of 16
Costs the table, and 2 bytes for one lane or 3 a lane for several; the states at the end betray damage.
"""

from __future__ import annotations

import numpy as np

from tersor.coders.alphabet import SYMBOLS
from tersor.coders.bit_strings import BitReader
from tersor.coders.plan import Plan, changed, first_byte
from tersor.coders.rans.table_plan import UNIT, best_table
from tersor.coders.rans.tables import PAIR, Table, read_table
from tersor.errors import FormatError

RANS = 3
LOW = 1 << 16  # a state below this takes a word
MAX_LANES = 5  # as a power of two, in a stream
LANE_WORTH = 1024  # bytes of payload that make another lane's 3 bytes a trifle


def plan_rans(counts: np.ndarray) -> Plan | None:
    if np.count_nonzero(counts) < 2:
        return None
    choice = best_table(counts)
    payload = choice.cost // (8 * UNIT)
    lanes = min(max((payload // LANE_WORTH).bit_length() - 1, 0), MAX_LANES)
    settings = lanes | choice.kind << 3
    head = first_byte(RANS, settings) + choice.head.to_bytes()

    def write(symbols: np.ndarray) -> bytes:
        return head + payload_of(symbols, choice.table, 1 << lanes)

    # The cost is what the frequencies promise, and luck with the states may beat it by a little.
    return Plan(len(head) + payload - payload // 1024 - 2, write)


def first_state(table: Table, lanes: int) -> int:
    """What an encoder begins with and a decoder must end with.

    One lane begins low, which saves bits: until a word is written, a state may be below LOW. But not below M,
    where the first symbol of the alphabet leaves it as it is, and a wrong count would go unnoticed.
    """
    return LOW if lanes > 1 else 1 << table.bits


def by_symbol(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and first slots, [256] each."""
    frequencies, starts = np.zeros((2, SYMBOLS), dtype=np.uint32)
    frequencies[table.symbols] = table.frequencies
    starts[table.symbols] = table.frequencies.cumsum() - table.frequencies
    return frequencies, starts


def payload_of(symbols: np.ndarray, table: Table, lanes: int) -> bytes:
    from tersor.coders.rans import rans_loops

    frequencies, starts = by_symbol(table)
    states = np.full(lanes, first_state(table, lanes), dtype=np.uint64)
    words = np.empty(len(symbols), dtype=np.uint16)
    try:
        at = rans_loops.rans_encode(symbols, frequencies, starts, table.bits, states, words)
    except ZeroDivisionError:  # the frequency of a symbol that was not there when they were counted
        raise changed() from None
    if lanes == 1:
        state = int(states[0])
        front = state.to_bytes((state.bit_length() + 7) // 8, "little")
    else:
        front = states.astype("<u4").tobytes()
    return front + words[at:].astype("<u2").tobytes()


def read_rans(settings: int, data: memoryview, out: np.ndarray) -> None:
    from tersor.coders.rans import rans_loops, tables_loops, wide_loops

    lanes, kind = settings & 7, settings >> 3
    if lanes > MAX_LANES or kind > PAIR:
        raise FormatError(
            f"coded stream: rans with 2^{lanes} states and a table of kind {kind}, "
            f"but 2^0 to 2^{MAX_LANES} and 0 to {PAIR} are defined"
        )
    source = BitReader(data, 1)
    table = read_table(source, kind)
    states, at = read_states(data, source.byte_end(), 1 << lanes)
    if (len(data) - at) % 2:
        raise FormatError("coded stream: it ends inside a word")
    words = np.frombuffer(data, dtype="<u2", offset=at)
    many = len(states) >= wide_loops.LANES
    narrow = tables_loops.narrow_slots_of(table.symbols, table.frequencies, table.bits) if many else ()
    if len(narrow):
        states = states.astype(np.uint32)
        used = wide_loops.rans_decode_wide(words, states, narrow, table.bits, out)
    else:
        used = rans_loops.rans_decode(words, states, table.slots(), table.bits, out)
    if used != len(words) or (states != first_state(table, len(states))).any():
        raise FormatError(
            f"coded stream: damaged, or not of {len(out)} symbols: {used} of {len(words)} words were used, "
            "and the states are not those that every encoder begins with"
        )


def read_states(data: memoryview, at: int, lanes: int) -> tuple[np.ndarray, int]:
    """The states [lanes], and where the words begin."""
    left = len(data) - at
    if lanes > 1:
        if left < 4 * lanes:
            raise FormatError(f"coded stream: it ends inside its {lanes} states")
        states = np.frombuffer(data, dtype="<u4", offset=at, count=lanes).astype(np.uint64)
        if states.min() < LOW:
            raise FormatError(f"coded stream: a state of {states.min()}, but the least is {LOW}")
        return states, at + 4 * lanes
    width = left if left <= 4 else 4 - left % 2
    if not width or not data[at + width - 1]:
        raise FormatError("coded stream: its state is missing, or begins with a zero")
    return np.array([int.from_bytes(data[at : at + width], "little")], dtype=np.uint64), at + width
