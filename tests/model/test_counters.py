"""Counters: a killed run resumes with the counters of sampler, data and loader, to the same bits."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BATCH, TRAIN, tiny
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from tersor.core.run import run
from tersor.model.counters import Counters, unmoved
from tersor.model.snapshot import restoring
from tersor.model.task import Task
from tersor.record.journal import Training
from tersor.steps import Finetune, Quantize

EPOCHS = 3


class Killed(Exception):
    pass


class Rows(Dataset):
    """Samples, with state that each access changes."""

    def __init__(self, kind: str = "") -> None:
        t = tiny("mlp")
        batches = list(t.task.batches("evaluate"))
        self.x, self.y = (torch.cat(part)[:TRAIN] for part in zip(*batches, strict=True))
        self.kind, self.count, self.cache = kind, 0, {}
        self.py, self.np, self.torch = random.Random(1), np.random.default_rng(2), torch.Generator()
        self.old = np.random.RandomState(3)  # noqa: NPY002
        self.epoch = 0

    def __len__(self) -> int:
        return TRAIN

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        self.cache[index] = True
        by = {
            "counts": lambda: self.count / TRAIN, "python": self.py.random, "numpy": self.np.random,
            "legacy": self.old.rand, "torch": lambda: torch.rand((), generator=self.torch).item(),
            "epoch": lambda: self.epoch,
        }.get(self.kind, lambda: 0)()  # fmt: skip
        return self.x[index] + by, self.y[index]


class WithSetEpoch(Rows):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Order(Sampler[int]):
    """A different order in each epoch, from its own state."""

    def __init__(self, kind: str) -> None:
        self.kind, self.epoch = kind, 0
        self.order = list(range(TRAIN))
        self.array = np.arange(TRAIN)

    def __len__(self) -> int:
        return TRAIN

    def __iter__(self) -> Iterator[int]:
        if self.kind == "list":
            self.order[:] = [*self.order[3:], *self.order[:3]]
            return iter(self.order)
        if self.kind == "array":
            self.array[:] = np.roll(self.array, 3)
            return iter(self.array.tolist())
        order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        if self.kind == "own":
            self.epoch += 1
        return iter(order)


class Distributed(Order):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Loader:
    """A loader that is not a DataLoader."""

    def __init__(self) -> None:
        self.rows, self.passes = Rows(), 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for at in range(0, TRAIN, BATCH):
            yield self.rows.x[at : at + BATCH] * self.passes, self.rows.y[at : at + BATCH]

    def __len__(self) -> int:
        return TRAIN // BATCH


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.rows, self.epoch = Rows(), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return ((x + self.epoch, y) for x, y in zip(self.rows.x, self.rows.y, strict=True))


def loaded(rows: Any, sampler: Any = None) -> DataLoader:
    return DataLoader(rows, batch_size=BATCH, sampler=sampler)


LOADERS = {
    "DistributedSampler": lambda: loaded(Rows(), Distributed("set")),
    "torch's own": lambda: loaded(
        Rows(), torch.utils.data.DistributedSampler(Rows(), num_replicas=1, rank=0, shuffle=True)
    ),
    "a sampler that counts": lambda: loaded(Rows(), Order("own")),
    "a list shuffled in place": lambda: loaded(Rows(), Order("list")),
    "an array shuffled in place": lambda: loaded(Rows(), Order("array")),
    "data that counts": lambda: loaded(Rows("counts")),
    "data with set_epoch": lambda: loaded(WithSetEpoch("epoch")),
    "random.Random": lambda: loaded(Rows("python")),
    "numpy's generator": lambda: loaded(Rows("numpy")),
    "numpy's old generator": lambda: loaded(Rows("legacy")),
    "torch's generator": lambda: loaded(Rows("torch")),
    "a subset": lambda: loaded(torch.utils.data.Subset(Rows("counts"), range(TRAIN))),
    "a loader of one's own": Loader,
    "a stream": lambda: loaded(Stream()),
}


def task(kind: str) -> Task:
    return Task("t", evaluate=tiny("mlp").task.evaluate, train=LOADERS[kind](), fingerprint="same")


@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_training_has_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = tiny("mlp").model, [Quantize(epochs=1), Finetune(epochs=EPOCHS, lr=0.05)]
    whole = run(model, steps, task(kind))
    save = Training.save

    def dies(self: Any, epoch: int, *args: Any) -> None:
        save(self, epoch, *args)
        if epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", dies)
        with pytest.raises(Killed):
            run(model, steps, task(kind), journal=tmp_path / "j")
    again = run(model, steps, task(kind), journal=tmp_path / "j", resume=True)
    assert again.digest == whole.digest


def test_set_epoch_gets_each_epoch() -> None:
    epochs: list[int] = []

    class Recording(Distributed):
        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(epoch)
            epochs.append(epoch)

    loader = loaded(Rows(), Recording("set"))
    base = tiny("mlp")
    run(base.model, Finetune(epochs=3), Task("t", evaluate=base.task.evaluate, train=loader))
    assert list(dict.fromkeys(epochs)) == [0, 1, 2]
    assert loader.sampler.epoch == 0, "it must have its first value again"


def test_a_generator_that_is_set_on_a_sampler_is_removed_again() -> None:
    loader = DataLoader(Rows(), batch_size=BATCH, shuffle=True)
    with restoring(loader):
        loader.sampler.generator = torch.Generator()  # as Accelerate does with several processes
    assert loader.sampler.generator is None


def test_a_cache_is_not_a_counter() -> None:
    rows = Rows("counts")
    counters = Counters(loader := loaded(rows))
    list(loader)
    assert rows.cache
    assert counters.facts().keys() == {"loader.dataset.count"}
    counters.restore({})
    assert rows.count == 0
    assert len(rows.cache) == TRAIN


def test_unmoved_restores_the_counters() -> None:
    loader = Loader()
    with unmoved(loader):
        next(iter(loader))
        assert loader.passes == 1
    assert loader.passes == 0
