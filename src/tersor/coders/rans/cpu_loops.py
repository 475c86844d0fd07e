"""CPU loops: the two steps of rANS that some processors do in one instruction, and how others do without it.

gather   what lies at 16 places                                  AVX-512: an instruction
deal     the next words in order to those of 16 that want one    AVX-512: an expansion; AVX2: a permutation,
         by a table of all 2^8 ways to want (Giesen 2014, there of 2^4)
LLVM compiles the rest for any processor. It aborts the process where an intrinsic needs an instruction that
the processor lacks, so it is asked what the processor has for which numba compiles.
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
    alike,
    call,
    joined,
    load,
    part,
    vector,
)

LANES = 16  # of the vectors that rANS is told in: 32 bits each
DEALT = "tersor.dealt"  # the table of `deal_permuted`, once in a module


def gather_singly(build: ir.IRBuilder, start: ir.Value, index: ir.Value, gives: ir.VectorType) -> ir.Value:
    """What lies at the places `index` (32 bits each) behind the start. The gathers of AVX2 were slower where
    they were measured, on Zen 4."""
    found = ir.Constant(gives, ir.Undefined)
    for k in range(gives.count):
        at = build.zext(build.extract_element(index, WORD(k)), LONG)
        found = build.insert_element(found, load(build, start, at, gives.element), WORD(k))
    return found


def gather_at_once(build: ir.IRBuilder, start: ir.Value, index: ir.Value, gives: ir.VectorType) -> ir.Value:
    """The same by AVX-512, 512 bits at a time."""
    width = gives.element.width
    kind = vector(gives.element, 512 // width)
    name = f"llvm.x86.avx512.mask.gather.dp{'i' if width == 32 else 'q'}.512"
    base, every = build.bitcast(start, BYTE.as_pointer()), alike(1, vector(BIT, kind.count))
    size = WORD(width // 8)
    found = [
        call(build, name, kind, alike(0, kind), base, part(build, index, first, kind.count), every, size)
        for first in range(0, gives.count, kind.count)
    ]
    return joined(build, found)


def deal_singly(
    build: ir.IRBuilder, words: ir.Value, at: ir.Value, needy: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """(words as 32 bits each, the place behind those that are wanted): who wants one has the next, the others
    have any. `needy`: a bit each, who wants one. As many words are read from `at` on as might be wanted."""
    kind = vector(WORD, needy.type.count)
    wanted, found = build.zext(needy, kind), ir.Constant(kind, ir.Undefined)
    for k in range(kind.count):
        word = build.zext(load(build, words, at, SHORT), WORD)
        found = build.insert_element(found, word, WORD(k))
        at = build.add(at, build.zext(build.extract_element(wanted, WORD(k)), LONG))
    return found, at


def deal_permuted(
    build: ir.IRBuilder, words: ir.Value, at: ir.Value, needy: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The same of 8 by AVX2: which word is whose stands in a table of 2 kB."""
    ranks = bytearray(rank for mask in range(256) for rank in ranks_of(mask))
    table = build.module.globals.get(DEALT) or cgutils.global_constant(
        build.module, DEALT, ir.Constant(ir.ArrayType(BYTE, len(ranks)), ranks)
    )
    mask, kind = build.bitcast(needy, BYTE), vector(WORD, 8)
    row = build.mul(build.zext(mask, LONG), LONG(8))
    which = build.zext(load(build, build.bitcast(table, BYTE.as_pointer()), row, vector(BYTE, 8)), kind)
    found = build.zext(load(build, words, at, vector(SHORT, 8)), kind)
    return call(build, "llvm.x86.avx2.permd", kind, found, which), behind(build, at, mask)


def deal_expanded(
    build: ir.IRBuilder, words: ir.Value, at: ir.Value, needy: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The same of 16 by AVX-512."""
    kind = vector(WORD, 16)
    found = build.zext(load(build, words, at, vector(SHORT, 16)), kind)
    found = call(build, "llvm.x86.avx512.mask.expand.v16i32", kind, found, alike(0, kind), needy)
    return found, behind(build, at, build.bitcast(needy, SHORT))


def ranks_of(mask: int) -> list[int]:
    """How many of the 8 bits below each are set."""
    return [0, *accumulate(mask >> k & 1 for k in range(7))]


def behind(build: ir.IRBuilder, at: ir.Value, mask: ir.Value) -> ir.Value:
    """The place behind as many words as bits are set."""
    taken = call(build, f"llvm.ctpop.i{mask.type.width}", mask.type, mask)
    return build.add(at, build.zext(taken, LONG))


class Way(NamedTuple):
    """How these steps are done on some processors."""

    register: str  # x86's name of one that holds all LANES or half of them; none: on any processor
    lanes: int  # that words are dealt to at a time
    gather: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.VectorType], ir.Value]
    deal: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], tuple[ir.Value, ir.Value]]


WAYS = {  # the fastest first
    "AVX-512": Way("zmm", 16, gather_at_once, deal_expanded),
    "AVX2": Way("ymm", 8, gather_singly, deal_permuted),
    "any": Way("", 4, gather_singly, deal_singly),
}


def way_of(triple: str, cpu: str, features: str) -> str:
    """The name of the first of WAYS that a processor has. It is told as numba tells LLVM of it.

    A processor's name implies features, and one feature another, so the words are not searched: LLVM adds two
    vectors. In registers of 256 bits it can do so in AVX2, not in AVX, and of 512 bits in AVX-512.
    """
    if triple.startswith("x86_64"):
        machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
        kind = f"<{LANES} x i32>"
        sum_of_two = f"define {kind} @f({kind} %a, {kind} %b) {{ %c = add {kind} %a, %b \n ret {kind} %c }}"
        found = machine.emit_assembly(binding.parse_assembly(sum_of_two))
        for name, way in WAYS.items():
            if way.register and re.search(rf"\bvpaddd\b.*%{way.register}", found):
                return name
    return "any"


# From what numba keys its cache by: code that was kept for one processor is never loaded on another.
HERE = way_of(*cpu_target.target_context.codegen().magic_tuple())
AT_ONCE, gather, deal = WAYS[HERE][1:]
