"""Unlisted: what training moves in a module and no state dict lists, seen before the training is spent.

Buffers that are not persistent, tensors and numbers that are plain attributes: forms and files hold none of
them, and a training that goes on after a kill begins them anew. Tables that follow from settings and what a
forward merely leaves behind are fine: a module is refused where its answers depend on what has moved.
Not seen: what only a backward pass or a later batch moves, and what an object of another kind holds.
Cost: a forward pass on the first batch and a copy of what is trained; where something has moved, six more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.model.answers import tensors_of
from tersor.model.batches import device_of, move, seeded, steady
from tersor.model.counters import unmoved
from tersor.model.state_dicts import registered, same
from tersor.model.task import MISFIT, Task
from tersor.model.trainable import TrainableForms

DEEP = 3  # lists in lists: further down nothing is looked for
INNER = frozenset(vars(nn.Module()))  # what every module has


def check_unlisted(tuned: TrainableForms, task: Task) -> None:
    """Refuse a module whose answers depend on what training would move and a state dict does not list."""
    loader = task.batches("train")
    with steady(loader), unmoved(loader):
        batch = move(next(iter(loader), None), device_of(tuned))

    def answers(net: TrainableForms) -> list[Tensor] | None:
        with seeded(0), torch.enable_grad():
            try:
                return [answer.detach() for answer in tensors_of(task.run(net, batch))]
            except MISFIT:
                return None  # a batch that does not fit: the training says so better

    def worn() -> TrainableForms:
        """As a batch leaves it, but for what a state dict lists."""
        net = copy.deepcopy(tuned).train()
        answers(net)
        net.load_state_dict(tuned.state_dict())
        return net

    names = changed(tuned.net, worn().net)
    for training in (False, True) if names else ():
        fresh, after = answers(copy.deepcopy(tuned).train(training)), answers(worn().train(training))
        if fresh is None or after is None:
            return
        if len(fresh) != len(after) or not all(map(same, fresh, after)):
            refuse(names)


def refuse(names: list[str]) -> None:
    more = f" (and {len(names) - 1} more: {', '.join(names[1:4])})" if len(names) > 1 else ""
    raise RefusedError(
        f"{names[0]}{more}: a forward in training changes it and answers depend on it, but the state dict "
        f"does not list it: no file would hold it, nor a run that goes on after a kill. Make it a persistent "
        f"buffer, register_buffer({names[0].rpartition('.')[2]!r}, tensor), or freeze it in training"
    )


def changed(before: nn.Module, after: nn.Module) -> list[str]:
    """What is another value in a copy, by name; buffers first."""
    old = dict(unlisted(before))
    return [name for name, value in unlisted(after) if name not in old or not alike(old[name], value)]


def unlisted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of buffers that are not persistent, then of tensors, arrays and numbers in attributes."""
    own = {id(tensor) for _, _, _, tensor in registered(model)}
    modules = [(f"{path}." if path else "", module) for path, module in model.named_modules()]
    for path, module in modules:
        for name in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(name) is not None:
                yield f"{path}{name}", module._buffers[name]
    for path, module in modules:
        for name, value in vars(module).items():
            if name not in INNER:
                for inside, one in leaves(value, f"{path}{name}"):
                    if id(one) not in own:
                        yield inside, one


def leaves(value: Any, name: str, deep: int = 0) -> Iterator[tuple[str, Any]]:
    """The tensors, arrays and numbers in a value."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield name, value.detach()
    elif isinstance(value, (bool, int, float, complex, np.ndarray, np.generic)):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and deep < DEEP:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}[{key!r}]", deep + 1)


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same(a, b)
    return type(a) is type(b) and np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind in "fc")
