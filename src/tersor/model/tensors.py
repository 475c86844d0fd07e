"""Tensors: where a module holds them, and others of the same kind to put there."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.forms.form import as_bytes
from tersor.model.sites import sites_of


def registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, its name there, tensor) of every parameter and buffer, under every name."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, name, tensor


def held(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the module's own tensors by site, other names -> site) of what its state dict gives.

    RefusedError where that is not what the module computes with.
    """
    sites, _, tied = sites_of(model, meta=True)
    own = {name: tensor for name, _, _, tensor in registered(model)}
    ids = {id(tensor) for tensor in own.values()}
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in sites:
            continue
        mine = value if id(value) in ids else own.get(name)
        if mine is None or (mine.shape, mine.dtype) != (value.shape, value.dtype):
            has = "none" if mine is None else f"{mine.dtype} {list(mine.shape)}"
            raise RefusedError(
                f"{name}: the state dict gives {value.dtype} {list(value.shape)}, the module has {has}. A "
                f"hook on the state dict changes it: what is stored would not be what runs. Take it off."
            )
        tensors[name] = mine
    return tensors, tied


def blank(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of this shape: on the device of `like`, in its order of axes in memory, trained
    where it is."""
    order = layout(like) if like.ndim == len(shape) else tuple(range(len(shape)))
    new = torch.empty_permuted(shape, order, dtype=dtype, device=like.device)
    if isinstance(like, nn.Parameter):
        new = type(like)(new, like.requires_grad and (dtype.is_floating_point or dtype.is_complex))
    vars(new).update(copy.deepcopy(vars(like)))
    return new


def layout(tensor: Tensor) -> tuple[int, ...]:
    """The axes in the order of memory, slowest first: channels last, turned over; as they are where there is
    no such order."""
    order = tuple(sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis]))
    fits = not tensor.is_contiguous() and tensor.permute(order).is_contiguous()
    return order if fits else tuple(range(tensor.ndim))


def put(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """The new tensor wherever the model holds the old one."""
    for _, module, name, tensor in list(registered(model)):
        if tensor is old:
            setattr(module, name, new)  # recurrent layers keep a list of their weights, and see to it


def memory(tensor: Tensor) -> int:
    """Where a tensor's storage is; 0 for those that have none."""
    return tensor.untyped_storage().data_ptr()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit. Two of the same memory are, and so are two without any."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if a.is_meta or (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return np.array_equal(as_bytes(a), as_bytes(b))


def checksum(tensor: Tensor) -> int:
    """A sum of a tensor's bytes, at the speed of memory; 0 for one without any."""
    if tensor.is_meta or not tensor.numel():
        return 0
    data = tensor.detach().permute(layout(tensor)).reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
