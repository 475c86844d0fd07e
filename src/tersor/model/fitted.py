"""Fitted: the one place that writes into a copy of a module: tensors of new shapes, integers, other layers.

given module, changes, forms -> a module of its own that holds the decoded forms
The given module's tensors are not copied: its copy is made around empty ones in the forms' shapes, and each
is filled once. Cost: the decoded tensors, and what decoding the largest one takes.
What was written is read back through the module's own state dict, to the bit: a hook that casts, a setter
that computes, a layer that could not be copied come out here and not in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SiteError, did_you_mean
from tersor.forms import Form
from tersor.model.changes import Change
from tersor.model.effective import plain_of
from tersor.model.restructured import Twin, twin_of
from tersor.model.sites import Site
from tersor.model.sizes import sizes_of
from tersor.model.state_dicts import same
from tersor.model.stock import module_at
from tersor.model.tensors import blank, checksum, held, memory, put

NONE: Mapping[str, str] = MappingProxyType({})


def fitted(
    model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], aliases: Mapping[str, str] = NONE,
    changes: Sequence[Change] = (),
) -> nn.Module:  # fmt: skip
    """A copy of `model` with `changes` made, whose tensors are the decoded forms: each in its site's dtype,
    on the device of the tensor that was there.

    `model` is as it was given, before any change; weights that its layers compute are plain in the copy.
    `forms`, `sites` and `aliases` (other names of sites) are as they are now. Model and forms may tie
    different tensors, if the values agree. What is not in the state dict comes along: hooks, modes,
    attributes, other buffers. A buffer on another's memory gets its own.

    Raises SiteError where the model is not the one that the forms were made from, RefusedError where the
    changes do not fit the shapes or the module does not give back what was written.
    """
    model = plain_of(model, names_of(forms, aliases))
    pairs = around(model, forms, sites, aliases)
    given = {memory(old) for _, old, _ in pairs} - {0}
    twin = twin_of(model, changes, {id(old): new for _, old, new in pairs})
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
    settle(twin, moved)
    read_back(twin.model, tensors, tied, sums)
    for module in twin.model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # a GPU wants all weights in one piece of memory
    return twin.model


def around(
    model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], aliases: Mapping[str, str]
) -> list[tuple[str, Tensor, Tensor]]:
    """(site, tensor of the model, an empty one for the site's form) of each tensor that is still there."""
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
    """Refuse a tensor of the given model that its site was not made from."""
    mine, theirs = (tensor.dtype, site.torch_dtype)
    alike = (mine.is_floating_point, mine.is_complex) == (theirs.is_floating_point, theirs.is_complex)
    if not site.origin and (site.shape != tuple(tensor.shape) or not alike):
        of = ("", "") if alike else (f" of {mine}", f" of {theirs}")
        raise SiteError(
            f"{name}: the model has shape {list(tensor.shape)}{of[0]}, the form {list(site.shape)}{of[1]}. "
            f"Give the model that was compressed (same class, same settings)."
        )


def names_of(forms: Mapping[str, Form], aliases: Mapping[str, str]) -> dict[str, str]:
    """Every name of a form -> the name that it goes by."""
    return {name: name for name in forms} | {alias: site for alias, site in aliases.items() if site in forms}


def sources(
    own: Iterable[str], tied: Mapping[str, str], forms: Mapping[str, Form], aliases: Mapping[str, str]
) -> dict[str, list[str]]:
    """For each site of the model the names of its forms. A tensor goes by any of its names: a checkpoint may
    hold one of tied tensors, or both, and know of no tie; then their values have to agree."""
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
        said = "has {0}, which the forms lack" if missing else "lacks {0}, which the forms have"
        raise SiteError(f"the model {said.format(name)}; {did_you_mean(name, extra or own)}")
    return origin


def write(name: str, tensor: Tensor, forms: Sequence[tuple[str, Form, torch.dtype]]) -> None:
    """The decoded value into a tensor; of several forms all are the same."""
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
        tensor.data = value.detach()  # made for this, and for nobody else: a copy would be its only use
        return
    with torch.no_grad():
        tensor.copy_(value)


def settle(twin: Twin, moved: set[int]) -> None:
    """The integers of stock layers that the shapes of their tensors say, where those have changed; what was
    set has to agree."""
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
                    f"{path}.{key} was set to {now}, but the shapes of its tensors say {value}. Cut the "
                    f"tensors and set the integer together."
                )
            setattr(module, key, value)


def read_back(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], sums: Mapping[str, int]
) -> None:
    """Refuse a module whose state dict is not what was written."""
    state = model.state_dict()
    for name in (*tensors, *tied):
        site = tied.get(name, name)
        wrote, has = tensors[site], state.get(name)
        if has is None or not same(has, wrote) or checksum(wrote) != sums[site]:
            why = "is not in its state dict" if has is None else "comes back changed"
            raise RefusedError(
                f"{name}: what was written {why}. The module, or a hook on its state dict, computes this "
                f"tensor when it is asked for: what is stored would not be what runs."
            )
    if extra := sorted(state.keys() - {*tensors, *tied}):
        raise RefusedError(f"{extra[0]}: the state dict has it only the second time it is asked for")
