"""Batches: move, describe and hash the batches of a data loader, and iterate over them repeatedly.

A batch is a tensor, or tensors nested in tuples, lists, mappings and dataclasses. The task (model/task.py)
knows what its parts mean. Cost: one pass over the tensors of a batch.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from tersor.boundary import no_memory
from tersor.dtypes import in_bytes
from tersor.errors import TaskError
from tersor.model.fast_path import no_fast_path

# What a model, loss or metric raises for an input that does not fit it.
MISFIT = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

WAITING = (
    "tersor: another thread of this process is using its random state. This one waits, so that both give the "
    "results that they give alone; processes run side by side"
)
TURN = threading.RLock()  # the random state of torch, numpy and random belongs to the process
Result = TypeVar("Result")


class Hash(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter or buffer; None if it has neither."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return None


def move(batch: Any, device: torch.device | None) -> Any:
    """The batch with every tensor on `device`. Tuples and lists keep their type; mappings become dicts.

    Objects with a method `to` (a tokenizer's encoding, a packed sequence) are moved by it. Other objects are
    returned unchanged. TaskError for tensors without values.
    """

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_meta and device is not None and device.type != "meta":
            raise TaskError("a batch holds a tensor on the meta device: it has no values. Load them first")
        return x.to(device) if hasattr(x, "to") else x

    return batch if device is None else each(batch, moved)


def each(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The batch with `change` applied to every item in its containers. An object with a method `to` is one
    item."""
    if not callable(getattr(batch, "to", None)):
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(each(item, change) for item in batch))
        if isinstance(batch, (tuple, list)):
            return type(batch)(each(item, change) for item in batch)
        if isinstance(batch, Mapping):
            return {key: each(item, change) for key, item in batch.items()}
    return change(batch)


def fits(call: Callable[[], Result], message: str) -> Result:
    """The call's result. If it fails, TaskError with `message` and the text of the error."""
    try:
        return call()
    except MISFIT as error:
        if no_memory(error):
            raise
        raise TaskError(f"{message}. {type(error).__name__}: {error}") from error


def shapes(value: Any) -> str:
    """A short description of a batch for messages: '(float32 [128, 1, 8, 8], int64 [128])'."""
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
    """Feed values, shapes, dtypes and nesting of a batch to a hash. TaskError for other objects."""
    if isinstance(value, Tensor):
        # Bytes can be had of every dtype, bfloat16 included; numpy knows fewer.
        into.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        into.update(in_bytes(value.cpu()).numpy().tobytes())
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
    """The generators that a loader and its sampler own, each once."""
    own = [getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None))]
    return list(dict.fromkeys(item for item in own if isinstance(item, torch.Generator)))


@contextmanager
def steady(loader: object = None) -> Iterator[None]:
    """Random draws inside the context start from a fixed seed; afterwards all random state is restored.

    A shuffled evaluation set then comes in the same order each time, so that scores pair up sample by sample.
    """
    with turn():
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
    """Random draws inside the context start from `seed`, on all devices; afterwards all random state is
    restored. Threads take turns: torch, numpy and random have one such state for the whole process."""
    with turn(), own_state(seed):
        yield


@contextmanager
def turn() -> Iterator[None]:
    """Only one thread of the process is inside; it may enter again."""
    if not TURN.acquire(blocking=False):
        logging.getLogger("tersor").warning(WAITING)
        TURN.acquire()
    try:
        yield
    finally:
        TURN.release()


@contextmanager
def own_state(seed: int) -> Iterator[None]:
    """`seeded` for a process of one thread."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (users' data sets draw from it)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    # torch.manual_seed formats a stack trace for each device type that is not initialized yet: 5 ms.
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
    """The model in eval mode without gradients, and without torch's fast path. Afterwards each module has its
    former mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), no_fast_path():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Again:
    """A set of batches that can be iterated many times. Raises `empty` if a pass has no batch."""

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
            raise TypeError("the number of batches is not known before iteration")
        return length


def length_of(batches: object) -> int | None:
    """The number of batches, or None if it is not known before iteration."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def iterates(value: object) -> bool:
    """Whether iter() accepts it, including sequences that have only __getitem__."""
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


def misfit_set(word: str, batches: Any, bare: bool) -> str | None:
    """What is wrong with a set of batches and the way out, as the rest of a sentence. None if it is right.

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
    # Check the type: iter() on a loader would draw random numbers and may start worker processes.
    if isinstance(batches, Iterator):
        return (
            "can be iterated only once (a generator or iterator) and would be empty the second time. Give "
            f"{word}=list(...), or the function that makes it: {word}=lambda: make_batches()."
        )
    tensors = isinstance(batches, (tuple, list)) and all(isinstance(item, Tensor) for item in batches)
    if tensors and len(batches) and not (bare and isinstance(batches, list)):
        return f"looks like one batch, {shapes(batches)}. Give {word}=[(inputs, targets), ...]."
    return None
