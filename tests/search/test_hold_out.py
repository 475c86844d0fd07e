"""What is held out from training is never trained on, and nothing else is left out."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from tersor.model.loader import TensorBatches
from tersor.model.task import Batches, Task
from tersor.search.hold_out import SHARES, hold_out

X, Y = torch.arange(103.0)[:, None], torch.zeros(103, dtype=torch.long)
EVALUATE = [(X, Y)]


def samples(batches: object) -> list[int]:
    source = batches() if callable(batches) else batches
    return [int(value) for x, _ in source for value in x.flatten()]  # type: ignore[attr-defined]


def in_order() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(X.split(5), Y.split(5), strict=True)


@pytest.mark.parametrize(
    "train",
    [
        TensorBatches(X, Y, batch=8, shuffle=True),
        DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=torch.Generator()),
        DataLoader(TensorDataset(X, Y), batch_size=8),
        list(in_order()),
        in_order,
    ],
)
def test_the_parts_are_apart_in_every_pass_and_make_the_whole(train: Batches) -> None:
    parts = hold_out(Task(evaluate=EVALUATE, train=train))
    assert parts is not None
    fit, held = parts
    for _ in range(2):
        first, second = samples(fit), samples(held)
        assert sorted(first + second) == list(range(103))
        assert 103 / SHARES["train"] - 5 <= len(second) <= 103 / SHARES["train"]


def test_a_loader_keeps_its_settings() -> None:
    seen: list[int] = []

    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        seen.append(len(rows))
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    loader = DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True, drop_last=True, collate_fn=collate)
    parts = hold_out(Task(evaluate=EVALUATE, train=loader))
    assert parts is not None
    torch.manual_seed(0)
    one, two = samples(parts[0]), samples(parts[0])
    assert set(seen) == {7}
    assert one != two
    assert samples(parts[1]) == samples(parts[1])
    assert len(samples(parts[1])) == 103 // SHARES["train"]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
    for place in torch.randperm(103).split(5):
        yield X[place], Y[place]


@pytest.mark.parametrize(
    "train",
    [
        shuffled,
        list(in_order())[: SHARES["train"] - 1],
        DataLoader(Stream(), batch_size=8),
        DataLoader(
            TensorDataset(X, Y), batch_size=8, sampler=WeightedRandomSampler(torch.ones(103).tolist(), 50)
        ),
        DataLoader(TensorDataset(X[:4], Y[:4]), batch_size=2),
    ],
)
def test_batches_that_cannot_be_parted(train: Batches) -> None:
    assert hold_out(Task(evaluate=EVALUATE, train=train)) is None


@pytest.mark.parametrize("evaluate", [list(in_order()), DataLoader(TensorDataset(X, Y), batch_size=8)])
def test_half_of_the_evaluation_set_is_held_out(evaluate: Batches) -> None:
    parts = hold_out(Task(evaluate=evaluate), "evaluate")
    assert parts is not None
    rest, held = map(samples, parts)
    assert sorted(rest + held) == list(range(103))
    assert abs(len(rest) - len(held)) <= 5
    assert hold_out(Task(evaluate=EVALUATE), "evaluate") is None  # a single batch
