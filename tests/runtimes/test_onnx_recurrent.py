"""LSTMs in integers: nets against the file that ONNX Runtime runs, the file against a slow loop, refusals."""

import collections
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from integer_nets import note
from onnx import numpy_helper
from recurrent_nets import NETS, Codes, kernel, made, task_of
from torch import Tensor, nn

from tersor.core.run import run
from tersor.errors import RefusedError
from tersor.runtimes import onnxruntime
from tersor.runtimes.onnx_graphs import constant, initializer
from tersor.runtimes.onnx_recurrent import bias_of
from tersor.steps import Cluster, Export, Prune, Quantize

STEP = Quantize(activations=8, activation_range="dynamic")
LAYERS = {"outputs": 4, "no biases": 4, "states": 2, "shared": 2}


def graph_of(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    graph = onnx.load(path).graph
    return graph, {item.name: numpy_helper.to_array(item) for item in graph.initializer}


def torch_order(rows: np.ndarray) -> np.ndarray:
    """i o f c -> i f c o"""
    parts = np.split(rows, 4)
    return np.concatenate([parts[at] for at in (0, 2, 3, 1)])


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("name", list(NETS))
def test_the_file_computes_what_the_simulation_does(name: str, per: str, tmp_path: Path) -> None:
    net, task = made(name)
    step = replace(STEP, per=per)
    result = run(net, [step, Export()], task, out=tmp_path)
    kinds = collections.Counter(item.op_type for item in graph_of(tmp_path / "model.onnx")[0].node)
    assert kinds["DynamicQuantizeLSTM"] == LAYERS[name]
    assert not kinds["LSTM"]
    assert not note(result).data["float"]
    assert "LSTM" not in {item["op"] for item in note(result, "operators").data["float"]}
    session = onnxruntime.open(tmp_path / "model.onnx")
    x = task.evaluate[0][0]  # type: ignore[index]
    for inputs in (x, 30 * x[:1], torch.zeros_like(x[:2])):  # no range is fixed, and no batch size
        ours, plain = result.model()(inputs).detach().numpy(), net(inputs).detach().numpy()
        apart = np.abs(session.run(inputs)[0] - ours).max()
        assert apart < 1e-5 or apart < 0.1 * np.abs(ours - plain).max()
    assert np.abs(result.model()(x).detach().numpy() - net(x).detach().numpy()).max() > 1e-3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_file_is_a_slow_loop_over_codes(threads: int, tmp_path: Path) -> None:
    """On more threads each has ranges of its own of its samples' hidden states, as the guide says."""
    net, x = made("shared")[0], torch.randn(8, 30, 6)
    x[:3] *= 4
    run(net.cell, [STEP, Export()], task_of(x), out=tmp_path)  # type: ignore[arg-type]
    graph, arrays = graph_of(tmp_path / "model.onnx")
    (node,) = (item for item in graph.node if item.op_type == "DynamicQuantizeLSTM")
    w, r, bias, *steps = (arrays[node.input[at]][0] for at in (1, 2, 3, 8, 10))
    bias = sum(map(torch_order, np.split(bias, 2)))
    layer = Codes(*map(torch_order, (w.T, r.T)), (torch_order(steps[0]), torch_order(steps[1])), bias)
    inputs = x.numpy().transpose(1, 0, 2)
    slow = kernel(inputs, layer, -(-len(x) // threads)).transpose(1, 0, 2)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(found - slow).max() < 1e-5
    if threads > 1:
        assert np.abs(found - kernel(inputs, layer).transpose(1, 0, 2)).max() > 1e-4


def test_sequences_of_any_length(tmp_path: Path) -> None:
    net, task = made("outputs")
    result = run(net, [STEP, Export(dynamic_axes="1")], task, out=tmp_path)
    session = onnxruntime.open(tmp_path / "model.onnx")
    for steps in (1, 3, 12):
        x = torch.randn(3, steps, 6)
        assert np.abs(session.run(x)[0] - result.model()(x).detach().numpy()).max() < 1e-5


def test_a_layer_without_an_axis_of_samples(tmp_path: Path) -> None:
    """torch's layer takes [T, I] too."""
    torch.manual_seed(0)
    net, x = nn.LSTM(6, 8), torch.randn(5, 6)
    task = task_of(x)
    result = run(net, [STEP, Export(dynamic_batch=False)], replace(task, example=(x,)), out=tmp_path)
    y, (h, c) = result.model()(x)
    for mine, theirs in zip((y, h, c), onnxruntime.open(tmp_path / "model.onnx").run(x), strict=True):
        assert np.abs(mine.detach().numpy() - theirs).max() < 1e-5


def test_the_file_holds_each_matrix_once_as_integers(tmp_path: Path) -> None:
    net, task = made("shared")
    run(net, [STEP, Export()], task, out=tmp_path)
    _, arrays = graph_of(tmp_path / "model.onnx")
    codes = [item for item in arrays.values() if item.dtype == np.int8 and item.size > 24]
    assert [item.shape for item in codes] == [(1, 6, 24), (1, 6, 24)]  # both calls share them
    assert not any(item.size >= 6 * 24 for item in arrays.values() if item.dtype == np.float32)


def test_biases_that_the_exporter_does_not_join() -> None:
    """It computes constants up to a size, and a layer of 2,100 units is beyond it."""
    graph = ir.Graph([], [], nodes=[])
    parts = [initializer(graph, name, np.arange(8, dtype=np.float32) + at) for at, name in enumerate("ab")]
    graph.append(node := ir.node("Concat", parts, attributes={"axis": 0}))
    both = constant(bias_of(graph, node.outputs[0]))
    order = np.array([0, 1, 6, 7, 2, 3, 4, 5], np.float32)
    assert np.array_equal(both, np.concatenate([order, order + 1])[None])  # type: ignore[arg-type]


def test_later_steps_that_leave_codes_are_in_the_file(tmp_path: Path) -> None:
    net, task = made("outputs")
    result = run(net, [STEP, Prune(keep=0.5), Quantize(bits=4, where="cell*"), Export()], task, out=tmp_path)
    x = task.example[0]
    found = onnxruntime.open(tmp_path / "model.onnx").run(x)[0]
    assert np.abs(found - result.model()(x).detach().numpy()).max() < 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("weights", ["packed", "float"])
def test_a_weight_without_codes_is_refused_by_name(weights: str, tmp_path: Path) -> None:
    net, task = made("outputs")
    says = "weight_hh_l0.*: its LSTM is to compute with integers, and later steps left this weight without"
    with pytest.raises(RefusedError, match=says):
        run(
            net, [STEP, Cluster(where="cell.weight_hh_l0"), Export(weights=weights)], task, out=tmp_path,
        )  # fmt: skip
    assert not (tmp_path / "model.onnx").exists()


class Ends(nn.Module):
    """One layer reads the last state alone, in the usual way of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head(self.cell(x)[1][0][-1])


def test_with_ranges_from_calibration_batches_what_reads_a_state_is_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, task = Ends(), task_of(torch.randn(16, 7, 6))
    task = replace(task, calibrate=task.evaluate)
    result = run(net, [Quantize(activations=8), Export()], task, out=tmp_path)
    assert list(result.grids) == ["cell/lstm:0.1"]
    why = "lstm computes in float, except with activation_range=dynamic"
    assert note(result).data["float"] == {f"cell.weight_{at}_l0": why for at in ("ih", "hh")}
    assert {result.forms[name].name for name in ("head.weight", "cell.weight_ih_l0")} == {"affine"}
    x = task.example[0]
    found = onnxruntime.open(tmp_path / "model.onnx").run(x)[0]
    assert np.abs(found - result.model()(x).detach().numpy()).max() < 1e-5  # type: ignore[operator]


def test_weights_alone_are_as_before(tmp_path: Path) -> None:
    net, task = made("outputs")
    result = run(net, [Quantize(), Export()], task, out=tmp_path)
    assert not result.grids
    kinds = {item.op_type for item in graph_of(tmp_path / "model.onnx")[0].node}
    assert "LSTM" in kinds
    assert "DynamicQuantizeLSTM" not in kinds
