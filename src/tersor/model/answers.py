"""Answers: what a model says to a few calibration batches, in float64 where it runs in it; how far apart the
answers of two models are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tersor.model.batches import device_of, evaluating, move, steady
from tersor.model.task import Task

BATCHES = 2


def outputs(model: nn.Module, task: Task, wide: bool) -> Iterator[Tensor]:
    """The floats among the answers to a few calibration batches (evaluation batches where there are none)."""
    model, change = (model.double(), doubled) if wide else (model, lambda x: x)
    word = "evaluate" if task.calibrate is None else "calibrate"
    with evaluating(model), steady(getattr(task, word)):
        for batch in islice(task.batches(word), BATCHES):
            yield from tensors_of(task.run(model, each(move(batch, device_of(model)), change)))


def doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def each(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with every tensor changed; what is nested keeps its type where `move` keeps it."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: each(item, change) for key, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [each(item, change) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of floats in an output, however it is nested."""
    if isinstance(output, Tensor):
        yield from [output] if output.is_floating_point() else []
        return
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    else:
        parts = []
    for part in parts:
        yield from tensors_of(part)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(
        (float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()),
        default=0.0,
    )


def zero(model: nn.Module, tensor: str, axis: int, places: list[int]) -> None:
    """Zeros at these places of an axis of one of the model's tensors."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        tensors[tensor].index_fill_(axis, torch.tensor(places, dtype=torch.int64), 0)


def once(task: Task, model: nn.Module) -> Any:
    """The model run once, on what it is trained with."""
    with steady(task.train):
        return task.run(model, move(next(iter(task.batches("train"))), device_of(model)))
