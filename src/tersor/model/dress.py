"""Dress: put forms into a model. The one place that writes to an nn.Module, and only to a copy.

plain      decoded weights in the model's own layers: runs, trains and exports anywhere
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import SiteError, did_you_mean
from tersor.forms import Form
from tersor.forms.form import as_bytes
from tersor.model.sites import Site, sites_of

NONE: Mapping[str, str] = MappingProxyType({})


def dress(
    model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site], aliases: Mapping[str, str] = NONE
) -> nn.Module:
    """A copy of `model` whose tensors are the decoded forms, each in its site's dtype and on its tensor's
    device. `aliases`: other names of sites; model and forms may tie different tensors, if the values agree.

    Raises SiteError where the model is not the one that the forms were made from.
    """
    dressed = copy.deepcopy(model)
    fill(dressed, {name: form.decode() for name, form in forms.items()}, sites, aliases)
    return dressed


def fill(
    model: nn.Module,
    values: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    aliases: Mapping[str, str] = NONE,
) -> None:
    """Write tensors by site name into the model itself; every one of its sites must be given, with its
    shape."""
    own, tensors, tied = sites_of(model)
    values = {name: value.to(sites[name].torch_dtype) for name, value in values.items()}
    source = sources(own, tied, values, aliases)
    for name, tensor in tensors.items():
        shape = tuple(values[source[name]].shape)
        if shape != tuple(tensor.shape):
            raise SiteError(
                f"{name}: the model has shape {list(tensor.shape)}, the form {list(shape)}. "
                f"Give the model that was compressed (same class, same settings)."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[source[name]])


def sources(
    own: Mapping[str, Site], tied: Mapping[str, str], values: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, str]:
    """For each site of the model the name of its value. A tensor goes by any of its names: a checkpoint may
    hold one of tied tensors, or both, and know of no tie."""
    held = {name: name for name in values} | {a: site for a, site in aliases.items() if site in values}
    known = {name: name for name in own} | dict(tied)
    found: dict[str, list[str]] = {name: [] for name in own}
    for name, site in held.items():
        if name in known and site not in found[known[name]]:
            found[known[name]].append(site)
    used = {site for sites in found.values() for site in sites}
    missing, extra = [name for name in sorted(own) if not found[name]], sorted(values.keys() - used)
    if missing or extra:
        name = (missing or extra)[0]
        said = "has {0}, which the forms lack" if missing else "lacks {0}, which the forms have"
        raise SiteError(f"the model {said.format(name)}; {did_you_mean(name, extra or own)}")
    for name, (first, *others) in found.items():
        for other in others:
            if not same(values[first], values[other]):
                raise SiteError(
                    f"the model ties {first} and {other}, but their forms differ: {name} cannot be both. "
                    f"Give a model that does not tie them."
                )
    return {name: names[0] for name, names in found.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    alike = a.dtype is b.dtype and a.shape == b.shape
    return alike and np.array_equal(as_bytes(a), as_bytes(b))
