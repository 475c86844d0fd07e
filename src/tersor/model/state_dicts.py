"""Handed: what a module hands out by its state dict, and that these are its own tensors.

A hook may cast, drop or compute: then what is stored would not be what runs. Such a module is refused by
name; what a hook merely detaches, copies or renames is found again. Cost: nothing where nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.forms.form import as_bytes
from tersor.model.kinds import unfit


def handed(model: nn.Module, *, meta: bool = False) -> dict[str, Tensor]:
    """The module's own tensors by the names of its state dict. `meta`: tensors without values will do.

    RefusedError where the state dict gives something else, or lacks what the module has.
    """
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
                f"{name}: the module has it, its state dict does not: a hook drops it, or state_dict() is "
                f"the module's own. What is stored would be another network. Take the hook off, or say that "
                f"it is not to be stored: register_buffer(..., persistent=False)"
            )
    return found


def misfit(name: str, value: Any, mine: Tensor | None, known: bool, *, meta: bool) -> str:
    """Why what a state dict gives under a name is not the module's own; "" where it is. `known`: it is one of
    the module's tensors; `mine`: the one of this name."""
    if name.rpartition(".")[2] == "_extra_state":
        return (
            f"holds a {type(value).__name__} of get_extra_state(); only parameters and buffers can be "
            f"stored. Register tensors as buffers, and leave the rest to the module's constructor"
        )
    if why := unfit(value, meta=meta):
        return f"holds {why}"
    if value is mine or (known and mine is None):
        return ""
    if mine is None:
        return "computes it: no parameter or buffer of the module is this one. Take the hook on it off"
    if known:
        return "gives another of the module's tensors under this name. Take the hook on it off"
    if (mine.shape, mine.dtype) != (value.shape, value.dtype):
        has = f"the module has {mine.dtype} {list(mine.shape)}"
        return (
            f"gives {value.dtype} {list(value.shape)}, {has}. A hook on the state dict changes it: what is "
            f"stored would not be what runs. Take it off."
        )
    if not same(value, mine):
        return (
            "gives other values than the module has. A hook on it changes them: what is stored would not be "
            "what runs. Take it off."
        )
    return ""


def registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, its name there, tensor) of every parameter and buffer, under every name."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, name, tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit. Two of the same memory are, and so are two without any."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if a.is_meta or (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return np.array_equal(as_bytes(a), as_bytes(b))
