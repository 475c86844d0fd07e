"""Wide loops: rANS with its states side by side in vectors of 16, in the instructions of AVX-512.

A vector takes 16 symbols in one look-up (a gather), and its words in one load, dealt out in order to the
states that want one (an expansion), as Giesen 2014 does with SSE 4.1. The stream is that of any 16 or 32
states: machines without these instructions take one state after the other, 2 to 3 times as slowly.
"""
# ruff: noqa: PLR0917  compiled functions take no keywords
# mypy: disable-error-code="no-untyped-def, call-arg, attr-defined"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from tersor.coders.loops import INT, U8_OUT, U16, U32, U32_OUT, compiled

LANES = 16  # of a vector: 32 bits each
TOO_FULL = 1 << 12  # slots of one symbol, from which they do not fit in 32 bits
WIDE = "+avx512f" in (config.CPU_FEATURES or get_host_cpu_features()).split(",")

BIT, BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
BITS, BYTES, SHORTS, WORDS = (ir.VectorType(kind, LANES) for kind in (BIT, BYTE, SHORT, WORD))


def alike(number: int, kind: ir.VectorType = WORDS) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(kind, [number] * LANES)


def spread(build: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector of one value."""
    first = build.insert_element(ir.Constant(WORDS, ir.Undefined), value, WORD(0))
    return build.shuffle_vector(first, first, alike(0))


def load(build: ir.IRBuilder, base: ir.Value, at: ir.Value, kind: ir.VectorType) -> ir.Value:
    found = build.load(build.bitcast(build.gep(base, [at]), kind.as_pointer()))
    found.align = kind.element.width // 8
    return found


def store(build: ir.IRBuilder, value: ir.Value, base: ir.Value, at: ir.Value) -> None:
    put = build.store(value, build.bitcast(build.gep(base, [at]), value.type.as_pointer()))
    put.align = value.type.element.width // 8


def call(build: ir.IRBuilder, name: str, gives: ir.Type, *values: ir.Value) -> ir.Value:
    """An instruction that LLVM knows by name."""
    kind = ir.FunctionType(gives, [value.type for value in values])
    return build.call(cgutils.get_or_insert_function(build.module, kind, name), values)


@intrinsic
def take16(typing_context, words, at, states, first, slots, shift, out, place):
    """One symbol of each of states[first : first + 16] to out[place:]; the place behind the words they take.

    Reads 16 words from `at` on, whether it needs them or not.
    """
    signature = types.int64(words, types.int64, states, types.int64, slots, types.int64, out, types.int64)

    def generate(context: Any, build: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        arrays = (0, 2, 4, 6)
        where = {k: context.make_array(signature.args[k])(context, build, given[k]).data for k in arrays}
        at, first, shift, place = (given[k] for k in (1, 3, 5, 7))
        bits = spread(build, build.trunc(shift, WORD))
        state = load(build, where[2], first, WORDS)
        index = build.and_(state, build.sub(build.shl(alike(1), bits), alike(1)))
        slot = call(
            build, "llvm.x86.avx512.mask.gather.dpi.512", WORDS,
            alike(0), build.bitcast(where[4], BYTE.as_pointer()), index, alike(1, BITS), WORD(4),
        )  # fmt: skip
        store(build, build.trunc(slot, BYTES), where[6], place)
        frequency = build.and_(build.lshr(slot, alike(8)), alike(0xFFF))
        state = build.add(build.mul(frequency, build.lshr(state, bits)), build.lshr(slot, alike(20)))
        needy = build.icmp_unsigned("<", state, alike(1 << 16))
        fresh = build.zext(load(build, where[0], at, SHORTS), WORDS)
        fresh = call(build, "llvm.x86.avx512.mask.expand.v16i32", WORDS, fresh, alike(0), needy)
        fresh = build.or_(build.shl(state, alike(16)), fresh)
        store(build, build.select(needy, fresh, state), where[2], first)
        taken = call(build, "llvm.ctpop.i16", SHORT, build.bitcast(needy, SHORT))
        return build.add(at, build.zext(taken, LONG))

    return signature, generate


def narrowed(slots: np.ndarray) -> np.ndarray:
    """Slots uint64 as in tables_loops.slots_of, their frequencies below TOO_FULL, as uint32: symbol |
    frequency << 8 | place << 20."""
    return slots.astype(np.uint32) | (slots >> np.uint64(12)).astype(np.uint32) & np.uint32(0xFFF00000)


if WIDE:

    @compiled(types.UniTuple(INT, 2)(U16, U32_OUT, U32, INT, U8_OUT))
    def rans_decode_wide(
        words: np.ndarray, states: np.ndarray, slots: np.ndarray, bits: int, out: np.ndarray
    ) -> tuple[int, int]:
        """Fill whole rounds of `out` as long as words for all are left; how many words and symbols are done.

        `states`: 16 or 32 of them. `slots` [2^bits] as `narrowed` gives them.
        """
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
        return at, i
