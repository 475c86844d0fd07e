"""Wide loops: rANS with its states side by side in vectors of 16, in the instructions of AVX-512.

A vector takes 16 symbols in one look-up (a gather), and its words in one load, dealt out in order to the
states that want one (an expansion), as Giesen 2014 does with SSE 4.1. The stream is that of any 16 or 32
states: machines without these instructions take one state after the other, 2 to 3 times as slowly.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, attr-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from tersor.coders.loops import INT, LOW, N16, U8_OUT, U16, U32, U32_OUT, compiled
from tersor.coders.vector_loops import (
    BIT,
    BYTE,
    LONG,
    SHORT,
    WORD,
    alike,
    call,
    load,
    spread,
    start_of,
    store,
    vector,
)

LANES = 16  # of a vector: 32 bits each
WIDE = "+avx512f" in (config.CPU_FEATURES or get_host_cpu_features()).split(",")

WORDS, LONGS = vector(WORD, LANES), vector(LONG, LANES // 2)


def on_arrays(generate: Callable[..., ir.Value], *kinds: Any) -> Any:
    """What an intrinsic returns: its signature, and `generate` with places in place of arrays."""

    def lowered(context, build, signature, given):
        return generate(
            build,
            *(
                start_of(context, build, kind, value) if isinstance(kind, types.Array) else value
                for kind, value in zip(kinds, given, strict=True)
            ),
        )

    return types.int64(*kinds), lowered


def gather(build: ir.IRBuilder, start: ir.Value, index: ir.Value, gives: ir.VectorType) -> ir.Value:
    """What lies at the places `index` (32 bits each) behind the start."""
    name = "dpi" if gives == WORDS else "dpq"
    return call(
        build, f"llvm.x86.avx512.mask.gather.{name}.512", gives,
        alike(0, gives), build.bitcast(start, BYTE.as_pointer()), index,
        alike(1, vector(BIT, gives.count)), WORD(gives.element.width // 8),
    )  # fmt: skip


def refill(build: ir.IRBuilder, state: ir.Value, words: ir.Value, at: ir.Value) -> tuple[ir.Value, ir.Value]:
    """States of which those below 2^16 have taken a word each, in order, and the place behind these."""
    needy = build.icmp_unsigned("<", state, alike(1 << 16, WORDS))
    fresh = build.zext(load(build, words, at, vector(SHORT, LANES)), WORDS)
    fresh = call(build, "llvm.x86.avx512.mask.expand.v16i32", WORDS, fresh, alike(0, WORDS), needy)
    fresh = build.or_(build.shl(state, alike(16, WORDS)), fresh)
    taken = call(build, "llvm.ctpop.i16", SHORT, build.bitcast(needy, SHORT))
    return build.select(needy, fresh, state), build.add(at, build.zext(taken, LONG))


@intrinsic
def take16(typing_context, words, at, states, first, slots, bits, out, place):
    """One symbol of each of states[first : first + 16] to out[place:]; the place behind the words they take.

    Reads 16 words from `at` on, whether it needs them or not, as does `take16_of`.
    """

    def generate(build, words, at, states, first, slots, bits, out, place):
        shift = spread(build, build.trunc(bits, WORD), LANES)
        one = alike(1, WORDS)
        state = load(build, states, first, WORDS)
        slot = gather(build, slots, build.and_(state, build.sub(build.shl(one, shift), one)), WORDS)
        store(build, build.trunc(slot, vector(BYTE, LANES)), out, place)
        frequency = build.and_(build.lshr(slot, alike(8, WORDS)), alike(0xFFF, WORDS))
        state = build.mul(frequency, build.lshr(state, shift))
        state = build.add(state, build.lshr(slot, alike(20, WORDS)))
        state, behind = refill(build, state, words, at)
        store(build, state, states, first)
        return behind

    kinds = (words, types.int64, states, types.int64, slots, types.int64, out, types.int64)
    return on_arrays(generate, *kinds)


@intrinsic
def take16_of(typing_context, words, at, states, tables, slots, kinds, out, place):
    """The same of states[:16], each by a table of its own: that of its kind in kinds[place:].

    tables[kind]: where its slots begin << 5 | its bits. `slots` uint64 as in tables_loops.slots_of.
    """

    def generate(build, words, at, states, tables, slots, kinds, out, place):
        one, half = alike(1, WORDS), vector(WORD, LANES // 2)
        table = gather(build, tables, load(build, kinds, place, WORDS), WORDS)
        shift = build.and_(table, alike(31, WORDS))
        state = load(build, states, LONG(0), WORDS)
        index = build.and_(state, build.sub(build.shl(one, shift), one))
        index = build.add(index, build.lshr(table, alike(5, WORDS)))
        halves = [
            gather(build, slots, part(build, index, first, half), LONGS) for first in (0, LANES // 2)
        ]  # fmt: skip
        low = joined(build, *(build.trunc(slot, half) for slot in halves))
        high = joined(build, *(build.trunc(build.lshr(slot, alike(32, LONGS)), half) for slot in halves))
        symbol = build.trunc(low, vector(BYTE, LANES))
        store(build, build.sext(symbol, WORDS), out, place)
        state = build.mul(build.lshr(low, alike(8, WORDS)), build.lshr(state, shift))
        state, behind = refill(build, build.add(state, high), words, at)
        store(build, state, states, LONG(0))
        return behind

    return on_arrays(generate, words, types.int64, states, tables, slots, kinds, out, types.int64)


def part(build: ir.IRBuilder, value: ir.Value, first: int, kind: ir.VectorType) -> ir.Value:
    """Some lanes of a vector."""
    which = ir.Constant(vector(WORD, kind.count), list(range(first, first + kind.count)))
    return build.shuffle_vector(value, value, which)


def joined(build: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two vectors as one."""
    return build.shuffle_vector(low, high, ir.Constant(WORDS, list(range(LANES))))


if WIDE:

    @compiled(INT(U16, U32_OUT, U32, INT, U8_OUT))
    def rans_decode_wide(
        words: np.ndarray, states: np.ndarray, slots: np.ndarray, bits: int, out: np.ndarray
    ) -> np.int64:
        """loops.rans_decode for 16 or 32 states, with slots as in tables_loops.narrow_slots_of."""
        i = at = 0
        if states.size == 32:
            while i + 32 <= out.size and at + 32 <= words.size:
                at = take16(words, at, states, 0, slots, bits, out, i)
                at = take16(words, at, states, 16, slots, bits, out, i + 16)
                i += 32
        else:
            while i + 16 <= out.size and at + 16 <= words.size:
                at = take16(words, at, states, 0, slots, bits, out, i)
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
