"""Effective: weights that a layer computes from others become plain ones, as they come out.

torch.nn.utils.parametrize (weight_norm, spectral_norm, orthogonal, one's own), the older weight_norm and
spectral_norm, torch.nn.utils.prune. What is compressed and proved must be what runs: rows of a direction that
is pruned to zero are 0 / 0, and a coarse grid on it moves every other number of the row.
A pruned weight keeps its mask. What a layer did to a weight while training is gone with it.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tersor.errors import RefusedError
from tersor.model.batches import evaluating
from tersor.model.restructured import own_copy

Work = tuple[str, nn.Module, str, str]  # (path of a layer, the layer, its weight's name, what computes it)


def computed(model: nn.Module) -> list[Work]:
    """The weights that layers compute from others."""
    found: list[Work] = []
    pruned: list[Work] = []  # first: another layer of work may compute a weight from what is pruned
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name, made in module.parametrizations.items():
                found.append(
                    (path, module, name, " and ".join(type(one).__name__.lstrip("_") for one in made))
                )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                found.append((path, module, hook.name, type(hook).__name__))
            elif isinstance(hook, prune.BasePruningMethod):
                pruned.append((path, module, hook._tensor_name, "prune"))
    return pruned + found


def settled(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make them plain parameters of `model`, which must be a private copy: (masks of pruned weights, what
    computed each weight), by name."""
    masks: dict[str, Tensor] = {}
    by: dict[str, str] = {}
    work = computed(model)
    held = counted(model) if work else {}
    for path, module, name, what in work:
        full = f"{path}.{name}" if path else name
        made_of = sources(module, name, what)
        trained, still = learned(module, name, made_of)
        for source in made_of:
            if held[id(source)] > 1:
                raise RefusedError(
                    f"{full}: {what} computes it from a tensor that another layer holds too, so it cannot "
                    f"become a weight of its own. Untie them first, or remove {what} from both"
                )
        with evaluating(module):  # a spectral norm takes another step each time it is asked in training
            if not torch.equal(getattr(module, name), getattr(module, name)):
                raise RefusedError(
                    f"{full}: {what} computes another weight each time, so none of them is what runs. Give "
                    f"a model whose weights in eval mode do not go by chance"
                )
            if what == "prune":
                mask = getattr(module, f"{name}_mask")
                masks[full] = mask.detach().to(torch.bool).clone()
                prune.remove(module, name)
            elif what == "WeightNorm" and not parametrize.is_parametrized(module, name):
                remove_weight_norm(module, name)
            elif what == "SpectralNorm" and not parametrize.is_parametrized(module, name):
                remove_spectral_norm(module, name)
            else:
                own_class(module)
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        as_parameter(module, name, made_of, trained)
        half = "a part was frozen, and it learns whole" if trained and still else ""
        by[full] = ", ".join(filter(None, (by.get(full), what, half)))
    return masks, by


def plain_of(model: nn.Module, names: Container[str]) -> nn.Module:
    """The model itself, or where its layers compute weights of these names a copy with plain ones."""
    if not any((f"{path}.{name}" if path else name) in names for path, _, name, _ in computed(model)):
        return model
    copy = own_copy(model)
    settled(copy)
    return copy


def learned(module: nn.Module, name: str, made_of: list[Tensor]) -> tuple[bool, bool]:
    """Whether any parameter that a weight is computed from is trained, and any is not: an adapter's own
    too."""
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


def own_class(module: nn.Module) -> None:
    """A parametrized layer has a class made for it, which its copies share, and which loses a property with
    the parametrization of one of them."""
    cls = type(module)
    rest = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, rest)


def as_parameter(module: nn.Module, name: str, made_of: list[Tensor], trained: bool) -> None:
    """A weight that came of parameters is one, and trained where they were."""
    mine = [source for source in made_of if isinstance(source, nn.Parameter)]
    value = module._buffers.get(name)
    if value is not None and mine:
        del module._buffers[name]
        module.register_parameter(name, nn.Parameter(value))
    made = module._parameters.get(name)
    if made is not None:
        made.requires_grad_(trained)


def counted(model: nn.Module) -> dict[int, int]:
    """How many layers hold each tensor."""
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found[id(tensor)] = found.get(id(tensor), 0) + 1
    return found
