"""Outputs: what a model answers, whatever it is: a tensor, or tensors in tuples, lists, mappings and others.

Hugging Face's ModelOutput is a mapping; torchvision's detectors answer with a dict of losses in training and
a list of dicts in evaluation. Nothing here knows what the tensors mean: logits.py does.
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

LEAVES = (Tensor, bool, int, float, str, type(None))  # what torch.export takes in an output


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in an output, however it is nested; complex ones as pairs."""
    if isinstance(output, Tensor):
        yield torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
        return
    for part in parts_of(output).values():
        yield from tensors_of(part)


def parts_of(output: Any) -> dict[Any, Any]:
    """What a container holds, by key; nothing of what is none."""
    if isinstance(output, Mapping):
        return dict(output.items())
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {item.name: getattr(output, item.name) for item in dataclasses.fields(output)}
    return dict(vars(output)) if isinstance(output, types.SimpleNamespace) else {}


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with each of its tensors changed, in containers of the same kind; the given one stays."""
    if isinstance(output, Tensor):
        return change(output)
    parts = parts_of(output)
    made = {key: changed(part, change) for key, part in parts.items()}
    if all(made[key] is part for key, part in parts.items()):
        return output
    if isinstance(output, tuple):
        named = hasattr(output, "_fields")
        return type(output)(*made.values()) if named else tuple(made.values())
    if isinstance(output, list):
        return list(made.values())
    if type(output) is dict:
        return made
    other = copy.copy(output)  # a ModelOutput keeps its type, so that `.logits` is still there
    for key, part in made.items():
        if part is not parts[key]:
            put(other, key, part)
    return other


def put(output: Any, key: Any, part: Any) -> None:
    """One part of a container that is a mapping, or has it as an attribute."""
    if isinstance(output, Mapping) and hasattr(output, "__setitem__"):
        output[key] = part
    else:
        object.__setattr__(output, key, part)


def exportable(output: Any) -> tuple[Any, dict[str, str]]:
    """The output without what torch.export has no type for, such as caches; and those, name -> type."""
    left: dict[str, str] = {}
    plain = all(isinstance(leaf, LEAVES) for leaf in tree_leaves(output))
    return output if plain else bare(output, "", left), left


def bare(output: Any, name: str, left: dict[str, str]) -> Any:
    """An output in plain dicts and tuples; what is neither container nor number goes to `left`."""
    if isinstance(output, LEAVES):
        return output
    made = {}
    for key, item in parts_of(output).items():
        there = f"{name}.{key}".lstrip(".")
        if isinstance(item, (*LEAVES, Mapping, tuple, list)) or parts_of(item):
            made[key] = bare(item, there, left)
        else:
            left[there] = type(item).__name__
    return tuple(made.values()) if isinstance(output, (tuple, list)) else made


def as_floats(output: Any) -> Any:
    """The output with its floating tensors in float32 where they were in 16 bits, as autocast makes them."""
    short = (torch.bfloat16, torch.float16)
    return changed(output, lambda tensor: tensor.float() if tensor.dtype in short else tensor)


def part(output: Any, name: str) -> Any:
    """A part by its name, an attribute or a key; None where there is none."""
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, Tensor) else getattr(output, name, None)


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model computes itself from labels, as Hugging Face's do: `.loss`, one number."""
    loss = part(output, "loss")
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None
