"""rANS: entropy coding with a static frequency table, with one multiplication to decode a symbol.

x -> f * (x div M) + x mod M - S      Duda 2013; interleaved as in Giesen 2014; states of 32 bits, words of 16

Overhead: the table, and 2 bytes for one lane, or 3 bytes a lane for several. The final states reveal damage.
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
LOW = 1 << 16  # a state below this reads a word
MAX_LANES = 5  # log2 of the largest number of lanes
LANE_WORTH = 1024  # bytes of payload for each lane: its 3 bytes of overhead are then negligible


def plan_rans(counts: np.ndarray, *, shapes: bool = True) -> Plan | None:
    if np.count_nonzero(counts) < 2:
        return None
    choice = best_table(counts, shapes=shapes)
    payload = choice.cost // (8 * UNIT)
    lanes = min(max((payload // LANE_WORTH).bit_length() - 1, 0), MAX_LANES)
    settings = lanes | choice.kind << 3
    head = first_byte(RANS, settings) + choice.head.to_bytes()

    def write(symbols: np.ndarray) -> bytes:
        return head + payload_of(symbols, choice.table, 1 << lanes)

    # The real payload can be slightly below the cost, depending on the states.
    return Plan(len(head) + payload - payload // 1024 - 2, write)


def first_state(table: Table, lanes: int) -> int:
    """The initial state of an encoder, and the final state of a decoder.

    A single lane starts below LOW, which saves bits and is allowed until a word is written. It does not start
    below M: there the first symbol of the alphabet does not change the state, so a wrong count would not be
    detected.
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
    except ZeroDivisionError:  # frequency 0: the symbol did not occur when the symbols were counted
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
            f"but 2^0 to 2^{MAX_LANES} states and kinds 0 to {PAIR} are allowed"
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
            "or the final states are not the encoder's initial ones"
        )


def read_states(data: memoryview, at: int, lanes: int) -> tuple[np.ndarray, int]:
    """(states [lanes], index of the first word's byte)."""
    left = len(data) - at
    if lanes > 1:
        if left < 4 * lanes:
            raise FormatError(f"coded stream: it ends inside its {lanes} states")
        states = np.frombuffer(data, dtype="<u4", offset=at, count=lanes).astype(np.uint64)
        if states.min() < LOW:
            raise FormatError(f"coded stream: a state of {states.min()}, but {LOW} or more is required")
        return states, at + 4 * lanes
    width = left if left <= 4 else 4 - left % 2
    if not width or not data[at + width - 1]:
        raise FormatError("coded stream: its state is missing, or the highest byte of the state is zero")
    return np.array([int.from_bytes(data[at : at + width], "little")], dtype=np.uint64), at + width
