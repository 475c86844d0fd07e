"""Parametrizations: plain parameters in place of weights that a layer computes from other tensors.

torch.nn.utils.parametrize (weight_norm, spectral_norm, orthogonal, custom ones), the older weight_norm and
spectral_norm, and torch.nn.utils.prune. Compression must act on the weight that runs: a direction of
weight_norm with a row pruned to zero gives 0 / 0, and a coarse grid on it changes the whole row.
A pruned weight keeps its mask. Later training no longer has the constraint, such as a
spectral norm of 1.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from tersor.errors import RefusedError
from tersor.model.batches import evaluating
from tersor.model.changed_copy import own_copy

Work = tuple[str, nn.Module, str, str]  # (path of a layer, the layer, its weight's name, what computes it)


def computed(model: nn.Module) -> list[Work]:
    """The weights that layers compute from others."""
    found: list[Work] = []
    pruned: list[Work] = []  # first: another entry may compute a weight from a pruned one
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                found.append(
                    (path, module, name, " and ".join(type(part).__name__.lstrip("_") for part in chain))
                )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                found.append((path, module, hook.name, type(hook).__name__))
            elif isinstance(hook, prune.BasePruningMethod):
                pruned.append((path, module, hook._tensor_name, "prune"))
    return pruned + found


def materialized(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make computed weights plain parameters of `model`, which must be a private copy. Returns (masks of
    pruned weights, what computed each weight), by name. RefusedError for shared or random ones."""
    masks: dict[str, Tensor] = {}
    computed_by: dict[str, str] = {}
    work = computed(model)
    held = holders(model) if work else {}
    for path, module, name, what in work:
        full = f"{path}.{name}" if path else name
        made_of = sources(module, name, what)
        trained, frozen = trained_sources(module, name, made_of)
        for source in made_of:
            if held[id(source)] > 1:
                raise RefusedError(
                    f"{full}: {what} computes it from a tensor that another layer uses too, so it cannot "
                    f"become a separate weight. Untie the layers first, or remove {what} from both"
                )
        with evaluating(module):  # in training, each access runs another step of the spectral norm
            if not torch.equal(getattr(module, name), getattr(module, name)):
                raise RefusedError(
                    f"{full}: {what} computes a different weight each time, so there is no single weight to "
                    f"compress. Give a model whose weights are not random in eval mode"
                )
            if what == "prune":
                mask = getattr(module, f"{name}_mask")
                masks[full] = mask.detach().to(torch.bool).clone()
                prune.remove(module, name)
            elif what == "WeightNorm" and not parametrize.is_parametrized(module, name):
                remove_weight_norm(module, name)
            elif what == "SpectralNorm" and not parametrize.is_parametrized(module, name):
                remove_spectral_norm(module, name)
                drop_load_hook(module, name)
            else:
                own_class(module)
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        as_parameter(module, name, made_of, trained)
        half = "a part was frozen, now all of it is trained" if trained and frozen else ""
        computed_by[full] = ", ".join(filter(None, (computed_by.get(full), what, half)))
    return masks, computed_by


def plain_of(model: nn.Module, names: Container[str]) -> nn.Module:
    """The model itself, or a copy with plain weights if its layers compute weights of these names."""
    if not any((f"{path}.{name}" if path else name) in names for path, _, name, _ in computed(model)):
        return model
    copy = own_copy(model)
    materialized(copy)
    return copy


def trained_sources(module: nn.Module, name: str, made_of: list[Tensor]) -> tuple[bool, bool]:
    """(whether any parameter that the weight is computed from is trained, whether any is not). Parameters of
    a parametrization, such as an adapter, count too."""
    if parametrize.is_parametrized(module, name):
        made_of = list(module.parametrizations[name].parameters())  # type: ignore[index,union-attr]
    grads = [source.requires_grad for source in made_of if isinstance(source, nn.Parameter)]
    return any(grads), not all(grads)


def sources(module: nn.Module, name: str, what: str) -> list[Tensor]:
    """The tensors that a weight is computed from."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters(recurse=False))  # type: ignore[index,union-attr]
    names = {"prune": ("orig", "mask"), "WeightNorm": ("g", "v"), "SpectralNorm": ("orig", "u")}[what]
    return [tensor for end in names if isinstance(tensor := getattr(module, f"{name}_{end}", None), Tensor)]


def drop_load_hook(module: nn.Module, name: str) -> None:
    """Take away what remove_spectral_norm leaves: a hook that asks state dicts for `weight_orig`."""
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for key, wrapped in [*hooks.items()]:
        hook = getattr(wrapped, "hook", wrapped)
        if isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn.name == name:
            del hooks[key]


def own_class(module: nn.Module) -> None:
    """Give a parametrized layer a class of its own. PyTorch makes one class per parametrized layer, which
    copies share: removing the parametrization of one copy deletes the property from all."""
    cls = type(module)
    rest = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, rest)


def as_parameter(module: nn.Module, name: str, made_of: list[Tensor], trained: bool) -> None:
    """Make a weight that was computed from parameters a parameter, trained if they were."""
    parameters = [source for source in made_of if isinstance(source, nn.Parameter)]
    value = module._buffers.get(name)
    if value is not None and parameters:
        del module._buffers[name]
        module.register_parameter(name, nn.Parameter(value))
    weight = module._parameters.get(name)
    if weight is not None:
        weight.requires_grad_(trained)


def holders(model: nn.Module) -> dict[int, int]:
    """How many layers hold each tensor."""
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found[id(tensor)] = found.get(id(tensor), 0) + 1
    return found
