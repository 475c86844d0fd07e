"""Kinds: which tensors can be stored bit for bit, and what to do with the others.

strided, with data, of a dtype that a file can hold: tersor/dtypes.py, docs/format.md section 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tersor.dtypes import BY_DTYPE, unsupported


def unfit(value: Any, *, meta: bool = False) -> str:
    """Why this value cannot be stored, and the way out; "" if it can be. `meta` allows meta tensors, whose
    data is elsewhere."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; only tensors can be stored. Make it one: torch.tensor(x)"
    if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
        return "a lazy tensor: it has no shape yet. Run a batch through the model first"
    if value.is_quantized:
        return (
            f"a quantized tensor ({value.dtype}); only plain tensors can be stored. "
            f"Store {BY_DTYPE[value.dtype].way}"
        )
    if value.is_nested:
        return "a nested tensor; only plain tensors can be stored. Store its parts: x.unbind()"
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return (
            f"a {type(value).__name__}, a class of tensors that holds its values elsewhere; only plain "
            f"tensors can be stored. Give plain ones, such as x.full_tensor() of a DTensor, or x.dequantize()"
        )
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}; only plain tensors can be stored. Store x.to_dense()"
    if value.is_meta and not meta:
        return "a meta tensor: it has no values. Load its values before storing it"
    return unsupported(value.dtype)


def repeats(value: Tensor) -> bool:
    """Whether several elements share one memory location, as in the output of expand()."""
    steps = zip(value.shape, value.stride(), strict=True)
    return bool(value.numel()) and any(step == 0 and n > 1 for n, step in steps)


def resolved(value: Tensor) -> Tensor:
    """The tensor with conjugation and negation applied in memory; PyTorch keeps them as flags."""
    return value.resolve_conj().resolve_neg()
