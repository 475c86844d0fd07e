"""Vector loops: helpers to write LLVM vector code for inner loops that are not vectorized automatically.

They generate the body of a numba intrinsic. The result is the same on every machine: LLVM splits a vector
that is wider than the machine's registers. `multiply_pairs` becomes one instruction on x86, and a few on Arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

BIT, BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
DOUBLE = ir.DoubleType()


def vector(kind: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def constant(number: float, kind: ir.VectorType) -> ir.Constant:
    """A constant vector with one number in all lanes."""
    return ir.Constant(kind, [number] * kind.count)


def broadcast(build: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A vector with one value in all lanes."""
    first = build.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, WORD(0))
    return build.shuffle_vector(first, first, constant(0, vector(WORD, lanes)))


def slice_lanes(build: ir.IRBuilder, value: ir.Value, first: int, lanes: int) -> ir.Value:
    """Lanes first : first + lanes of a vector."""
    which = ir.Constant(vector(WORD, lanes), list(range(first, first + lanes)))
    return build.shuffle_vector(value, value, which)


def concatenated(build: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    """Concatenate vectors of equal size; their number is a power of two."""
    while len(parts) > 1:
        every = ir.Constant(vector(WORD, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [build.shuffle_vector(*two, every) for two in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def data_pointer(context: Any, build: ir.IRBuilder, kind: Any, array: ir.Value) -> ir.Value:
    """Pointer to the first element of a numba array."""
    return context.make_array(kind)(context, build, array).data


def pointer_to(build: ir.IRBuilder, start: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
    return build.bitcast(build.gep(start, [at]), kind.as_pointer())


def load(build: ir.IRBuilder, start: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
    """Load a value or vector from element `at`, aligned to an element only."""
    found = build.load(pointer_to(build, start, at, kind))
    found.align = size_of(start.type.pointee)
    return found


def store(build: ir.IRBuilder, value: ir.Value, start: ir.Value, at: ir.Value) -> None:
    put = build.store(value, pointer_to(build, start, at, value.type))
    put.align = size_of(start.type.pointee)


def size_of(kind: ir.Type) -> int:
    return 8 if kind == DOUBLE else kind.width // 8


def call(build: ir.IRBuilder, name: str, result_type: ir.Type, *values: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by name."""
    kind = ir.FunctionType(result_type, [value.type for value in values])
    return build.call(cgutils.get_or_insert_function(build.module, kind, name), values)


def fold(
    build: ir.IRBuilder,
    count: ir.Value,
    values: Sequence[ir.Value],
    step: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
) -> Sequence[ir.Value]:
    """Loop: values = step(i, values) for i = 0 .. count - 1, count >= 1. The values stay in registers."""
    before, body = build.block, build.append_basic_block("body")
    after = build.append_basic_block("after")
    build.branch(body)
    build.position_at_end(body)
    index = build.phi(LONG)
    held = [build.phi(value.type) for value in values]
    found = step(index, held)
    following = build.add(index, LONG(1))
    for phi, first, later in zip([index, *held], [LONG(0), *values], [following, *found], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, build.block)
    build.cbranch(build.icmp_signed("<", following, count), body, after)
    build.position_at_end(after)
    return found


def multiply_pairs(build: ir.IRBuilder, pairs: ir.Value, by: ir.Value) -> ir.Value:
    """a * c + b * d for each pair (a, b) of int16 in <32 x i16> and one pair (c, d) in an i32: <16 x i32>."""
    lanes = pairs.type.count
    wide, half = vector(WORD, lanes), lanes // 2
    factors = build.bitcast(broadcast(build, by, half), pairs.type)
    products = build.mul(build.sext(pairs, wide), build.sext(factors, wide))
    even, odd = (
        build.shuffle_vector(products, products, ir.Constant(vector(WORD, half), list(range(k, lanes, 2))))
        for k in (0, 1)
    )
    return build.add(even, odd)
