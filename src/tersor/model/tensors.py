"""Tensors: a module's tensors by site, and replacements of the same kind."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tersor.dtypes import in_bytes
from tersor.errors import RefusedError
from tersor.model.sites import sites_of
from tersor.model.state_dicts import own_tensors, registered


def held(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the module's own tensors by site, aliases: other name -> site), by its state dict."""
    sites, _, tied = sites_of(model, meta=True)
    return {name: tensor for name, tensor in own_tensors(model, meta=True).items() if name in sites}, tied


def with_memory(model: nn.Module) -> nn.Module:
    """The model, or a copy with memory on the CPU for its tensors on the meta device, for a file's values.
    RefusedError for such a buffer that no file holds: nothing would fill it."""
    bare: dict[int, Tensor] = {}
    for name, module, key, tensor in registered(model):
        if tensor.is_meta and key in module._non_persistent_buffers_set:
            raise RefusedError(
                f"{name}: it is on the meta device, and no file holds it, so it would have no values. "
                f"Make the model on the CPU"
            )
        if tensor.is_meta:
            empty = torch.empty_like(tensor, device="cpu")
            learns = isinstance(tensor, nn.Parameter)
            bare[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
    return copy.deepcopy(model, bare) if bare else model


def blank(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor of this shape, with the device, memory format and requires_grad of `like`."""
    order = layout(like) if like.ndim == len(shape) else tuple(range(len(shape)))
    new = torch.empty_permuted(shape, order, dtype=dtype, device=like.device)
    if isinstance(like, nn.Parameter):
        new = type(like)(new, like.requires_grad and (dtype.is_floating_point or dtype.is_complex))
    vars(new).update(copy.deepcopy(vars(like)))
    return new


def layout(tensor: Tensor) -> tuple[int, ...]:
    """The axes in memory order, slowest first, for channels-last and transposed tensors; else 0, 1, 2, ..."""
    order = tuple(sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis]))
    fits = not tensor.is_contiguous() and tensor.permute(order).is_contiguous()
    return order if fits else tuple(range(tensor.ndim))


def put(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put the new tensor wherever the model holds the old one."""
    for _, module, name, tensor in list(registered(model)):
        if tensor is old:
            setattr(module, name, new)  # recurrent layers then update their list of weights


def memory(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 for a meta tensor."""
    return tensor.untyped_storage().data_ptr()


def checksum(tensor: Tensor) -> int:
    """A sum of a tensor's bytes, at memory speed; 0 for a meta or empty tensor."""
    if tensor.is_meta or not tensor.numel():
        return 0
    data = in_bytes(tensor.permute(layout(tensor)))
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
