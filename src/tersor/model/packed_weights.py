"""Packed weights: codes of a few bits and a scale for each block of inputs, as runtimes' kernels take them.

w[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g]        g = i // block; codes and zero from 0 to 2^bits - 1
Rows with one scale, or one scale for the whole weight, have equal scales in all their blocks. Exported, such
a weight is one operator tersor::dequantize_blocks, which a runtime's writer turns into its own. Tables of
values, more than 8 bits, and groups of inputs that are not adjacent have no such kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.forms import Affine, Form
from tersor.forms.form import Shape, from_rows, to_rows
from tersor.maths.uniform_grid import dequantize
from tersor.model.integer_weights import no_integers, under_masks

SMALLEST = 16  # inputs in a block of the kernels; larger ones are powers of two
LEAST = 4  # inputs in a block whose scale takes no more room than their floats would


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight of `shape`, as rows: codes uint8 [O, I], scale float32 [O, G], zero uint8 [O, G]."""

    tensors: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero")
    codes: Tensor
    scale: Tensor
    zero: Tensor
    block: int  # inputs in a block; the last one may have fewer
    bits: int
    shape: Shape
    axis: int  # of the rows

    def decode(self) -> Tensor:
        return from_rows(
            dequantize_blocks(self.codes, self.scale, self.zero, self.block), self.shape, self.axis
        )


def packed_weight(form: Form, dtype: torch.dtype = torch.float32) -> PackedWeight | str:
    """The codes of a weight in blocks, or why it has none. `dtype`: of the model's weight. The decoded
    numbers are those of the form, bit for bit; what a mask removes has its block's zero point as its code."""
    plain, keep = under_masks(form)
    if not isinstance(plain, Affine) or plain.bits > 8:
        return no_integers(plain)
    scale = plain.scale.decode()
    for word, given in (("it is", dtype), ("its scales are", scale.dtype)):
        if given is not torch.float32:
            return f"{word} {given}, not float32".replace("torch.", "")
    codes, groups, half = to_rows(plain.codes.decode(), plain.axis), plain.groups(), 2 ** (plain.bits - 1)
    rows, columns = codes.shape
    if not codes.numel():
        return "it is empty"
    if scale.shape[1] == 1:
        groups = torch.zeros(columns, dtype=torch.int64)
    block = block_of(groups, plain.bits)
    if block is None:
        return f"its groups of inputs are not adjacent blocks of {LEAST} or more"
    first = groups[::block]
    scale = scale[:, first].expand(rows, -1)
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    if plain.zero is not None:
        zero = plain.zero.decode().int()[:, first].expand(rows, -1)
    if keep is not None:
        columns_of = torch.arange(columns) // block
        codes = torch.where(to_rows(keep, plain.axis), codes.int(), zero[:, columns_of])
    up = []
    for word, values in (("codes", codes), ("zero points", zero)):
        moved = values.int() + half
        if moved.min() < 0 or moved.max() >= 2**plain.bits:
            return f"it has {word} outside of its {plain.bits} bits"
        up.append(moved.to(torch.uint8).contiguous())
    return PackedWeight(
        up[0], scale.contiguous(), up[1], block, plain.bits, tuple(plain.codes.shape), plain.axis
    )


def block_of(groups: Tensor, bits: int) -> int | None:
    """The block size for columns in these groups [I]: a power of two with the fewest bytes, or where none
    fits in the groups, the largest equal blocks. None if they are too small."""
    columns, best = len(groups), (0, 0)
    size = SMALLEST
    while True:
        count = -(-columns // size)
        if torch.equal(groups, groups[::size].repeat_interleave(size)[:columns]):
            cost = count * (size * (4 if bits <= 4 else 8) + 32)  # bits; the last block is stored whole
            if not best[1] or cost <= best[0]:
                best = cost, size
        if size >= columns:
            break
        size *= 2
    if best[1]:
        return best[1]
    ends = groups.unique_consecutive(return_counts=True)[1].cumsum(0)[:-1]
    size = math.gcd(*ends.tolist()) or columns
    return size if size >= LEAST else None


@torch.library.custom_op("tersor::dequantize_blocks", mutates_args=())
def dequantize_blocks(codes: Tensor, scale: Tensor, zero: Tensor, block: int) -> Tensor:
    """(codes - zero) * scale as float32 [O, I], as one operator of an exported graph."""
    return dequantize(codes, scale, zero, block)


@dequantize_blocks.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor, block: int) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
