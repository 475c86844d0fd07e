"""Outputs: a model's output: a tensor, or tensors in tuples, lists, mappings and other containers.

Hugging Face's ModelOutput is a mapping; torchvision's detectors return a dict of losses in training and a
list of dicts in evaluation. Nothing here knows what the tensors mean: logits.py does.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEAVES = (Tensor, bool, int, float, str, type(None))  # types that torch.export takes in an output


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in a nested output; a complex one as [..., 2]."""
    if isinstance(output, Tensor):
        yield torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
        return
    for part in parts_of(output).values():
        yield from tensors_of(part)


def parts_of(output: Any) -> dict[Any, Any]:
    """The items of a container, by key; empty if this is not a container."""
    if isinstance(output, Mapping):
        return dict(output.items())
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {item.name: getattr(output, item.name) for item in dataclasses.fields(output)}
    return dict(vars(output)) if isinstance(output, types.SimpleNamespace) else {}


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the output with `change` applied to each of its tensors, in containers of the same types."""
    if isinstance(output, Tensor):
        return change(output)
    parts = parts_of(output)
    new = {key: changed(part, change) for key, part in parts.items()}
    if all(new[key] is part for key, part in parts.items()):
        return output
    if isinstance(output, tuple):
        named = hasattr(output, "_fields")
        return type(output)(*new.values()) if named else tuple(new.values())
    if isinstance(output, list):
        return list(new.values())
    if type(output) is dict:
        return new
    other = copy.copy(output)  # a ModelOutput keeps its type, so that it still has `.logits`
    for key, part in new.items():
        if part is not parts[key]:
            put(other, key, part)
    return other


def put(output: Any, key: Any, part: Any) -> None:
    """Set one item of a mapping, or one attribute of another container."""
    if isinstance(output, Mapping) and hasattr(output, "__setitem__"):
        output[key] = part
    else:
        object.__setattr__(output, key, part)


def exportable(output: Any) -> tuple[Any, dict[str, str]]:
    """(the output without objects that torch.export cannot take, such as caches; their names -> types)."""
    left: dict[str, str] = {}
    plain = all(isinstance(leaf, LEAVES) for leaf in tree_leaves(output))
    return output if plain else bare(output, "", left), left


def bare(output: Any, name: str, left: dict[str, str]) -> Any:
    """An output in plain dicts and tuples. Items that are neither container nor in LEAVES go to `left`."""
    if isinstance(output, LEAVES):
        return output
    new = {}
    for key, item in parts_of(output).items():
        path = f"{name}.{key}".lstrip(".")
        if isinstance(item, (*LEAVES, Mapping, tuple, list)) or parts_of(item):
            new[key] = bare(item, path, left)
        else:
            left[path] = type(item).__name__
    return tuple(new.values()) if isinstance(output, (tuple, list)) else new


def as_floats(output: Any) -> Any:
    """The output with its 16-bit floating tensors, as autocast makes them, in float32."""
    short = (torch.bfloat16, torch.float16)
    return changed(output, lambda tensor: tensor.float() if tensor.dtype in short else tensor)


def part(output: Any, name: str) -> Any:
    """An item of an output by its name, a key or an attribute; None if there is none."""
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, Tensor) else getattr(output, name, None)


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model computes itself from labels, as Hugging Face's do: `.loss`, a scalar; or None."""
    loss = part(output, "loss")
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None
