"""Module writer: write decoded forms into a copy of a module; no other code does so.

given module, changes, forms -> a new module with tensors of new shapes, new integers, replaced layers
The given module's tensors are not copied: the copy gets empty tensors of the forms' shapes, and each is
filled once. Cost: the memory of the decoded tensors, plus what decoding the largest one needs.
Every tensor is read back through the new module's state dict and compared bit by bit, so that a hook that
casts, a setter that computes or a layer that cannot be copied is an error here and not a wrong file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SiteError, did_you_mean
from tersor.forms import Form
from tersor.model.changed_copy import ChangedCopy, changed_copy
from tersor.model.changes import Change
from tersor.model.parametrizations import plain_of
from tersor.model.sites import Site
from tersor.model.sizes import sizes_of
from tersor.model.state_dicts import same
from tersor.model.stock import module_at
from tersor.model.tensors import blank, checksum, held, memory, put

NONE: Mapping[str, str] = MappingProxyType({})


def write_module(
    model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], aliases: Mapping[str, str] = NONE,
    changes: Sequence[Change] = (),
) -> nn.Module:  # fmt: skip
    """A copy of `model` with `changes` applied, whose tensors are the decoded forms: each in its site's
    dtype, on the device of the tensor that it replaces.

    `model` is the given module, before any change; weights that its layers compute are plain in the copy.
    `forms`, `sites` and `aliases` (other names of sites) are the current ones. Model and forms may tie
    different tensors if the values agree. Everything outside the state dict is copied too: hooks, modes,
    attributes, other buffers. A buffer that shares another's memory gets its own.

    Raises SiteError if the forms were made from another model, and RefusedError if the changes do not fit
    the shapes or the module does not return the values that were written.
    """
    model = plain_of(model, names_of(forms, aliases))
    pairs = replacements(model, forms, sites, aliases)
    given = {memory(old) for _, old, _ in pairs} - {0}
    twin = changed_copy(model, changes, {id(old): new for _, old, new in pairs})
    tensors, tied = held(twin.model)
    source = sources(tensors, tied, forms, aliases)
    for name, old, _ in pairs:
        check_given(name, old, sites[name])
    moved = {id(new) for _, old, new in pairs if new.shape != old.shape}
    for name, tensor in tensors.items():
        form, dtype = forms[source[name][0]], sites[source[name][0]].torch_dtype
        if (tuple(tensor.shape), tensor.dtype) != (form.shape, dtype) or memory(tensor) in given:
            tensors[name] = blank(tensor, form.shape, dtype)
            put(twin.model, tensor, tensors[name])
            moved.add(id(tensors[name]))
    sums = {}
    for name, tensor in tensors.items():
        write(name, tensor, [(site, forms[site], sites[site].torch_dtype) for site in source[name]])
        sums[name] = checksum(tensor)
    set_sizes(twin, moved)
    read_back(twin.model, tensors, tied, sums)
    for module in twin.model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN needs all weights in one block of memory
    return twin.model


def replacements(
    model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], aliases: Mapping[str, str]
) -> list[tuple[str, Tensor, Tensor]]:
    """(site, tensor of the model, empty tensor for the site's form) for each tensor that still has a site."""
    tensors, tied = held(model)
    also: dict[str, list[str]] = {}
    for alias, name in tied.items():
        also.setdefault(name, []).append(alias)
    known = names_of(forms, aliases)
    found = []
    for name, tensor in tensors.items():
        site = next((known[n] for n in (name, *also.get(name, ())) if n in known), None)
        if site is not None:
            found.append((site, tensor, blank(tensor, forms[site].shape, sites[site].torch_dtype)))
    return found


def check_given(name: str, tensor: Tensor, site: Site) -> None:
    """Refuse a tensor of the given model whose shape or kind of dtype is not that of its site."""
    mine, theirs = (tensor.dtype, site.torch_dtype)
    same_kind = (mine.is_floating_point, mine.is_complex) == (theirs.is_floating_point, theirs.is_complex)
    if not site.origin and (site.shape != tuple(tensor.shape) or not same_kind):
        of = ("", "") if same_kind else (f" of {mine}", f" of {theirs}")
        raise SiteError(
            f"{name}: the model has shape {list(tensor.shape)}{of[0]}, the form {list(site.shape)}{of[1]}. "
            f"Give the model that was compressed (same class, same settings)."
        )


def names_of(forms: Mapping[str, Form], aliases: Mapping[str, str]) -> dict[str, str]:
    """Every name of a form, aliases included -> the name of its site."""
    return {name: name for name in forms} | {alias: site for alias, site in aliases.items() if site in forms}


def sources(
    own: Iterable[str], tied: Mapping[str, str], forms: Mapping[str, Form], aliases: Mapping[str, str]
) -> dict[str, list[str]]:
    """For each tensor of the model the names of its forms. Any name of the tensor counts: a checkpoint may
    hold one or all of several tied tensors without recording the tie; then their values must agree."""
    own = list(own)
    known = {name: name for name in own} | dict(tied)
    origin: dict[str, list[str]] = {name: [] for name in own}
    for name, site in names_of(forms, aliases).items():
        if name in known and site not in origin[known[name]]:
            origin[known[name]].append(site)
    used = {site for names in origin.values() for site in names}
    missing, extra = [name for name in sorted(own) if not origin[name]], sorted(forms.keys() - used)
    if missing or extra:
        name = (missing or extra)[0]
        text = "has {0}, which the forms lack" if missing else "lacks {0}, which the forms have"
        raise SiteError(f"the model {text.format(name)}; {did_you_mean(name, extra or own)}")
    return origin


def write(name: str, tensor: Tensor, forms: Sequence[tuple[str, Form, torch.dtype]]) -> None:
    """Write the decoded value into a tensor. Several forms must decode to the same value."""
    (first, form, dtype), *others = forms
    value = form.decode().to(dtype)
    if value.shape != tensor.shape:
        raise RefusedError(
            f"{first}: a form of shape {list(form.shape)} decodes to {list(value.shape)}; nothing was written"
        )
    for other, its, dtype in others:
        if not same(value, its.decode().to(dtype)):
            raise SiteError(
                f"the model ties {first} and {other}, but their forms differ: {name} cannot be both. "
                f"Give a model that does not tie them."
            )
    stored = {memory(array) for _, node in form.walk() for array in node.arrays().values()}
    fits = (value.dtype, value.device, value.stride()) == (tensor.dtype, tensor.device, tensor.stride())
    if fits and memory(value) not in stored and value.untyped_storage().nbytes() == value.nbytes:
        tensor.data = value.detach()  # nothing else holds this memory, so a copy is not needed
        return
    with torch.no_grad():
        tensor.copy_(value)


def set_sizes(twin: ChangedCopy, moved: set[int]) -> None:
    """Set the integers of stock layers that follow from the shapes of their tensors, if those have changed.
    RefusedError if a Set gave one another value."""
    modules = list(twin.model.named_modules())
    asked: dict[int, set[str]] = {}
    for path, keys in twin.asked.items():
        asked.setdefault(id(module_at(twin.model, path)), set()).update(keys)
    for path, module in modules:
        wanted = asked.get(id(module), set())
        inside = (*module.parameters(), *module.buffers())
        if not wanted and not any(id(tensor) in moved for tensor in inside):
            continue
        names = {key.split(".")[0] for key in wanted}
        for key, value in sizes_of(path, module, frozenset(names)).items():
            now = getattr(module, key)
            if now == value:
                continue
            if key in names:
                raise RefusedError(
                    f"{path}.{key} was set to {now}, but the shapes of its tensors imply {value}. Cut the "
                    f"tensors and set the integer together."
                )
            setattr(module, key, value)


def read_back(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], sums: Mapping[str, int]
) -> None:
    """Refuse a module whose state dict differs from the written tensors."""
    state = model.state_dict()
    for name in (*tensors, *tied):
        site = tied.get(name, name)
        wrote, has = tensors[site], state.get(name)
        if has is None or not same(has, wrote) or checksum(wrote) != sums[site]:
            why = "is missing from its state dict" if has is None else "is changed in its state dict"
            raise RefusedError(
                f"{name}: the written value {why}. The module, or a hook on its state dict, computes this "
                f"tensor on access, so the stored value would not be the one that runs."
            )
    if extra := sorted(state.keys() - {*tensors, *tied}):
        raise RefusedError(f"{extra[0]}: it is in the second state dict of the module, but not in the first")
