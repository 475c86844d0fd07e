"""State dicts: a module's tensors by its state dict, checked to be the module's own.

A hook may cast, drop or compute tensors: then the stored tensors would not be those that run. Such a module
is refused by name. Tensors that a hook only detaches, copies or renames are found. Cost: none without hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.forms.form import as_bytes
from tersor.model.kinds import unfit

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")  # packages of layers


def own_tensors(model: nn.Module, *, meta: bool = False) -> dict[str, Tensor]:
    """The module's own tensors by the names of its state dict. `meta`: allow meta tensors.

    RefusedError if the state dict returns other tensors, or lacks one that the module has.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith(QUANTIZED):
            raise RefusedError(
                f"{path or 'the model'}: a quantized {type(module).__name__} of torch.ao keeps its values "
                f"where no state dict shows them as tensors. Give the model as it was, with float weights"
            )
    every = list(registered(model))
    own = {name: tensor for name, _, _, tensor in every}
    ids = {id(tensor) for tensor in own.values()}
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if why := misfit(name, value, own.get(name), id(value) in ids, meta=meta):
            raise RefusedError(f"{name}: the state dict {why}")
        found[name] = value if id(value) in ids else own[name]
    mine = {id(tensor) for tensor in found.values()}
    for name, module, key, tensor in every:
        if key not in module._non_persistent_buffers_set and id(tensor) not in mine:
            raise RefusedError(
                f"{name}: the module has it, but its state dict does not: a hook drops it, or the module "
                f"overrides state_dict(). A stored model would lack this tensor. Remove the hook, or mark a "
                f"buffer that need not be stored: register_buffer(..., persistent=False)"
            )
    return found


def misfit(name: str, value: Any, mine: Tensor | None, known: bool, *, meta: bool) -> str:
    """Why a state dict's value is not the module's own tensor; "" if it is. `known`: the value is one of the
    module's tensors; `mine`: the module's tensor of this name."""
    if name.rpartition(".")[2] == "_extra_state":
        return (
            f"holds a {type(value).__name__} from get_extra_state(); only parameters and buffers can be "
            f"stored. Register tensors as buffers, and set the rest in the module's constructor"
        )
    if why := unfit(value, meta=meta):
        return f"holds {why}"
    if value is mine or (known and mine is None):
        return ""
    if mine is None:
        return "holds a tensor that is not a parameter or buffer of the module. Remove the hook that adds it"
    if known:
        return "holds another of the module's tensors under this name. Remove the hook that changes it"
    if (mine.shape, mine.dtype) != (value.shape, value.dtype):
        has = f"the module has {mine.dtype} {list(mine.shape)}"
        return (
            f"holds {value.dtype} {list(value.shape)}, but {has}. A hook on the state dict changes it, so "
            f"the stored tensor would not be the one that runs. Remove the hook."
        )
    if not same(value, mine):
        return (
            "holds other values than the module. A hook on the state dict changes them, so the stored tensor "
            "would not be the one that runs. Remove the hook."
        )
    return ""


def registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, module, name in the module, tensor) of every parameter and buffer, under every name."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, name, tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits. True for the same memory, and for two meta tensors."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if a.is_meta or (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return np.array_equal(as_bytes(a), as_bytes(b))
