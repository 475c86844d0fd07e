"""Smoothing in quantize activations=8: exact before rounding, closer after it, nothing where it is no use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.run import run
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.loader import TensorBatches
from tersor.model.scaled_inputs import ScaledInputs
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import Export, Quantize


class Outliers(nn.Module):
    """A layer norm with two large channels, read by three layers and by a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head((x + self.q(x) * self.k(x).tanh() + self.v(x)).mean(1))


class Torch(nn.Module):
    """torch's own layer, whose fused kernel reads weights and would not see factors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def made(kind: Any) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net, x = kind().eval(), torch.randn(64, 6, 16)
    with torch.no_grad():
        norm = net.norm if kind is Outliers else net.layer.norm1
        norm.weight[:2] *= 60
        for name, weight in net.named_parameters():
            if name.endswith(("q.weight", "k.weight", "v.weight", "linear1.weight")):
                weight[:, :2] /= 60
    loader = TensorBatches(x, net(x).argmax(1).detach(), batch=16)
    return net, Task(evaluate=loader, calibrate=loader, train=loader, example=(x[:4],))


def apart(net: nn.Module, other: nn.Module, task: Task) -> float:
    x = task.example[0]
    return float((net(x) - other(x)).norm() / net(x).norm())


@pytest.mark.sampled(kind="Outliers")
@pytest.mark.parametrize("kind", [Outliers, Torch])
def test_outliers_cost_less(kind: Any, tmp_path: Path) -> None:
    net, task = made(kind)
    smooth, plain = (run(net, [Quantize(activations=8, smooth=s)], task) for s in (True, False))
    (note,) = smooth.ledger.notes("smoothed")
    replaced = {path for path, module in smooth.plain().named_modules() if isinstance(module, ScaledInputs)}
    assert set(note.data["noise"]) == replaced
    assert {"q", "k", "v"} <= replaced if kind is Outliers else "layer.linear1" in replaced
    assert apart(net, smooth.model(), task) < 0.6 * apart(net, plain.model(), task)
    run(smooth, [Export()], task, out=tmp_path)
    theirs = onnxruntime.open(tmp_path / "model.onnx").run(task.example[0])[0]
    assert np.abs(theirs - smooth.model()(task.example[0]).detach().numpy()).max() < 0.05
    save(smooth, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").model(made(kind)[0])
    assert torch.equal(again(task.example[0]), smooth.model()(task.example[0]))


def test_the_replaced_layers_compute_the_same() -> None:
    """With exact weights: only the group that smooths is applied."""
    net, task = made(Outliers)
    smooth = run(net, [Quantize(activations=8, bits=8)], task)
    layer, given = smooth.plain().q, net.q
    factor = layer.factor.detach()
    exact = given.weight.detach() / factor
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - exact).abs() <= step * 0.51).all()


def test_layers_that_read_the_same_share_factors() -> None:
    net, task = made(Outliers)
    model = run(net, [Quantize(activations=8)], task).plain()
    assert torch.equal(model.q.factor, model.k.factor)
    assert torch.equal(model.q.factor, model.v.factor)


def test_layers_without_outliers_stay_what_they_are() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval(), torch.randn(64, 16)
    loader = TensorBatches(x, net(x).argmax(1).detach(), batch=16)
    result = run(net, [Quantize(activations=8)], Task(evaluate=loader, calibrate=loader))
    assert not list(result.ledger.notes("smoothed"))
    assert not any(isinstance(module, ScaledInputs) for module in result.plain().modules())


def test_rare_values_behind_a_pool_are_not_spread() -> None:
    """A channel that calibration hardly saw would get a factor under which other data is clipped."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()
    x = torch.randn(1000, 256).abs() * (torch.rand(1000, 256) < 0.05)
    shown = TensorBatches(x[:100], net(x[:100]).argmax(1).detach(), batch=20)
    state = run(net, [Quantize(activations=8)], Task(evaluate=shown, calibrate=shown))
    assert not [*state.ledger.notes("smoothed")]
    with torch.no_grad():
        exact, found = net(x[100:]), state.model()(x[100:])
    assert float((found - exact).norm() / exact.norm()) < 0.03
