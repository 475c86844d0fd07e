"""Lockstep: means of outputs, layer by layer, compared with a plain loop over two models."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.loader import TensorBatches
from tersor.model.lockstep import certain, sample_means, shifts
from tersor.model.observe import observed
from tersor.model.task import Task


class Net(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = F.relu(self.b(x)) if self.again else x
        return self.head(x.mean((2, 3)))


def made(batch: int, again: bool = False) -> tuple[nn.Module, nn.Module, Task, Tensor]:
    torch.manual_seed(0)
    net, x = Net(again).eval(), torch.randn(48, 3, 9, 9)
    coarse = copy.deepcopy(net)
    with torch.no_grad():
        for name, weight in coarse.named_parameters():
            if name.endswith("weight"):
                weight.copy_((weight * 12).floor() / 12)  # always down: the means move
    loader = TensorBatches(x, torch.zeros(48, dtype=torch.int64), batch=batch)
    return net, coarse, Task(evaluate=loader, calibrate=loader), x


AXES = {"a/conv2d:0": 1, "b/conv2d:0": 1, "head/linear:0": 1}


def test_shifts_are_those_of_a_plain_loop() -> None:
    net, coarse, task, x = made(48)
    grids = observed(coarse, task, ["/relu:0", "/relu:1"])
    found, several = shifts(net, copy.deepcopy(coarse), task, grids, AXES)
    assert found.keys() == AXES.keys()
    assert not several

    def on(grid_of: str, y: Tensor) -> Tensor:
        grid = grids[grid_of]
        scale, zero = grid.scale.decode(), grid.zero.decode()
        return ((y / scale).round() + zero).clamp(0, 255).sub(zero) * scale

    def moved(y: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        axes = tuple(range(2, y.ndim))
        gaps = (wanted - y).double()
        shift = certain(gaps.mean(axes) if axes else gaps)
        return shift, y + shift.float().reshape(1, -1, *[1] * len(axes))

    with torch.no_grad():
        y1, y2 = net.a(x), net.b(F.relu(net.a(x)))
        one, z = moved(coarse.a(x), y1)
        two, z = moved(coarse.b(on("/relu:0", F.relu(z))), y2)
        three, z = moved(coarse.head(on("/relu:1", F.relu(z)).mean((2, 3))), net(x))
    for name, shift in zip(AXES, (one, two, three), strict=True):
        assert torch.allclose(found[name], shift, atol=1e-5), name
    assert (three.abs() > 1e-2).any()


@pytest.mark.parametrize("batch", [1, 7, 48])
def test_batches_of_any_size_bring_the_means_back(batch: int) -> None:
    net, coarse, task, x = made(batch)
    grids = observed(coarse, task, ["/relu:0", "/relu:1"])
    found, _ = shifts(net, copy.deepcopy(coarse), task, grids, AXES)
    before = float((coarse(x) - net(x)).mean(0).abs().max())
    with torch.no_grad():
        for name, layer in (("a", coarse.a), ("b", coarse.b), ("head", coarse.head)):
            layer.bias += next(s for edge, s in found.items() if edge.startswith(f"{name}/")).float()
    assert float((coarse(x) - net(x)).mean(0).abs().max()) < 0.1 * before


def test_a_layer_that_is_called_twice_is_named_and_not_moved() -> None:
    net, coarse, task, _ = made(48, again=True)
    found, several = shifts(net, coarse, task, observed(coarse, task, ["/relu:0"]), AXES)
    assert several == {"b/conv2d:0"}
    assert found.keys() == {"a/conv2d:0", "head/linear:0"}


def test_what_may_be_chance_is_left_out() -> None:
    torch.manual_seed(0)
    noise = torch.randn(16, 2000, dtype=torch.float64)
    assert certain(noise).square().mean() < 0.6 * noise.mean(0).square().mean()
    assert torch.allclose(certain(noise + 100), (noise + 100).mean(0), rtol=1e-3)


def test_padding_does_not_count() -> None:
    x = torch.tensor([[[1.0], [3.0], [50.0]], [[5.0], [60.0], [70.0]]])
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    assert sample_means(x, 2, tokens).flatten().tolist() == [2, 5]
    assert sample_means(x, -1, None).flatten().tolist() == [18, 45]
