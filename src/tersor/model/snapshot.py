"""Snapshot: the state of a training after an epoch, from which it resumes with the same bits.

leaves, masks, buffers    optimizer moments    random states of torch, Python, numpy and the loader's own
counters of the loader's parts (counters.py)
Cost: a copy of the leaves and twice as much for Adam's moments.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.model.batches import generators_of
from tersor.model.counters import Counters
from tersor.model.trainable_forms import TrainableForms


def snapshot(
    tuned: TrainableForms, optimizer: Any, generators: list[torch.Generator]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a training, as named tensors and JSON."""
    tensors = {f"net:{name}": value.detach().cpu() for name, value in tuned.state_dict().items()}
    state = optimizer.state_dict()["state"]
    numbers = {}
    for index, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"opt:{index}:{name}"] = value.detach().cpu()
            else:
                numbers[f"{index}:{name}"] = value
    for number, generator in enumerate([torch.default_generator, *generators]):
        tensors[f"random:{number}"] = generator.get_state()
    kind, words, *rest = np.random.get_state()  # noqa: NPY002 (what users' transforms draw from)
    tensors["random:numpy"] = torch.from_numpy(np.asarray(words).astype(np.int64))
    version, python, gauss = random.getstate()
    facts = {"numbers": numbers, "numpy": [kind, *rest], "python": [version, list(python), gauss]}
    return tensors, facts


def restore(
    tuned: TrainableForms, optimizer: Any, generators: list[torch.Generator], tensors: dict[str, Tensor],
    facts: dict[str, Any],
) -> None:  # fmt: skip
    tuned.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net:")})
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("opt:"):
            _, index, word = name.split(":")
            state.setdefault(int(index), {})[word] = value
    for name, number in facts["numbers"].items():
        index, word = name.split(":")
        state.setdefault(int(index), {})[word] = number
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for number, generator in enumerate([torch.default_generator, *generators]):
        generator.set_state(tensors[f"random:{number}"])
    kind, *rest = facts["numpy"]
    np.random.set_state((kind, tensors["random:numpy"].numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, python, gauss = facts["python"]
    random.setstate((version, tuple(python), gauss))


@contextlib.contextmanager
def restoring(batches: object) -> Iterator[Counters]:
    """Lend a loader to a training: its counters and its own generators are restored on exit."""
    counters = Counters(batches)
    sampler = getattr(batches, "sampler", None)
    own, states = getattr(sampler, "generator", None), [(g, g.get_state()) for g in generators_of(batches)]
    try:
        yield counters
    finally:
        counters.restore({})
        for generator, state in states:
            generator.set_state(state)
        if sampler is not None and hasattr(sampler, "generator"):
            sampler.generator = own
