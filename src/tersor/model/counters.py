"""Counters: what a data set, its sampler and its loader keep themselves, and each pass moves.

The number of an epoch, counts, orders that are shuffled in place, random generators: a training that goes on
after a kill has to go on from theirs, and afterwards they are as they were. What has set_epoch is told the
epoch, as Accelerate and DDP do.
Not seen: what worker processes keep between epochs, what a function or an object of another kind holds, and
what grows or begins to be: a cache is no counter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.dtypes import INTEGERS
from tersor.model.batches import generators_of

INSIDE = ("source", "batch_sampler", "sampler", "dataset", "collate_fn")  # where parts of a loader are
DEEP = 4
LONGEST = 1 << 20  # elements of an order: what is longer is data

Facts = dict[str, Any]  # JSON, by "dataset.count"


class Counters:
    """What the parts of a loader keep, as it is now."""

    def __init__(self, batches: object) -> None:
        self.parts = dict(parts_of(batches))
        self.others = {id(generator) for generator in generators_of(batches)}  # these are kept anyway
        self.first = self.read()

    def read(self) -> Facts:
        found = {}
        for path, part in self.parts.items():
            for key, value in vars(part).items():
                if id(value) not in self.others and (told := tell(value)) is not None:
                    found[f"{path}.{key}"] = told
        return found

    def facts(self) -> Facts:
        """What has moved since."""
        now = self.read()
        return {name: now[name] for name, was in self.first.items() if name in now and now[name] != was}

    def restore(self, facts: Facts) -> None:
        """As they were when these facts were told."""
        for name in self.facts():
            self.put(name, facts.get(name, self.first[name]))
        for name in facts.keys() & self.first.keys():
            self.put(name, facts[name])

    def put(self, name: str, told: Any) -> None:
        path, _, key = name.rpartition(".")
        inside = vars(self.parts[path])
        value = inside[key]
        if isinstance(value, (int, float)):
            if type(value) is type(told):
                inside[key] = told
        elif isinstance(value, list):
            if len(value) == len(told):
                value[:] = told
        elif isinstance(value, Tensor):
            value.copy_(torch.tensor(told, dtype=value.dtype))
        elif isinstance(value, np.ndarray):
            value[...] = told
        elif isinstance(value, random.Random):
            version, words, gauss = told
            value.setstate((version, tuple(words), gauss))
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = told
        elif isinstance(value, np.random.RandomState):
            value.set_state(told)
        elif isinstance(value, torch.Generator):
            value.set_state(torch.tensor(told, dtype=torch.uint8))

    def epoch(self, number: int, loader: object) -> None:
        """Tell a pass's number to whatever asks for it; `loader` may be Accelerate's, around ours."""
        for part in (loader, *self.parts.values()):
            if callable(tells := getattr(part, "set_epoch", None)):
                tells(number)


def parts_of(batches: object) -> Iterator[tuple[str, object]]:
    """(path, part) of a loader, its samplers and its data, each once."""
    seen: set[int] = set()
    todo: list[tuple[str, object]] = [("loader", batches)]
    for path, part in todo:
        if id(part) in seen or not hasattr(part, "__dict__") or isinstance(part, type):
            continue
        seen.add(id(part))
        yield path, part
        if path.count(".") < DEEP:
            todo += [(f"{path}.{key}", getattr(part, key)) for key in INSIDE if hasattr(part, key)]


def tell(value: Any) -> Any:
    """A counter, an order or a generator as JSON; None for anything else."""
    if type(value) in (int, float):
        return value
    if isinstance(value, list):
        plain = len(value) <= LONGEST and all(type(item) is int for item in value)
        return list(value) if plain else None
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= LONGEST and value.dtype in INTEGERS else None
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= LONGEST and value.dtype.kind in "iu" else None
    if isinstance(value, random.Random):
        version, words, gauss = value.getstate()
        return [version, list(words), gauss]
    if isinstance(value, np.random.Generator):
        return plain_state(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return plain_state(value.get_state(legacy=False))
    return value.get_state().tolist() if isinstance(value, torch.Generator) else None


def plain_state(state: Any) -> Any:
    """numpy's state of a generator without arrays."""
    if isinstance(state, dict):
        return {key: plain_state(item) for key, item in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


@contextmanager
def unmoved(batches: object) -> Iterator[None]:
    """What the parts of a loader keep is afterwards as it was."""
    counters = Counters(batches)
    try:
        yield
    finally:
        counters.restore({})
