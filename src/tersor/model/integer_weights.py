"""Integer weights: the codes of a weight as a runtime's integer kernels take them.

w = codes * scale        codes int8, symmetric; one scale, or one for each index of an axis
Exported, such a weight is one operator tersor::dequantize(codes, scale, axis), which a runtime's writer turns
into its own. Grids with zero points, groups of inputs, more than 8 bits, and tables of values have no integer
kernel; some of these are packed (packed_weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersor.forms import Affine, Form, LowRank, Masked, uncoded


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """codes int8, of the weight's shape; scale float32 [1], or [C] along `axis`."""

    tensors: ClassVar[tuple[str, ...]] = ("codes", "scale")
    codes: Tensor
    scale: Tensor
    axis: int

    def decode(self) -> Tensor:
        return dequantize_op(self.codes, self.scale, self.axis)


def integer_weight(form: Form) -> IntegerWeight | str:
    """The codes of a weight, or why it has none that integer kernels take."""
    plain, keep = under_masks(form)
    if not isinstance(plain, Affine) or plain.bits > 8:
        return no_integers(plain)
    if plain.zero is not None:
        return "its grid has zero points"
    scale, codes = plain.scale.decode().float(), plain.codes.decode()
    if scale.ndim != 2 or scale.shape[1] != 1:
        return "groups of its inputs have scales of their own"
    if keep is not None:
        codes = torch.where(keep, codes, codes.new_zeros(()))
    return IntegerWeight(codes.to(torch.int8).contiguous(), scale[:, 0].contiguous(), plain.axis)


def no_integers(plain: Form) -> str:
    """Why a form, without masks, holds no integers of at most 8 bits; "" if it does."""
    if isinstance(plain, LowRank):
        return "it is a product; factorize layers=true makes layers of its factors, which take integers"
    if not isinstance(plain, Affine):
        return f"its form is {plain.name}, not integers on a uniform grid"
    return f"its codes have {plain.bits} bits, more than 8" if plain.bits > 8 else ""


def under_masks(form: Form) -> tuple[Form, Tensor | None]:
    """The form under its masks, without coded leaves, and where it is kept; None if there is no mask."""
    plain, keep = uncoded(form), None
    while isinstance(plain, Masked):
        keep = plain.within(keep)
        plain = plain.body
    return plain, keep


@torch.library.custom_op("tersor::dequantize", mutates_args=())
def dequantize_op(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """codes * scale as float32, as one operator of an exported graph."""
    shape = [-1 if at == axis else 1 for at in range(codes.ndim)] if len(scale) > 1 else []
    return codes.float() * scale.reshape(shape)


@dequantize_op.register_fake
def _(codes: Tensor, scale: Tensor, *axis: Any) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
