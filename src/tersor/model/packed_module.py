"""Packed module: a model whose layers keep the codes of their weights and decode them when they are read.

layer.weight    a property in place of the parameter: decoded anew at each access, and freed after use
layer.weight_packed.codes, scale, zero, member      buffers: move, are saved and copied with the module
Decoded weights are those of the plain model, bit for bit. Weights of 3 and 4 bits take half a byte. Cost: a
forward decodes each layer, so small batches take longer; such weights do not train. PyTorch's own kernels for
4 bits are not used: what they store depends on the processor, and their sums differ.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError, did_you_mean, few
from tersor.forms import Affine, Dense, Form
from tersor.forms.form import Shape, from_rows, to_rows
from tersor.forms.grid import Grid
from tersor.maths.uniform_grid import dequantize, expand
from tersor.model.attention import Attention
from tersor.model.deployed import half, smaller
from tersor.model.integer_weights import no_integers, under_masks

STYLES = ("plain", "packed")
WIDTHS = (1, 2, 4, 8)  # bits of a stored code
PARENTS = (nn.MultiheadAttention, Attention)  # have weights and layers, and do not loop over the layers


class PackedTensor(nn.Module):
    """The codes of a weight: uint8, several to a byte."""

    like: Tensor  # empty, of the dtype of the decoded weight
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    member: Tensor | None

    def __init__(self, plain: Affine, keep: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.shape: Shape = tuple(plain.codes.shape)
        self.axis, self.middle = plain.axis, 2 ** (plain.bits - 1)
        self.bits = next(bits for bits in WIDTHS if bits >= plain.bits)
        codes, grouping = to_rows(plain.codes.decode(), plain.axis), plain.grouping
        zero = None if plain.zero is None else plain.zero.decode()
        self.group = 0 if isinstance(grouping, Tensor) else grouping
        self.rows, self.columns = codes.shape
        if keep is not None:  # what a mask removes is decoded to 0
            nothing = codes.new_zeros(()) if zero is None else expand(zero, grouping, self.columns)
            codes = torch.where(to_rows(keep, plain.axis), codes, nothing)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.register_buffer("codes", packed((codes.int() + self.middle).to(torch.uint8), self.bits))
        self.register_buffer("scale", plain.scale.decode())
        self.register_buffer("zero", zero)
        self.register_buffer("member", grouping if isinstance(grouping, Tensor) else None)

    def decode(self) -> Tensor:
        """The weight, in the dtype that the module was moved to."""
        codes = unpacked(self.codes, self.bits, self.rows * self.columns).view(self.rows, self.columns)
        steps = codes.to(self.scale.dtype).sub_(self.middle)
        rows = dequantize(steps, self.scale, self.zero, self.group if self.member is None else self.member)
        return from_rows(rows, self.shape, self.axis).to(self.like.dtype).contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales keep their dtype, the decoded weight takes the new one: half() rounds the same weight."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.bits} bits"


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes of so many bits in bytes, flat: the first one in the lowest bits."""
    share = 8 // bits
    flat = nn.functional.pad(codes.flatten(), (0, -codes.numel() % share)).view(-1, share)
    found = flat[:, 0].clone()
    for at in range(1, share):
        found |= flat[:, at] << (at * bits)
    return found


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8."""
    if bits == 8:
        return stored
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
    return ((stored[:, None] >> shifts) & (2**bits - 1)).flatten()[:count]


def styled(
    model: nn.Module, forms: Mapping[str, Form], style: str, edge_grids: Mapping[str, Grid]
) -> nn.Module:
    """The given module, not a copy, in a style of STYLES. SettingError for another style, RefusedError for a
    packed one whose edges have grids."""
    if style not in STYLES:
        raise SettingError(f"model: style={style!r}; {did_you_mean(style, STYLES)}")
    if style == "plain":
        return model
    if edge_grids:
        raise RefusedError(
            "model: style='packed', but edges have grids, which a simulation rounds between float layers. "
            "Leave out style, or export the model: a runtime computes with the integers"
        )
    return packed_module(model, forms)


def packed_module(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """The given module, not a copy, with the codes of its weights in place of floats. `forms`: of its
    weights, by name. Warns with the names of weights in few bits that stay floats, and why."""
    own = dict(model.named_parameters(remove_duplicate=False))
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, tensor in module._parameters.items():
            homes.setdefault(id(tensor), []).append((module, key))
    left: dict[str, str] = {}
    for name, form in forms.items():
        plain, keep = under_masks(form)
        why = reason(plain, [module for module, _ in homes.get(id(own.get(name)), ())])
        if why:
            left |= {name: why} if smaller(form) or half(form) else {}
            continue
        stored = PackedTensor(plain, keep, own[name].dtype).to(own[name].device)  # type: ignore[arg-type]
        for module, key in homes[id(own[name])]:  # tied weights share it
            del module._parameters[key]
            module.add_module(f"{key}_packed", stored)
            kind: Any = type(module)
            keys: tuple[str, ...] = (key,)
            if issubclass(kind, PackedLayer):
                kind, keys = kind.plain, (*kind.keys, key)
            module.__class__ = packed_class(kind, keys)
    if left:
        text = few((f"{name} ({why})" for name, why in left.items()), 8)
        warnings.warn(f"packed: {len(left)} weights stay floats: {text}", stacklevel=3)
    return model


def reason(plain: Form, modules: list[nn.Module]) -> str:
    """Why a weight of these modules stays a float; "" if it is packed."""
    if isinstance(plain, Dense):
        return f"it is stored in {plain.dtype}, for which there are no codes".replace("torch.", "")
    if why := no_integers(plain):
        return why
    for module in modules:
        if isinstance(module, nn.RNNBase):
            return "its layer passes all weights to one call"
        if not isinstance(module, PARENTS) and any(
            not isinstance(child, PackedTensor) for child in module.children()
        ):
            return "its module has layers of its own, and may loop over them"
    return "" if modules else "it is no parameter"


class PackedLayer:
    """Marks a layer whose weights `keys` are decoded at each access. `plain`: its class before."""

    plain: type[nn.Module]
    keys: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, (self.plain, self.keys), self.__getstate__()  # its class is not found by its name


@functools.cache
def packed_class(kind: Any, keys: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a layer's class whose `keys` are read from the codes."""
    body: dict[str, Any] = {key: property(functools.partial(decoded, key)) for key in keys}
    body |= {"plain": kind, "keys": keys, "__module__": kind.__module__}
    return type(f"Packed{kind.__name__}", (PackedLayer, kind), body)


def decoded(key: str, layer: nn.Module) -> Tensor:
    stored: PackedTensor = layer._modules[f"{key}_packed"]  # type: ignore[assignment]
    return stored.decode()


def blank(kind: Any, keys: tuple[str, ...]) -> nn.Module:
    """An empty layer, for unpickling."""
    made = packed_class(kind, keys)
    return made.__new__(made)
