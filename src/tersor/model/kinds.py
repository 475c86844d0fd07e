"""Kinds: which tensors can be stored bit for bit, and the way out for every other.

strided, with values, of one of the dtypes that a file holds: tersor/dtypes.py, docs/format.md section 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.dtypes import BY_DTYPE, unheld


def unfit(value: Any, *, meta: bool = False) -> str:
    """What this is that cannot be stored, and the way out; empty where it can be. `meta`: its values are
    elsewhere."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; only tensors can be stored. Make it one: torch.tensor(x)"
    if value.is_quantized:
        return (
            f"a quantized tensor ({value.dtype}); only plain tensors can be stored. "
            f"Store {BY_DTYPE[value.dtype].way}"
        )
    if value.is_nested:
        return "a nested tensor; only plain tensors can be stored. Store its parts: x.unbind()"
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}; only plain tensors can be stored. Store x.to_dense()"
    if value.is_meta and not meta:
        return "a meta tensor: it has no values. Store it after its values were loaded"
    return unheld(value.dtype)


def repeats(value: Tensor) -> bool:
    """Whether it shows one element at several places, as what expand() returns does."""
    return any(step == 0 and n > 1 for n, step in zip(value.shape, value.stride(), strict=True))


def resolved(value: Tensor) -> Tensor:
    """The same numbers in memory as they are meant: PyTorch writes a conjugate or a negative as a mark."""
    return value.resolve_conj().resolve_neg()
