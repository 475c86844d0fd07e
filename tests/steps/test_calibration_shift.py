"""Calibration data that are unlike the training data are named, those that are alike are not."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor import Quantize, Task, run
from tersor.record.ledger import Entry
from tersor.steps.calibration_shift import shifts


def data(seed: int, scale: float = 1.0, count: int = 256) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(count, 8, generator=generator)
    return [(x, torch.arange(count) % 4) for x in [x]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def said(calibrate: Any, train: Any) -> list[Entry]:
    task = Task(evaluate=data(0), calibrate=calibrate, train=train)
    found = run(net(), Quantize(activations=8), task)
    return list(found.ledger.notes("calibration"))


@pytest.mark.parametrize("scale", [1 / 255, 0.5, 2.0, 100.0])
def test_data_of_another_scale_are_named_with_how_far_they_are(scale: float) -> None:
    (note,) = said(data(1), data(2, scale))
    assert "unlike the training data" in note.text
    entry = next(iter(note.data["far"].items()))
    assert entry[1] == pytest.approx(scale, rel=0.2)  # the first edge is the input


@pytest.mark.parametrize("seed", range(5))
def test_other_draws_of_the_same_data_are_not(seed: int) -> None:
    assert not said(data(seed), data(seed + 10))
    assert not said(data(seed, count=16), data(seed + 10))


def test_one_set_alone_has_nothing_to_be_compared_with() -> None:
    assert not said(data(1), None)


def test_random_order_and_state_are_left_alone() -> None:
    loader = DataLoader(TensorDataset(*data(1)[0]), batch_size=8, shuffle=True)
    task = Task(evaluate=data(0), calibrate=data(1), train=loader)
    model = net()
    before = torch.random.get_rng_state()
    assert not list(shifts(model, task, ["1/relu:0"]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_values_that_no_range_holds_are_no_reason_to_stop() -> None:
    x, y = data(2)[0]
    assert not said(data(1), [(x.fill_(math.nan), y)])
