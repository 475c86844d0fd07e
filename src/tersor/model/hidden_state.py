"""Hidden state: refuse, before training, modules with training state that their state dict does not have.

Such state is in non-persistent buffers, and in tensors and numbers in plain attributes: no form or file holds
it, and a resumed training starts with its first values. Tables that are computed from settings are fine, and
so are values that a forward stores but never reads: a module is refused if its outputs depend on the change.
Not found: changes by a backward pass or a later batch only, and values inside objects of other classes.
Cost: a forward pass on the first batch and a copy of the trained model; if something has changed, six more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.model.batches import device_of, move, seeded, steady
from tersor.model.counters import unmoved
from tersor.model.output_comparison import tensors_of
from tersor.model.state_dicts import registered, same
from tersor.model.task import MISFIT, Task
from tersor.model.trainable_forms import TrainableForms

DEEP = 3  # the search stops at this depth of nested lists
INNER = frozenset(vars(nn.Module()))  # attributes that every module has


def check_unlisted(tuned: TrainableForms, task: Task) -> None:
    """RefusedError if the outputs depend on state that training changes and no state dict lists."""
    loader = task.batches("train")
    with steady(loader), unmoved(loader):
        batch = move(next(iter(loader), None), device_of(tuned))

    def answers(net: TrainableForms) -> list[Tensor] | None:
        with seeded(0), torch.enable_grad():
            try:
                return [answer.detach() for answer in tensors_of(task.run(net, batch))]
            except MISFIT:
                return None  # the batch does not fit: the training loop reports it with a better message

    def after_one_batch() -> TrainableForms:
        """A copy after one batch, with the state dict restored: only unlisted state differs."""
        net = copy.deepcopy(tuned).train()
        answers(net)
        net.load_state_dict(tuned.state_dict())
        return net

    names = changed(tuned.net, after_one_batch().net)
    for training in (False, True) if names else ():
        fresh, after = (
            answers(copy.deepcopy(tuned).train(training)),
            answers(after_one_batch().train(training)),
        )
        if fresh is None or after is None:
            return
        if len(fresh) != len(after) or not all(map(same, fresh, after)):
            refuse(names)


def refuse(names: list[str]) -> None:
    more = f" (and {len(names) - 1} more: {', '.join(names[1:4])})" if len(names) > 1 else ""
    raise RefusedError(
        f"{names[0]}{more}: a forward in training changes it and outputs depend on it, but the state dict "
        f"does not list it: no file would hold it, and a resumed run would lose it. Make it a persistent "
        f"buffer, register_buffer({names[0].rpartition('.')[2]!r}, tensor), or freeze it in training"
    )


def changed(before: nn.Module, after: nn.Module) -> list[str]:
    """The names of unlisted values that differ in a copy; buffers first."""
    old = dict(unlisted(before))
    return [name for name, value in unlisted(after) if name not in old or not alike(old[name], value)]


def unlisted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of non-persistent buffers, then of tensors, arrays and numbers in attributes."""
    own = {id(tensor) for _, _, _, tensor in registered(model)}
    modules = [(f"{path}." if path else "", module) for path, module in model.named_modules()]
    for path, module in modules:
        for name in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(name) is not None:
                yield f"{path}{name}", module._buffers[name]
    for path, module in modules:
        for name, value in vars(module).items():
            if name not in INNER:
                for inside, leaf in leaves(value, f"{path}{name}"):
                    if id(leaf) not in own:
                        yield inside, leaf


def leaves(value: Any, name: str, deep: int = 0) -> Iterator[tuple[str, Any]]:
    """(name, value) of the tensors, arrays and numbers in a value."""
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
