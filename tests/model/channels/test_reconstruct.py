"""Reconstruct: refits against PyTorch's least squares, of grouped layers too; how far outputs are apart."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tersor.model.channels.reconstruct import Layer, apart, refitted
from tersor.model.task import Task
from tersor.steps.same_function import moved_by


def task_of(*batches: Tensor) -> Task:
    classes = torch.zeros(len(batches[0]), dtype=torch.int64)
    return Task("t", evaluate=[(batches[0], classes)], calibrate=[[x] for x in batches])


def cut_pair(groups: int) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """Two convolutions before and after half of the channels between them and one output a group are gone;
    the outputs that stay."""
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1, groups=groups))
    units = torch.arange(8).reshape(groups, -1)[:, : 4 // groups]  # [G, 4 / G]
    outputs = torch.arange(6).reshape(groups, -1)[:, :-1].flatten()
    after = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, len(outputs), 1, groups=groups))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(after[0], name).copy_(getattr(before[0], name)[units.flatten()])
            getattr(after[1], name).copy_(getattr(before[1], name)[outputs] if name == "bias" else 0)
        after[1].weight.copy_(before[1].weight[outputs][:, : 4 // groups])
    return before, after, outputs


@pytest.mark.parametrize("groups", [1, 2])
def test_a_refit_is_the_least_squares_of_each_output(groups: int) -> None:
    before, after, outputs = cut_pair(groups)
    x = torch.randn(60, 3, 5, 5)
    changed = refitted(before, after, task_of(x[:30], x[30:]), [Layer("1", outputs)], lambda *_: None)
    assert changed.keys() == {"1.weight", "1.bias"}
    with torch.no_grad():
        read, y, now = (rows(z) for z in (after[0](x), before(x)[:, outputs], after(x)))
    ins, outs = read.shape[1] // groups, y.shape[1] // groups
    for o in range(y.shape[1]):
        own = read[:, o // outs * ins :][:, :ins]
        inputs = torch.cat([own, torch.ones(len(own), 1)], 1)
        best = inputs @ torch.linalg.lstsq(inputs, y[:, o]).solution
        assert (now[:, o] - y[:, o]).square().mean() <= 1.01 * (best - y[:, o]).square().mean() + 1e-7


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)


def test_apart_is_the_share_of_the_energy() -> None:
    torch.manual_seed(0)
    one, two, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(20, 4)
    with torch.no_grad():
        want = (one(x) - two(x)).square().sum() / one(x).square().sum()
    assert apart(one, two, task_of(x[:7], x[7:])) == pytest.approx(float(want), rel=1e-5)
    assert apart(one, copy.deepcopy(one), task_of(x)) == 0


class Found(nn.Linear):
    """As many outputs as there are positive sums, as a detector has."""

    def forward(self, x: Tensor) -> Tensor:
        return x[super().forward(x).sum(1) > 0]


def test_outputs_of_other_sizes_are_not_compared() -> None:
    torch.manual_seed(0)
    one, two = Found(4, 3), Found(4, 3)
    with torch.no_grad():
        two.bias += 5
    assert math.isnan(apart(one, two, task_of(torch.randn(20, 4))))


class Sized(nn.Module):
    """Two outputs, one a thousand times the other."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([float(first), float(second)]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 1000 * self.factors[0] * x, self.factors[1] * x


def test_a_large_output_does_not_outweigh_a_small_one() -> None:
    task = task_of(torch.randn(4, 3))
    found = apart(Sized(1, 1), Sized(1, 1.5), task)
    assert found == pytest.approx((0 + 0.25) / 2)
    assert apart(Sized(1, 1), Sized(1.5, 1), task) == pytest.approx(found)
    assert apart(Sized(1, 0), Sized(1, 1e-7), task) < 1e-6  # an output of zeros and rounding


def test_the_same_function_moves_no_output() -> None:
    x = torch.randn(4, 3)
    assert moved_by([1000 * x, x], [1000 * x, 1.5 * x]) == pytest.approx(0.5)
    assert moved_by([x, 0 * x], [x, 0 * x]) == 0
    assert moved_by([x, 0 * x], [x, x]) > 1
    assert moved_by([x, 0 * x], [x, 1e-12 * x]) < 1e-5
    assert moved_by([0 * x], [x]) == math.inf
