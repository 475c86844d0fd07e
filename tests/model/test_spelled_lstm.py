"""The LSTM step by step: torch's own without rounding, ONNX Runtime's kernel with it, and the operator of an
exported graph."""

from typing import Any

import numpy as np
import pytest
import torch
from recurrent_nets import Codes, kernel, made
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError
from tersor.forms import Dense
from tersor.forms.grid import Grid
from tersor.maths.rounding import dynamic
from tersor.model.simulate import exported, gridded
from tersor.model.spelled_lstm import marked_lstm, spelled_lstm

CASES: dict[str, dict[str, Any]] = {
    "one": {}, "layers": {"num_layers": 3}, "both": {"bidirectional": True, "num_layers": 2},
    "no biases": {"bias": False}, "batch first": {"batch_first": True, "bidirectional": True},
}  # fmt: skip


def call_of(layer: nn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """The arguments of the function that the layer calls."""
    own = (layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional)
    return x, hx, layer._flat_weights, *own, layer.batch_first


def parts(case: str) -> tuple[nn.LSTM, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layer = nn.LSTM(5, 4, **CASES[case]).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    batch = 6 if layer.batch_first else 3
    count = layer.num_layers * (1 + layer.bidirectional)
    h, c = torch.randn(2, count, batch, 4, dtype=torch.float64).unbind()
    return layer, x, (h, c)


@pytest.mark.parametrize("case", list(CASES))
def test_without_rounding_it_is_the_layer_with_its_gradients(case: str) -> None:
    layer, x, hx = parts(case)
    y, last = layer(x, hx)
    ours = spelled_lstm(lambda item: item, *call_of(layer, x, hx))
    for mine, theirs in zip(ours, (y, *last), strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, atol=1e-12)
    one, two = (torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]) for out in (y, ours[0]))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, two, strict=True))


def test_dropout_is_between_the_layers_in_training_alone() -> None:
    layer, x, hx = parts("layers")
    layer.dropout = 1.0
    assert torch.allclose(spelled_lstm(lambda item: item, *call_of(layer.eval(), x, hx))[0], layer(x, hx)[0])
    y = spelled_lstm(lambda item: item, *call_of(layer.train(), x, hx))[0]
    assert torch.allclose(y, layer(x, hx)[0])  # of all that the second layer reads nothing is left
    assert not torch.allclose(y, layer.eval()(x, hx)[0])


def test_rounded_it_is_the_kernel() -> None:
    """Against a loop over codes. What a step rounds is the batch: one large sample makes all steps coarse."""
    torch.manual_seed(0)
    layer, x = nn.LSTM(12, 9), torch.randn(8, 4, 12)
    x[:, 0] *= 20
    w, r = (torch.randint(-127, 128, (36, size)) for size in (12, 9))
    scales = torch.rand(2, 36, 1) / 200
    with torch.no_grad():
        for name, codes, scale in (("weight_ih_l0", w, scales[0]), ("weight_hh_l0", r, scales[1])):
            getattr(layer, name).copy_(codes * scale)
        zeros = torch.zeros(1, 4, 9)
        ours = spelled_lstm(dynamic, *call_of(layer, x, (zeros, zeros)))[0].numpy()
        bias = (layer.bias_ih_l0 + layer.bias_hh_l0).numpy()
        steps = (scales[0, :, 0].numpy(), scales[1, :, 0].numpy())
        theirs = kernel(x.numpy(), Codes(w.numpy(), r.numpy(), steps, bias))
        assert np.abs(ours - theirs).max() < 1e-5
        assert np.abs(ours - layer(x)[0].numpy()).max() > 1e-3


@pytest.mark.parametrize("case", list(CASES))
def test_the_operator_is_the_same(case: str) -> None:
    layer, x, hx = parts(case)
    layer, x, hx = layer.float().eval(), x.detach().float(), (hx[0].float(), hx[1].float())
    with torch.no_grad():
        call = call_of(layer, x, hx)
        for mine, theirs in zip(marked_lstm(*call), spelled_lstm(dynamic, *call), strict=True):
            assert torch.equal(mine, theirs)
        weights = [item.detach() for item in call[2]]
        settings = (layer.bias, layer.num_layers, layer.bidirectional, layer.batch_first)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.tersor.dynamic_lstm, (x, *hx, weights, *settings), test_utils=checks)


@pytest.mark.parametrize("name", ["outputs", "states", "shared"])
def test_the_exported_graph_computes_what_the_simulation_does(name: str) -> None:
    net, task = made(name)
    simulated = gridded(net, {"cell/lstm:0.0<all": Grid()}).eval()
    x = task.example[0]
    program = exported(simulated, x)  # type: ignore[arg-type]
    calls = sum(node.target is torch.ops.tersor.dynamic_lstm.default for node in program.graph.nodes)
    assert calls == (2 if name == "shared" else 1)
    ours = simulated(x)
    assert torch.allclose(ours, program.module()(x), atol=1e-6)
    assert not torch.allclose(ours, net(x), atol=1e-4)


def test_packed_sequences_are_refused() -> None:
    net, _ = made("outputs")
    simulated = gridded(net.cell, {"/lstm:0.0<all": Grid()})  # type: ignore[arg-type]
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 6), torch.randn(2, 6)])
    with pytest.raises(RefusedError, match="reads packed sequences now"):
        simulated(packed)


def test_a_grid_with_a_scale_is_refused() -> None:
    net, _ = made("outputs")
    grid = Grid(scale=Dense(torch.ones(1)), zero=Dense(torch.zeros(1, dtype=torch.uint8)))
    with pytest.raises(SettingError, match="cell/lstm:0.0<all: the grid has a scale, but an LSTM's must be"):
        gridded(net, {"cell/lstm:0.0<all": grid})
