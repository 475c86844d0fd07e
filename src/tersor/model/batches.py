"""Batches: what a data loader hands out, whatever its shape: moved, described, hashed, repeated.

A batch is a tensor, or tensors nested in tuples, lists, mappings and dataclasses. Nothing here knows what it
means: that is the task's part (model/task.py). Cost: one pass over the tensors of a batch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from tersor.errors import TaskError

# What a model, loss or metric raises when it is fed something that does not fit it.
MISFIT = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

Result = TypeVar("Result")


class Hash(Protocol):
    """Anything of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer lives; None where it has neither."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return None


def move(batch: Any, device: torch.device | None) -> Any:
    """The batch with every tensor on `device`. Tuples and lists keep their type; mappings become dicts.

    What can move itself (a tokenizer's encoding, a packed sequence) does; anything else stays as it is.
    """
    return batch if device is None else each(batch, lambda x: x.to(device) if hasattr(x, "to") else x)


def each(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A batch with all that is in its containers changed. What can move itself counts as one thing."""
    if not callable(getattr(batch, "to", None)):
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(each(item, change) for item in batch))
        if isinstance(batch, (tuple, list)):
            return type(batch)(each(item, change) for item in batch)
        if isinstance(batch, Mapping):
            return {key: each(item, change) for key, item in batch.items()}
    return change(batch)


def fits(call: Callable[[], Result], message: str) -> Result:
    """The call's result; a TaskError with the message and the callee's own words where it fails."""
    try:
        return call()
    except MISFIT as error:
        raise TaskError(f"{message}. {type(error).__name__}: {error}") from error


def shapes(value: Any) -> str:
    """'(float32 [128, 1, 8, 8], int64 [128])': a batch in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shapes(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(shapes(item) for item in value[:6]) + (", ..." if len(value) > 6 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return type(value).__name__


def hash_batch(into: Hash, value: Any) -> None:
    """Feed values, shapes, dtypes and nesting of a batch to a hash. TaskError for what has no bytes."""
    if isinstance(value, Tensor):
        # A view as bytes works for every dtype, bfloat16 included; numpy knows fewer.
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        into.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        into.update(flat.numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        into.update(f"array {value.dtype.str} {value.shape};".encode())
        into.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        into.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=str):
            into.update(f"{key!r}:".encode())
            hash_batch(into, value[key])
    elif isinstance(value, (str, bytes, int, float, bool, complex, type(None), np.generic)):
        into.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Sequence):
        into.update(f"sequence {len(value)};".encode())
        for item in value:
            hash_batch(into, item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        hash_batch(into, {item.name: getattr(value, item.name) for item in dataclasses.fields(value)})
    else:
        raise TaskError(
            f"task: a batch holds a {type(value).__name__}, whose content cannot be fingerprinted. Give the "
            "task fingerprint='...', a text that changes when the data changes (a version, a checksum)."
        )


def generators_of(loader: object) -> list[torch.Generator]:
    """The generators that a loader and its sampler draw from, where they have their own."""
    own = [getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None))]
    return list(dict.fromkeys(item for item in own if isinstance(item, torch.Generator)))


@contextmanager
def steady(loader: object = None) -> Iterator[None]:
    """Random draws inside start from a fixed seed; outside it is as if none had happened.

    A shuffled evaluation set then comes in the same order each time, so that scores pair up sample by sample.
    """
    before = [(item, item.get_state()) for item in generators_of(loader)]
    try:
        for item, _ in before:
            item.manual_seed(0)
        with seeded(0):
            yield
    finally:
        for item, state in before:
            item.set_state(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random draws inside follow from `seed`, on all devices; outside nothing has changed."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what users' data sets draw from)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    # torch.manual_seed formats a stack for each kind of device that may yet be started: 5 ms.
    set_seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    with torch.random.fork_rng(devices=devices):
        set_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Again:
    """A set of batches that can be passed over again and again, and that says so when a pass is empty."""

    def __init__(self, source: Any, empty: TaskError):
        self.source, self.empty = source, empty

    def __iter__(self) -> Iterator[Any]:
        batches = self.source if iterates(self.source) else self.source()
        if not iterates(batches):
            raise TaskError(
                f"{self.empty} The function returned a {type(batches).__name__}, not an iterator."
            )
        found = False
        for batch in batches:
            found = True
            yield batch
        if not found:
            raise self.empty

    def __len__(self) -> int:
        length = length_of(self.source)
        if length is None:
            raise TypeError("the number of batches is not known before they are drawn")
        return length


def length_of(batches: object) -> int | None:
    """The number of batches where it is known beforehand."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def iterates(value: object) -> bool:
    """Whether iter() takes it; sequences with nothing but __getitem__ included."""
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


def misfit_set(word: str, batches: Any, bare: bool) -> str | None:
    """What is wrong with a set of batches, as the rest of a sentence, and the way out; None where nothing is.

    `bare` allows batches that are one tensor, without a target.
    """
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        return f"is a Dataset of single samples. Give {word}=DataLoader(dataset, batch_size=128)."
    if isinstance(batches, (str, bytes, Mapping, Tensor, np.ndarray)) or not (
        iterates(batches) or callable(batches)
    ):
        return (
            f"is one {type(batches).__name__}, not a set of batches. Give a DataLoader, a list of batches, "
            "or a function that returns a fresh iterator."
        )
    # By its type: calling iter() on a loader would draw random numbers and may start worker processes.
    if isinstance(batches, Iterator):
        return (
            "can be passed over only once (a generator or iterator) and would be empty the second time. Give "
            f"{word}=list(...), or the function that makes it: {word}=lambda: make_batches()."
        )
    tensors = isinstance(batches, (tuple, list)) and all(isinstance(item, Tensor) for item in batches)
    if tensors and len(batches) and not (bare and isinstance(batches, list)):
        return f"looks like one batch, {shapes(batches)}. Give {word}=[(inputs, targets), ...]."
    return None
