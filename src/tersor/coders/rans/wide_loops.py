"""Wide loops: decode rANS with 16 states in one vector; Giesen 2014 does so with 4.

A vector looks up 16 symbols, and the states that are below their lower bound get the next words in order
(cpu_loops.py). A decoder that takes one state after the other reads the same stream at half the speed.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, attr-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tersor.coders.loops import INT, LOW, N16, U8_OUT, U16, U32, U32_OUT
from tersor.coders.rans.cpu_loops import AT_ONCE, LANES, expand, gather
from tersor.coders.vector_loops import (
    BYTE,
    LONG,
    WORD,
    broadcast,
    concatenated,
    constant,
    data_pointer,
    load,
    slice_lanes,
    store,
    vector,
)
from tersor.compiled import compiled

WORDS, LONGS = vector(WORD, LANES), vector(LONG, LANES)


def on_arrays(generate: Callable[..., ir.Value], *kinds: Any) -> Any:
    """The result of an intrinsic: (signature, `generate` with data pointers instead of arrays)."""

    def lowered(context, build, signature, args):
        return generate(
            build,
            *(
                data_pointer(context, build, kind, value) if isinstance(kind, types.Array) else value
                for kind, value in zip(kinds, args, strict=True)
            ),
        )

    return types.int64(*kinds), lowered


def refill(build: ir.IRBuilder, state: ir.Value, words: ir.Value, at: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(states, next word): each state below 2^16 shifts in one word, in order."""
    kind, found = vector(WORD, AT_ONCE), []
    for first in range(0, LANES, AT_ONCE):
        before = slice_lanes(build, state, first, AT_ONCE)
        needy = build.icmp_unsigned("<", before, constant(1 << 16, kind))
        fresh, at = expand(build, words, at, needy)
        fresh = build.or_(build.shl(before, constant(16, kind)), fresh)
        found.append(build.select(needy, fresh, before))
    return concatenated(build, found), at


@intrinsic
def decode16(typing_context, words, at, states, first, slots, bits, out, place):
    """Decode one symbol from each of states[first : first + 16] to out[place:]. Returns the next word's
    index.

    Always reads 16 words from `at` on, as does `decode16_tables`.
    """

    def generate(build, words, at, states, first, slots, bits, out, place):
        shift = broadcast(build, build.trunc(bits, WORD), LANES)
        one = constant(1, WORDS)
        state = load(build, states, first, WORDS)
        slot = gather(build, slots, build.and_(state, build.sub(build.shl(one, shift), one)), WORDS)
        store(build, build.trunc(slot, vector(BYTE, LANES)), out, place)
        frequency = build.and_(build.lshr(slot, constant(8, WORDS)), constant(0xFFF, WORDS))
        state = build.mul(frequency, build.lshr(state, shift))
        state = build.add(state, build.lshr(slot, constant(20, WORDS)))
        state, behind = refill(build, state, words, at)
        store(build, state, states, first)
        return behind

    kinds = (words, types.int64, states, types.int64, slots, types.int64, out, types.int64)
    return on_arrays(generate, *kinds)


@intrinsic
def decode16_tables(typing_context, words, at, states, tables, slots, kinds, out, place):
    """Like `decode16` for states[:16], each with its own table: that of its kind in kinds[place:].

    tables[kind]: first slot << 5 | bits. `slots` uint64 as in tables_loops.slots_of.
    """

    def generate(build, words, at, states, tables, slots, kinds, out, place):
        one = constant(1, WORDS)
        table = gather(build, tables, load(build, kinds, place, WORDS), WORDS)
        shift = build.and_(table, constant(31, WORDS))
        state = load(build, states, LONG(0), WORDS)
        index = build.and_(state, build.sub(build.shl(one, shift), one))
        index = build.add(index, build.lshr(table, constant(5, WORDS)))
        slot = gather(build, slots, index, LONGS)
        low, high = (build.trunc(build.lshr(slot, constant(shift, LONGS)), WORDS) for shift in (0, 32))
        symbol = build.trunc(low, vector(BYTE, LANES))
        store(build, build.sext(symbol, WORDS), out, place)
        state = build.mul(build.lshr(low, constant(8, WORDS)), build.lshr(state, shift))
        state, behind = refill(build, build.add(state, high), words, at)
        store(build, state, states, LONG(0))
        return behind

    return on_arrays(generate, words, types.int64, states, tables, slots, kinds, out, types.int64)


@compiled(INT(U16, U32_OUT, U32, INT, U8_OUT))
def rans_decode_wide(
    words: np.ndarray, states: np.ndarray, slots: np.ndarray, bits: int, out: np.ndarray
) -> np.int64:
    """rans_loops.rans_decode for 16 or 32 states, with slots as in tables_loops.narrow_slots_of."""
    i = at = 0
    if states.size == 32:
        while i + 32 <= out.size and at + 32 <= words.size:
            at = decode16(words, at, states, 0, slots, bits, out, i)
            at = decode16(words, at, states, 16, slots, bits, out, i + 16)
            i += 32
    else:
        while i + 16 <= out.size and at + 16 <= words.size:
            at = decode16(words, at, states, 0, slots, bits, out, i)
            i += 16
    mask = np.uint32((1 << bits) - 1)
    for k in range(i, out.size):
        lane = k & (states.size - 1)
        slot = slots[states[lane] & mask]
        x = np.uint64((slot >> 8) & 0xFFF) * np.uint64(states[lane] >> bits) + np.uint64(slot >> 20)
        if x < LOW and at < words.size:
            x = x << N16 | np.uint64(words[at])
            at += 1
        states[lane] = x
        out[k] = slot & 0xFF
    return np.int64(at)
