"""Dynamic: which sizes of a file's inputs may vary, and inputs of other sizes to try it with.

batch     axis 0 of the first tensor, and of all others that have the same size there
axes      further ones, of the first tensor that has them, and of all others with that size there
A size that the model's code fixes shows only when another one is run, so every file is run with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.errors import RefusedError, SettingError
from tersor.model.batches import MISFIT
from tersor.runtimes.agree import Inputs, outputs, sized, tensors

FACTORS = (
    (2, 1),
    (1, 2),
    (3, 4),
)  # of the example's sizes: the first that the model runs with


def axes_of(text: str, who: str) -> tuple[int, ...]:
    """The axes in a setting: "1" or "2,3". SettingError for other words."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() and 0 < int(word) < 10 for word in words) or len({*words}) < len(words):
        raise SettingError(
            f"{who}: dynamic_axes={text!r}, but it is axes from 1 on with commas between them: 1 for tokens "
            f"[B, T], 2,3 for height and width [B, C, H, W]; the batch is dynamic_batch"
        )
    return tuple(map(int, words))


def sizes_at(inputs: Inputs, axes: Sequence[int]) -> dict[int, int]:
    """The example's size along each axis. SettingError if no input has the axis."""
    found = {}
    for axis in axes:
        first = next((item for item in tensors(inputs) if item.ndim > axis), None)
        if first is None:
            raise SettingError(f"dynamic_axes: no input has an axis {axis}")
        found[axis] = first.shape[axis]
    return found


def dims(inputs: Inputs, dynamic_batch: bool, axes: Sequence[int]) -> Any:
    """For torch.export: the sizes that vary, in the structure of the inputs; None if none does."""
    if not dynamic_batch and not axes:
        return None
    sizes = sizes_at(inputs, axes) | ({0: tensors(inputs)[0].shape[0]} if dynamic_batch else {})
    named = {axis: torch.export.Dim(f"axis_{axis}" if axis else "batch") for axis in sizes}

    def of(item: Any) -> dict[int, Any] | None:
        if not isinstance(item, Tensor):
            return None
        return {a: named[a] for a, size in sizes.items() if item.ndim > a and item.shape[a] == size} or None

    return tree_map(of, inputs)


def variants(model: nn.Module, inputs: Inputs, dynamic_batch: bool, axes: Sequence[int]) -> list[Inputs]:
    """The example, and the same with other sizes where these may vary. RefusedError if the model itself runs
    with no other size along the axes."""
    found = [inputs] + ([sized(inputs, 1)] if dynamic_batch else [])
    if not axes:
        return found
    for factor in FACTORS:
        other = resized(inputs, axes, *factor)
        try:
            outputs(model, other)
        except MISFIT:
            continue
        return [*found, other]
    raise RefusedError(
        f"dynamic_axes: {type(model).__name__} runs with no other size along {', '.join(map(str, axes))}: "
        f"tried were {', '.join(f'{a}/{b}' for a, b in FACTORS)} of the example's. Leave dynamic_axes out."
    )


def resized(inputs: Inputs, axes: Sequence[int], times: int, over: int) -> Inputs:
    """The inputs with times / over of their size along the axes: repeated, or the first part."""
    sizes = sizes_at(inputs, axes)

    def change(item: Any) -> Any:
        for axis, size in sizes.items():
            if isinstance(item, Tensor) and item.ndim > axis and item.shape[axis] == size:
                item = torch.cat([item] * times, axis).narrow(axis, 0, max(1, size * times // over))
        return item

    found: Inputs = tree_map(change, inputs)
    return found
