"""Versions: the version numbers of modules, which decide how some of them load their tensors.

PyTorch keeps them in the attribute `_metadata` of a state dict. Most modules have version 1, normalizations
with running statistics 2, and read tensors without a version alike. torchvision's MNASNet does not: it
refuses tensors without one, and rescales its first layers if it is 1. A file states only unusual versions.
Some classes have a text in place of the number: transformers' Phi-3 has "0.0.5".
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

VERSIONS = ".tersor/versions.json"  # the attachment that states them
NORMS = "running_mean"
LONGEST = 64  # characters of a version that is a text

Version = int | str


def is_version(value: object) -> TypeGuard[Version]:
    """Whether a file can state it. PyTorch lets a class have anything as its version."""
    if isinstance(value, str):
        return type(value) is str and len(value) <= LONGEST
    return type(value) is int and 0 <= value < 1 << 31


def versions_of(model: nn.Module) -> dict[str, Any]:
    """The version of each module, by name."""
    return {name: module._version for name, module in model.named_modules(remove_duplicate=False)}


def usual(name: str, tensors: Collection[str]) -> int:
    """The version of most modules that hold these tensors."""
    return 2 if (f"{name}.{NORMS}" if name else NORMS) in tensors else 1


def unusual(versions: Mapping[str, Version], tensors: Collection[str]) -> dict[str, Version]:
    """The versions that a file has to state. `tensors`: names, in a container that is fast to search."""
    return {name: version for name, version in versions.items() if version != usual(name, tensors)}


def unusual_of(model: nn.Module, tensors: Collection[str]) -> dict[str, Version]:
    """The same of a model. PyTorch's own layers read tensors without a version as those of their own one."""
    own = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if not type(module).__module__.startswith("torch.nn.")
    }
    found = {name: version for name, version in versions_of(model).items() if name in own}
    return unusual({name: version for name, version in found.items() if is_version(version)}, tensors)


def with_versions(
    tensors: Mapping[str, Tensor], model: nn.Module | None, attached: Mapping[str, bytes]
) -> dict[str, Tensor]:
    """A state dict of these tensors that states the versions: those of the model, else those that a file
    states. Without either it states none, as a plain dict."""
    found: OrderedDict[str, Tensor] = OrderedDict(tensors)
    if model is not None:
        versions = versions_of(model)
    elif VERSIONS in attached:
        stated: dict[str, Version] = json.loads(attached[VERSIONS])
        versions = {name: usual(name, found) for name in above(found)} | stated
    else:
        return found
    found._metadata = {name: {"version": version} for name, version in versions.items()}  # type: ignore[attr-defined]
    return found


def above(names: Iterable[str]) -> set[str]:
    """The names of all modules that tensors of these names are in."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    return found
