"""Unit groups: the parameters that go with units, against a count of what a cut leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tersor
from tersor.core.state import start
from tersor.model.task import Task
from tersor.report.unit_groups import described


class Recurrent(nn.Module):
    """The hidden units of a GRU are rows and columns of one matrix."""

    def __init__(self, hidden: int):
        super().__init__()
        self.gru, self.head = nn.GRU(8, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(inputs)[0][:, -1])
        return out


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def test_what_two_axes_share_counts_once() -> None:
    data = [(torch.randn(4, 5, 8), torch.zeros(4, dtype=torch.int64))]
    task = Task("series", calibrate=data, evaluate=data)
    facts = described(start(Recurrent(16)), task)
    (family,) = facts["families"]
    assert family["parameters"] == parameters(Recurrent(16)) - parameters(Recurrent(15))
    assert family["together"] == parameters(Recurrent(16)) - 10  # the head's bias stays
    assert facts["model"]["parameters"] == parameters(Recurrent(16))


def test_a_cut_removes_what_is_said() -> None:
    data = [(torch.randn(4, 5, 8), torch.zeros(4, dtype=torch.int64))]
    task = Task("series", calibrate=data, evaluate=data)
    small = tersor.run(Recurrent(16), tersor.Slim(keep=0.5), task).model()
    (family,) = described(start(small), task)["families"]
    assert family["units"] == small.gru.hidden_size
    assert parameters(small) == parameters(Recurrent(family["units"]))
