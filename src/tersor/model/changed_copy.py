"""Changed copy: a copy of a module with integers set and layers replaced.

Tensors that the caller provides substitutes for are not copied: wherever the module refers to one, also in a
list or an attribute, the copy refers to the substitute. The same holds for replaced layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tersor.errors import RefusedError, SiteError, did_you_mean
from tersor.model.changes import Change, Set
from tersor.model.graph_hooks import restore_hooks
from tersor.model.state_dicts import registered
from tersor.model.stock import module_at, names_of, replaced, unfuse
from tersor.model.tensors import blank

# What deepcopy raises for locks, files, generators, tensors with a graph, and a __deepcopy__ of the user's.
UNCOPIED = (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, copy.Error)
Memo = dict[int, Any]  # id of an object of the given module -> its substitute in the copy


@dataclass
class ChangedCopy:
    """A changed copy."""

    model: nn.Module
    asked: dict[str, set[str]] = field(default_factory=dict)  # module -> its attributes that were set


def changed_structure(model: nn.Module, changes: Sequence[Change] = ()) -> nn.Module:
    """The model's structure after these changes, with meta tensors, as replaced_sites.born needs it."""
    bare = {}
    for _, _, _, tensor in registered(model):
        if id(tensor) not in bare:
            bare[id(tensor)] = blank(tensor.detach().to("meta"), tuple(tensor.shape), tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                bare[id(tensor)] = nn.Parameter(bare[id(tensor)], tensor.requires_grad)
    return changed_copy(model, changes, bare).model


def changed_in_place(model: nn.Module, change: Change) -> nn.Module:
    """A private structure after one more change. Layers that are kept in lists or attributes, and not only as
    submodules, are still the old ones there."""
    if isinstance(change, Set):
        put_integer(module_at(model, change.module), change)
        return model
    return replaced(model, change)[0]


def changed_copy(model: nn.Module, changes: Sequence[Change], memo: Memo) -> ChangedCopy:
    """A copy with the changes made in order. `memo`: substitutes for tensors of the model, by id."""
    twin, swapped = ChangedCopy(copied(model, memo)), []
    for change in changes:
        if isinstance(change, Set):
            put_integer(module_at(twin.model, change.module), change)
            twin.asked.setdefault(change.module, set()).add(change.attribute)
            continue
        layer = module_at(twin.model, change.module)
        names = names_of(twin.model, layer)
        twin.model, layer, new = replaced(twin.model, change)
        swapped.append((layer, new))
        if type(new) is not type(layer):
            inside = tuple(f"{name}." if name else "" for name in names)
            twin.asked = {
                name: keys for name, keys in twin.asked.items()
                if name not in names and not name.startswith(inside)
            }  # fmt: skip
    if swapped:
        unfuse(twin.model)
        twin.model = with_layers(twin.model, swapped)
    return twin


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy; RefusedError for a module that cannot be copied, with what in it cannot be."""
    try:
        return copied(model, {})
    except (RefusedError, MemoryError):
        raise
    except Exception as error:
        raise RefusedError(
            f"the model cannot be copied, and the given one must not change: {uncopied(model)}"
            f"{type(error).__name__}: {error}. Keep such objects outside of the module, or give their "
            f"class a __deepcopy__; give scripted parts as plain modules"
        ) from error


def uncopied(model: nn.Module) -> str:
    """'body.lock is a lock: ', for the first attribute that cannot be copied alone; "" if all can be."""
    for path, module in model.named_modules():
        inside = {**vars(module), **module._parameters, **module._buffers}
        for name, value in inside.items():
            if isinstance(value, nn.Module) or (name.startswith("_") and isinstance(value, dict)):
                continue
            try:
                copy.deepcopy(value)
            except UNCOPIED:
                what = type(value).__name__
                return f"{f'{path}.' if path else ''}{name} is a {what}: "
    return ""


def copied(model: nn.Module, memo: Memo) -> nn.Module:
    """A deep copy. Tensors that a layer has computed, as weight_norm does, are copied without their graph."""
    for module in model.modules():
        for value in vars(module).values():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Tensor) and not each.is_leaf:
                    memo.setdefault(id(each), each.detach().clone())
    twin = copy.deepcopy(model, memo)
    restore_hooks(model, memo)
    if not isinstance(twin, nn.Module):
        raise RefusedError(
            f"the model cannot be copied: copy.deepcopy of this {type(model).__name__} returns a "
            f"{type(twin).__name__}, so its __deepcopy__ is wrong. Remove it."
        )
    mine = {id(module) for module in model.modules()}
    for path, module in twin.named_modules():
        if id(module) in mine:
            raise RefusedError(
                f"{path or 'the model'}: copy.deepcopy of this {type(module).__name__} returns the module "
                f"itself, so compressing would change the given model. Remove its __deepcopy__."
            )
    return twin


def with_layers(model: nn.Module, swapped: Iterable[tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A copy of the model with the old layers of `swapped` replaced by the new ones, also where they are not
    registered: in a list of layers, in a hook's method."""
    memo: Memo = {id(tensor): tensor for _, _, _, tensor in registered(model)}
    for layer, new in reversed(list(swapped)):
        memo[id(layer)] = copy.deepcopy(new, memo)
    return copy.deepcopy(model, memo)


def put_integer(module: nn.Module, change: Set) -> None:
    """Set an integer; SiteError if there is none, RefusedError if the module does not keep the value."""
    name, *places = change.attribute.split(".")
    what = f"{change.module}.{change.attribute}" if change.module else change.attribute
    have: Any = getattr(module, name, None)
    old = have
    for place in places:
        fits = isinstance(old, (tuple, list)) and place.isdecimal() and int(place) < len(old)
        old = old[int(place)] if fits else None
    if type(old) is not int:
        whole = [key for key in dir(module) if type(getattr(module, key, None)) is int]
        raise SiteError(f"{what} is not an integer of a {type(module).__name__}; {did_you_mean(name, whole)}")
    setattr(module, name, with_place(have, [int(place) for place in places], change.value))
    now = getattr(module, name)
    for place in places:
        now = now[int(place)]
    if now != change.value:
        raise RefusedError(f"{what} was set to {change.value}, but is {now}: the module computes it itself")


def with_place(have: Any, places: list[int], value: int) -> Any:
    """A copy of a nested tuple or list with another integer at this place."""
    if not places:
        return value
    items = list(have)
    items[places[0]] = with_place(items[places[0]], places[1:], value)
    if isinstance(have, tuple) and hasattr(have, "_make"):  # a named tuple
        return have._make(items)
    return type(have)(items)
