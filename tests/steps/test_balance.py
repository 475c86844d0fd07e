"""balance and correct of quantize activations=8: nearer to the float network, and the file as simulated."""

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
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import Export, Quantize


class Uneven(nn.Module):
    """An inverted residual whose channels differ much, between relu6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(inplace=True))
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.point(self.depth(x))
        return self.head(x.mean((2, 3)))


def made() -> tuple[nn.Module, Task, Tensor]:
    torch.manual_seed(0)
    net, x = Uneven().eval(), torch.randn(64, 3, 12, 12)
    with torch.no_grad():
        size = 2.0 ** -torch.arange(16).remainder(6)
        for layer in (net.stem[0], net.depth[0], net.point):
            layer.weight *= size.reshape(-1, 1, 1, 1)
            layer.bias *= size
        net.point.weight /= size.reshape(1, -1, 1, 1)
        net.head.weight /= size
    loader = TensorBatches(x[:32], net(x[:32]).argmax(1).detach(), batch=16)
    return net, Task(evaluate=loader, calibrate=loader, example=(x[:4],)), x[32:]


def apart(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - other(x)).square().mean() / net(x).var())


def test_each_of_the_two_brings_the_outputs_nearer(tmp_path: Path) -> None:
    net, task, x = made()
    states = {
        (b, c): run(net, [Quantize(activations=8, balance=b, correct=c)], task)
        for b in (False, True) for c in (False, True)
    }  # fmt: skip
    error = {key: apart(net, state.model(), x) for key, state in states.items()}
    assert error[True, True] < 0.5 * error[False, False]
    assert error[True, False] < error[False, False]
    both = states[True, True]
    (balanced,), (corrected,) = both.ledger.notes("balanced"), both.ledger.notes("corrected")
    assert balanced.data["noise"]
    assert all(gain < 0.9 for gain in balanced.data["noise"].values())
    assert corrected.data == {"biases": 4, "left": {}}
    assert not list(states[False, False].ledger.notes("balanced"))
    run(both, [Export()], task, out=tmp_path)
    theirs = onnxruntime.open(tmp_path / "model.onnx").run(x[:8])[0]
    assert np.abs(theirs - both.model()(x[:8]).detach().numpy()).max() < 0.02 * float(net(x).std())
    save(both, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").model(made()[0])
    assert torch.equal(again(x), both.model()(x))


def test_scales_alone_change_no_output() -> None:
    net, task, x = made()
    weights = {name: value.clone() for name, value in net.named_parameters()}
    state = run(net, [Quantize(activations=8, correct=False)], task)
    after = dict(state.plain().named_parameters())
    ratio = after["stem.0.weight"].flatten(1).norm(dim=1) / weights["stem.0.weight"].flatten(1).norm(dim=1)
    assert ratio.max() > 1.5 * ratio.min()  # the channels have other scales
    assert apart(net, state.plain().eval(), x) < 1e-3


@pytest.mark.parametrize("odd", ["frozen", "where", "no bias"])
def test_what_may_not_change_stays(odd: str) -> None:
    net, task, _ = made()
    settings: dict[str, Any] = {}
    if odd == "frozen":
        net.point.bias.requires_grad_(False)
    if odd == "where":
        settings["where"] = ("*", "!stem*", "!depth*")
    if odd == "no bias":
        net.point.bias = None
    state = run(net, [Quantize(activations=8, **settings)], task)
    (note,) = state.ledger.notes("corrected")
    if odd == "where":
        assert torch.equal(state.forms["stem.0.weight"].decode(), net.stem[0].weight)
        assert torch.equal(state.forms["depth.0.weight"].decode(), net.depth[0].weight)
    else:
        reason = {"frozen": "its bias is frozen", "no bias": "it has no bias"}[odd]
        assert note.data["left"] == {"point.weight": reason}
        assert reason in note.text


def test_dynamic_ranges_take_neither() -> None:
    net, task, _ = made()
    state = run(net, [Quantize(activations=8, activation_range="dynamic")], task)
    assert not list(state.ledger.notes("balanced"))
    assert not list(state.ledger.notes("corrected"))
