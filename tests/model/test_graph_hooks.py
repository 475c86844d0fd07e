"""Forward hooks of fx.GraphModules, which their deepcopy drops: on them, on their results and on copies of
these."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor


def traced(hooks: bool) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    graph = torch.fx.symbolic_trace(net)
    if hooks:
        graph.register_forward_hook(lambda module, args, out: 10 * out.softmax(1))
        graph.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return graph


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = traced(hooks=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x) + 1


BATCHES = [*torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(8)]
TASK = tersor.Task("t", calibrate=[(x,) for x in BATCHES], evaluate=[(BATCHES[0], torch.zeros(8).long())])


@pytest.mark.parametrize("make", [lambda: traced(True), Around], ids=["root", "inside"])
@pytest.mark.parametrize("step", [tersor.Quantize(bits=8), tersor.Fold(), tersor.Prune(keep=0.99)])
def test_the_result_of_a_graph_module_has_its_hooks(make: Any, step: Any) -> None:
    model = make()
    wanted = model(BATCHES[1])
    found = tersor.run(model, step, TASK).model()
    assert (found(BATCHES[1]) - wanted).norm() < 0.02 * wanted.norm()
    assert torch.equal(copy.deepcopy(found)(BATCHES[1]), found(BATCHES[1]))
    assert torch.equal(model(BATCHES[1]), wanted)


def test_hooks_of_a_copy_are_its_own() -> None:
    model = traced(hooks=True)
    wanted = model(BATCHES[1])
    found = tersor.run(model, tersor.Quantize(bits=8), TASK).model()
    twin = copy.deepcopy(copy.deepcopy(found))
    twin._forward_hooks.clear()
    assert not torch.allclose(twin(BATCHES[1]), found(BATCHES[1]))
    assert torch.equal(model(BATCHES[1]), wanted)


@pytest.mark.parametrize("hooks", [False, True])
def test_integers_of_a_graph_module_are_those_of_its_file(hooks: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = traced(hooks)
    result = tersor.run(model, [tersor.Quantize(activations=8), tersor.Export()], TASK, out=tmp_path)
    found = result.model()
    wanted, x = model(BATCHES[1]), BATCHES[1]
    assert (found(x) - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(copy.deepcopy(found)(x), found(x))  # with the grids on its inputs
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(out) - found(x)).norm() < 0.05 * wanted.norm()
