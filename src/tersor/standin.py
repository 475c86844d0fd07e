"""Stand-in: a small model for dry runs, with names that a recipe's globs match, or those of a real model.

Without a model, it is unknown which sites match two globs. The stand-in has the usual names, and one name
for each glob in the recipe: "blocks.*" gives "blocks.0.weight", "*.bias" gives "x.bias".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tersor.core.recipe import Recipe
from tersor.core.state import State, start
from tersor.model.features import pairs_of
from tersor.model.given_masks import NONE
from tersor.settings import settings_of

LONGEST = 64  # elements along an axis: enough for a coder to shorten the tensor
# Tensors like those of most models.
USUAL = {"conv.weight": (16, 8, 3, 3), "fc.weight": (64, 64), "fc.bias": (64,), "norm.weight": (64,)}


class Named(nn.Module):
    """A module with tensors under dotted names, and with empty layers under others."""

    def __init__(
        self, tensors: Mapping[str, Tensor], buffers: Iterable[str] = (), layers: Iterable[str] = ()
    ):
        super().__init__()
        for name in layers:
            self.at(name)
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            owner = self.at(path)
            if name in buffers:
                owner.register_buffer(last, tensor)
            else:
                owner.register_parameter(last, nn.Parameter(tensor, tensor.is_floating_point()))

    def at(self, path: str) -> nn.Module:
        """The module of this name, which is made if it is missing."""
        module: nn.Module = self
        for word in filter(None, path.split(".")):
            if word not in module._modules:
                module.add_module(word, nn.Module())
            module = module.get_submodule(word)
        return module


def stand_in(recipe: Recipe) -> State:
    """A model with a name for every glob and every layer name in the recipe."""
    shapes = dict(USUAL)
    kept = [recipe.zeros_of(number) for number, _ in enumerate(recipe.steps)]
    for where in (*(step.where for step in recipe.steps), *(glob for glob in kept if glob != NONE)):
        for pattern in globs(where):
            name = example(pattern)
            if not any(clash(name, other) for other in shapes):
                shapes[name] = (LONGEST,) if name.endswith("bias") else (LONGEST, LONGEST)
    words = [settings_of(step).get("features", "") for step in recipe.steps]
    layers = [name for word in words for pair in pairs_of(word) for name in pair]
    layers = [layer for layer in layers if not any(f"{layer}.".startswith(f"{name}.") for name in shapes)]
    random = torch.Generator().manual_seed(0)
    return start(Named({n: torch.randn(s, generator=random) for n, s in shapes.items()}, layers=layers))


def stand_in_for(given: State) -> State:
    """A model with the names, kinds and dtypes of `given`, and axes of at most LONGEST elements."""
    random = torch.Generator().manual_seed(0)
    sites = {
        name: dataclasses.replace(site, shape=tuple(min(length, LONGEST) for length in given.shape(name)))
        for name, site in given.sites.items()
    }
    # Not every dtype has negative numbers, and the values of dtypes that no step works on do not matter.
    tensors = {
        name: torch.randn(site.shape, generator=random).to(site.torch_dtype)
        if site.floating
        else torch.zeros(site.shape).to(site.torch_dtype)
        for name, site in sites.items()
    }
    buffers = {name for name, site in sites.items() if not site.is_parameter}
    layers = [] if given.given is None else [name for name, _ in given.given.named_modules()]
    return dataclasses.replace(start(Named(tensors, buffers, layers)), sites=sites)


def globs(where: str | Iterable[str]) -> list[str]:
    words = where.split(",") if isinstance(where, str) else list(where)
    return [word.strip().removeprefix("!") for word in words]


def example(glob: str) -> str:
    """A name that the glob matches."""
    name = re.sub(r"\.\*$", ".0.weight", glob)
    name = re.sub(r"\*$", ".weight", name) if name.strip("*") else USUAL_NAME
    name = re.sub(r"\[!?(.)[^]]*\]", r"\1", name)
    return re.sub(r"[*?]", "x", name)


def clash(name: str, other: str) -> bool:
    """Whether two names are equal or cannot both be in one model."""
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


USUAL_NAME = next(iter(USUAL))
