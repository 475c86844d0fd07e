"""Counters: the state of a data set, its sampler and its loader that each pass over the data changes.

Epoch numbers, counts, orders shuffled in place, and random generators. A training that resumes after a kill
restores them, and after a run they have their former values. Objects with set_epoch get the epoch number, as
from Accelerate and DDP.
Not covered: the state of worker processes between epochs, the contents of functions and other objects, and
attributes that appear or grow: a cache is not a counter.
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

INSIDE = ("source", "batch_sampler", "sampler", "dataset", "collate_fn")  # where the parts of a loader are
DEEP = 4  # levels of nested parts
LONGEST = 1 << 20  # elements of an order; a longer array is data

Facts = dict[str, Any]  # JSON, by "dataset.count"


class Counters:
    """The counters in the parts of a loader, with their values at construction."""

    def __init__(self, batches: object) -> None:
        self.parts = dict(parts_of(batches))
        self.others = {id(generator) for generator in generators_of(batches)}  # these are saved elsewhere
        self.first = self.read()

    def read(self) -> Facts:
        found = {}
        for path, part in self.parts.items():
            for key, value in vars(part).items():
                if id(value) not in self.others and (stored := as_json(value)) is not None:
                    found[f"{path}.{key}"] = stored
        return found

    def facts(self) -> Facts:
        """The counters that have changed since construction, with their values now."""
        now = self.read()
        return {name: now[name] for name, was in self.first.items() if name in now and now[name] != was}

    def restore(self, facts: Facts) -> None:
        """Set the counters to these values; all others to their first values."""
        for name in self.facts():
            self.put(name, facts.get(name, self.first[name]))
        for name in facts.keys() & self.first.keys():
            self.put(name, facts[name])

    def put(self, name: str, stored: Any) -> None:
        path, _, key = name.rpartition(".")
        inside = vars(self.parts[path])
        value = inside[key]
        if isinstance(value, (int, float)):
            if type(value) is type(stored):
                inside[key] = stored
        elif isinstance(value, list):
            if len(value) == len(stored):
                value[:] = stored
        elif isinstance(value, Tensor):
            value.copy_(torch.tensor(stored, dtype=value.dtype))
        elif isinstance(value, np.ndarray):
            value[...] = stored
        elif isinstance(value, random.Random):
            version, words, gauss = stored
            value.setstate((version, tuple(words), gauss))
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = stored
        elif isinstance(value, np.random.RandomState):
            value.set_state(stored)
        elif isinstance(value, torch.Generator):
            value.set_state(torch.tensor(stored, dtype=torch.uint8))

    def epoch(self, number: int, loader: object) -> None:
        """Call set_epoch(number) on every part that has it. `loader` may be Accelerate's wrapper of ours."""
        for part in (loader, *self.parts.values()):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(number)


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


def as_json(value: Any) -> Any:
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
    """The state of a numpy generator, with arrays as lists."""
    if isinstance(state, dict):
        return {key: plain_state(item) for key, item in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


@contextmanager
def unmoved(batches: object) -> Iterator[None]:
    """Restore the counters of a loader's parts at the end of the context."""
    counters = Counters(batches)
    try:
        yield
    finally:
        counters.restore({})
