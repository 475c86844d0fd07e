"""Hold out: keep a part of a set from its use, a fifth of the training data or half of the evaluation set.

DataLoader over a set with indices   a part of its samples, drawn once
batches in the same order each time  every fifth or second batch
others                               nothing can be held out: they may give a sample in any pass
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from tersor.model.batches import Again, hash_batch, seeded
from tersor.model.task import Batches, Task
from tersor.steps.drop_search import MOST

SHARES = {"train": 5, "evaluate": 2}  # one of so many samples is held out


class Every:
    """Batches by their place: one of `share`, or the others."""

    def __init__(self, batches: Again, share: int, *, held: bool):
        self.batches, self.share, self.held = batches, share, held

    def __iter__(self) -> Iterator[Any]:
        for place, batch in enumerate(self.batches):
            if (place % self.share == self.share - 1) == self.held:
                yield batch


def hold_out(task: Task, word: str = "train") -> tuple[Batches, Batches] | None:
    """(the rest, what is held out) of the training or evaluation batches; None if they cannot be parted."""
    source, share = getattr(task, word), SHARES[word]
    if isinstance(source, DataLoader):
        return parted(source, share)
    batches = cast(Again, task.batches(word))
    first = beginning(batches, share, 0)
    if len(first) < share or first != beginning(batches, share, 1):
        return None
    return Every(batches, share, held=False), Every(batches, share, held=True)


def parted(loader: DataLoader[Any], share: int) -> tuple[DataLoader[Any], DataLoader[Any]] | None:
    """Two loaders over parts of the same set, with the loader's own settings."""
    plain = type(loader.sampler) in (RandomSampler, SequentialSampler)
    if isinstance(loader.dataset, IterableDataset) or not plain or loader.batch_size is None:
        return None
    count: int = len(loader.dataset)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = min(count // share, MOST)
    if not held:
        return None
    shuffled = isinstance(loader.sampler, RandomSampler)
    return (
        like(loader, sorted(order[held:]), shuffled, loader.drop_last),
        like(loader, sorted(order[:held]), False, False),
    )


def like(loader: DataLoader[Any], indices: list[int], shuffle: bool, drop_last: bool) -> DataLoader[Any]:
    """A loader of these samples alone."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        words = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")
        workers = {word: getattr(loader, word) for word in words}
    return DataLoader(
        Subset(loader.dataset, indices), loader.batch_size, num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn,
        generator=loader.generator, shuffle=shuffle, drop_last=drop_last, **workers,
    )  # fmt: skip


def beginning(batches: Again, share: int, seed: int) -> list[str]:
    """Digests of the first `share` batches in a pass with this random seed."""
    found = []
    with seeded(seed):
        for batch in itertools.islice(batches, share):
            digest = hashlib.sha256()
            hash_batch(digest, batch)
            found.append(digest.hexdigest())
    return found
