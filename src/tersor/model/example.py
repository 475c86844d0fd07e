"""Example: inputs to trace, export and time a model with, from its task."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.errors import TaskError
from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.decoder import with_decoder
from tersor.model.task import Task

FEW = 8  # batches whose sizes are compared


def sizes_that_vary(task: Task) -> dict[int, list[int]]:
    """The sizes of inputs along axes from 1 on that differ in the first batches, by axis: {1: [38, 41, 42]}.
    Nothing of a task with `feed`, whose inputs only a call shows."""
    seen: dict[int, set[int]] = {}
    for word in ("calibrate", "evaluate") if task.feed is None and task.example is None else ():
        if getattr(task, word) is None:
            continue
        with steady(getattr(task, word)):
            for batch in itertools.islice(task.batches(word), FEW):
                args, kwargs = task.inputs(batch)
                some = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                for axis in range(1, max((x.ndim for x in some), default=0)):
                    first = next(x for x in some if x.ndim > axis)
                    seen.setdefault(axis, set()).add(first.shape[axis])
    return {axis: sorted(sizes) for axis, sizes in seen.items() if len(sizes) > 1}


def example_inputs(task: Task, model: nn.Module | None = None) -> tuple | dict[str, Any]:
    """Inputs to trace or export a model with: a tuple in order, or a dict by name.

    The task's `example` if it has one, else the inputs of the first calibration (or evaluation) batch. With
    `model`, decoder inputs that it computes from labels are added. A task with `feed` needs `model`, because
    only a call shows its inputs; TaskError without it.
    """
    if task.example is not None:
        given = task.example
        if isinstance(given, Mapping):
            return dict(given)
        return tuple(given) if isinstance(given, (tuple, list)) else (given,)
    with steady(getattr(task, task.shown)):
        batch = next(iter(task.batches(task.shown)))
    if task.feed is None:
        args, kwargs = task.inputs(batch)
        if kwargs and model is not None:
            moved = move(batch, device_of(model))
            return with_decoder(model, kwargs, lambda: task.answer(model, moved))
        return kwargs or args
    if model is None:
        raise TaskError(f"task {task.name!r}: it has its own feed=; give example=(input, ...) for export.")
    seen: list[tuple[tuple, dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        with evaluating(model):
            task.answer(model, move(batch, device_of(model)))
    finally:
        hook.remove()
    if not seen:
        raise TaskError(
            f"task {task.name!r}: feed= did not call the model; give example=(input, ...) for export."
        )
    args, kwargs = seen[0]
    if not kwargs:
        return args
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if args else kwargs
