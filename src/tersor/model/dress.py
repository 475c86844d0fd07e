"""Dress: put forms into a model. The one place that writes to an nn.Module, and only to a copy.

plain      decoded weights in the model's own layers: runs, trains and exports anywhere
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.errors import SiteError, did_you_mean
from tersor.forms import Form
from tersor.model.sites import Site, sites_of


def dress(model: nn.Module, forms: Mapping[str, Form], sites: Mapping[str, Site]) -> nn.Module:
    """A copy of `model` whose tensors are the decoded forms, each in its site's dtype and on its tensor's
    device.

    Raises SiteError where the model is not the one that the forms were made from.
    """
    dressed = copy.deepcopy(model)
    fill(dressed, {name: form.decode() for name, form in forms.items()}, sites)
    return dressed


def fill(model: nn.Module, values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
    """Write tensors by site name into the model itself; every one of its sites must be given, with its
    shape."""
    own, tensors, _ = sites_of(model)
    missing, extra = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
    if missing or extra:
        name = (missing or extra)[0]
        said = "has {0}, which the forms lack" if missing else "lacks {0}, which the forms have"
        raise SiteError(f"the model {said.format(name)}; {did_you_mean(name, extra or own)}")
    for name, tensor in tensors.items():
        if tuple(values[name].shape) != tuple(tensor.shape):
            raise SiteError(
                f"{name}: the model has shape {list(tensor.shape)}, the form {list(values[name].shape)}. "
                f"Give the model that was compressed (same class, same settings)."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name].to(sites[name].torch_dtype))
