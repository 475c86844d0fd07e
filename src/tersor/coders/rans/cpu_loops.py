"""CPU loops: the two operations of rANS for which some processors have an instruction, in all variants.

gather   load 16 elements by index                               AVX-512: one instruction
expand   give the next words, in order, to the lanes of a mask   AVX-512: one instruction; AVX2: a permutation
         from a table of all 2^8 masks (Giesen 2014, there 2^4)

LLVM compiles everything else for any processor. LLVM aborts the process if an intrinsic needs an instruction
that the processor lacks, so `variant_of` asks LLVM what the processor that numba compiles for has.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from llvmlite import binding, ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from tersor.coders.vector_loops import (
    BIT,
    BYTE,
    LONG,
    SHORT,
    WORD,
    call,
    concatenated,
    constant,
    load,
    slice_lanes,
    vector,
)

LANES = 16  # lanes of a vector of rANS states, 32 bits each
PERMUTATIONS = "tersor.permutations"  # the table of `expand_permuted`: a global of the LLVM module


def gather_singly(
    build: ir.IRBuilder, start: ir.Value, index: ir.Value, result_type: ir.VectorType
) -> ir.Value:
    """Load elements by `index` (32 bits), one by one. The gather of AVX2 was slower on Zen 4."""
    found = ir.Constant(result_type, ir.Undefined)
    for k in range(result_type.count):
        at = build.zext(build.extract_element(index, WORD(k)), LONG)
        found = build.insert_element(found, load(build, start, at, result_type.element), WORD(k))
    return found


def gather_at_once(
    build: ir.IRBuilder, start: ir.Value, index: ir.Value, result_type: ir.VectorType
) -> ir.Value:
    """Load elements by index with AVX-512, 512 bits at a time."""
    width = result_type.element.width
    kind = vector(result_type.element, 512 // width)
    name = f"llvm.x86.avx512.mask.gather.dp{'i' if width == 32 else 'q'}.512"
    base, every = build.bitcast(start, BYTE.as_pointer()), constant(1, vector(BIT, kind.count))
    size, zeros, lanes = WORD(width // 8), constant(0, kind), kind.count
    found = [
        call(build, name, kind, zeros, base, slice_lanes(build, index, first, lanes), every, size)
        for first in range(0, result_type.count, lanes)
    ]
    return concatenated(build, found)


def expand_singly(
    build: ir.IRBuilder, words: ir.Value, at: ir.Value, needy: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """(a word of 32 bits for each lane, index of the next unused word): lanes of the mask `needy` get the
    next words in order, the others get any word. Reads as many words from `at` on as there are lanes."""
    kind = vector(WORD, needy.type.count)
    wanted, found = build.zext(needy, kind), ir.Constant(kind, ir.Undefined)
    for k in range(kind.count):
        word = build.zext(load(build, words, at, SHORT), WORD)
        found = build.insert_element(found, word, WORD(k))
        at = build.add(at, build.zext(build.extract_element(wanted, WORD(k)), LONG))
    return found, at


def expand_permuted(
    build: ir.IRBuilder, words: ir.Value, at: ir.Value, needy: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Like `expand_singly` for 8 lanes with AVX2: a table of 2 kB has the permutation for each mask."""
    ranks = bytearray(rank for mask in range(256) for rank in ranks_of(mask))
    table = build.module.globals.get(PERMUTATIONS) or cgutils.global_constant(
        build.module, PERMUTATIONS, ir.Constant(ir.ArrayType(BYTE, len(ranks)), ranks)
    )
    mask, kind = build.bitcast(needy, BYTE), vector(WORD, 8)
    row = build.mul(build.zext(mask, LONG), LONG(8))
    which = build.zext(load(build, build.bitcast(table, BYTE.as_pointer()), row, vector(BYTE, 8)), kind)
    found = build.zext(load(build, words, at, vector(SHORT, 8)), kind)
    return call(build, "llvm.x86.avx2.permd", kind, found, which), advanced(build, at, mask)


def expand_at_once(
    build: ir.IRBuilder, words: ir.Value, at: ir.Value, needy: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Like `expand_singly` for 16 lanes with AVX-512."""
    kind = vector(WORD, 16)
    found = build.zext(load(build, words, at, vector(SHORT, 16)), kind)
    found = call(build, "llvm.x86.avx512.mask.expand.v16i32", kind, found, constant(0, kind), needy)
    return found, advanced(build, at, build.bitcast(needy, SHORT))


def ranks_of(mask: int) -> list[int]:
    """For each of 8 bits, the number of set bits below it."""
    return [0, *accumulate(mask >> k & 1 for k in range(7))]


def advanced(build: ir.IRBuilder, at: ir.Value, mask: ir.Value) -> ir.Value:
    """`at` plus the number of set bits."""
    taken = call(build, f"llvm.ctpop.i{mask.type.width}", mask.type, mask)
    return build.add(at, build.zext(taken, LONG))


class Variant(NamedTuple):
    """The variant of both operations for a class of processors."""

    register: str  # x86 register name for LANES or LANES / 2 lanes; empty: any processor
    lanes: int  # lanes of one `expand`
    gather: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.VectorType], ir.Value]
    expand: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], tuple[ir.Value, ir.Value]]


VARIANTS = {  # the fastest first
    "AVX-512": Variant("zmm", 16, gather_at_once, expand_at_once),
    "AVX2": Variant("ymm", 8, gather_singly, expand_permuted),
    "any": Variant("", 4, gather_singly, expand_singly),
}


def variant_of(triple: str, cpu: str, features: str) -> str:
    """Name of the first of VARIANTS that a processor supports. The arguments are those that numba gives LLVM.

    The name of a processor implies features, and some features imply others, so the text is not searched.
    Instead, LLVM compiles the sum of two vectors. It uses registers of 512 bits only with AVX-512, and of 256
    bits only with AVX2, not with AVX.
    """
    if triple.startswith("x86_64"):
        machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
        kind = f"<{LANES} x i32>"
        sum_of_two = f"define {kind} @f({kind} %a, {kind} %b) {{ %c = add {kind} %a, %b \n ret {kind} %c }}"
        found = machine.emit_assembly(binding.parse_assembly(sum_of_two))
        for name, variant in VARIANTS.items():
            if variant.register and re.search(rf"\bvpaddd\b.*%{variant.register}", found):
                return name
    return "any"


# numba's cache key contains the same values, so code cached for one processor is never loaded on another.
VARIANT = variant_of(*cpu_target.target_context.codegen().magic_tuple())
AT_ONCE, gather, expand = VARIANTS[VARIANT][1:]
