"""quantize activations=8: products of two activations, as attention has them, in three spellings."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from integer_nets import note
from present import present
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.core.state import State
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import Export, Quantize

WIDTH, HEADS, LENGTH = 32, 2, 12


class Block(nn.Module):
    """Attention between layers, after a norm and before a residual sum."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(WIDTH), attention, nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(self.norm(x))).mean(1))


class Function(nn.Module):
    """torch's function, with a mask that hides the last tokens: of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", (torch.arange(LENGTH) < LENGTH - 3)[None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, self.seen)
        return self.proj(out.transpose(1, 2).flatten(2))


class Module(nn.Module):
    """torch's module, which adds the mask in baddbmm: of the least floats."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask)[0]


class Words(Function):
    """In its own words."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(-1, -2)) / 4
        scores = scores.masked_fill(~self.seen, -torch.inf)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


SPELLINGS = {"function": Function, "module": Module, "words": Words}
each_spelling = pytest.mark.parametrize("spelling", SPELLINGS)


def made(spelling: str) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net, x = Block(SPELLINGS[spelling]()).eval(), torch.randn(48, LENGTH, WIDTH)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if "weight" in name and tensor.ndim == 2:
                tensor.mul_(2)  # so that probabilities differ
        y = net(x).argmax(1)
    loader = TensorBatches(x, y, batch=16)
    return net, Task(evaluate=loader, calibrate=loader, example=(x[:4],))


def quantized(spelling: str, products: str = "integer", **settings: Any) -> tuple[State, Task]:
    net, task = made(spelling)
    return run(net, [Quantize(activations=8, products=products, **settings)], task), task


def ran(path: Path, folder: Path) -> Counter[str]:
    """The operators of ONNX Runtime's own graph."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def apart(a: Any, b: Any) -> float:
    return float(np.sqrt(np.square(np.asarray(a) - np.asarray(b)).mean()))


@pytest.mark.sampled(spelling="words")
@each_spelling
@torch.no_grad()
def test_both_products_run_as_integers_and_as_simulated(spelling: str, tmp_path: Path) -> None:
    state, task = quantized(spelling)
    assert note(state).data["products"] == 2
    assert "and 2 products of activations are integers" in note(state).text
    run(state, [Export()], task, out=tmp_path)
    kernels = ran(tmp_path / "model.onnx", tmp_path)
    assert not {"MatMul", "FusedMatMul", "Gemm"} & set(kernels), kernels
    assert sum(kernels[kind] for kind in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")) == 5
    x = task.example[0]
    ours, given = state.model()(x).numpy(), state.given(x).numpy()
    assert apart(onnxruntime.open(tmp_path / "model.onnx").run(x)[0], ours) <= 0.3 * apart(ours, given)
    assert apart(ours, given) <= 0.05 * apart(given, 0)


@pytest.mark.sampled(spelling="words")
@each_spelling
def test_products_stay_in_float_by_default(spelling: str, tmp_path: Path) -> None:
    state, task = quantized(spelling, Quantize().products)
    assert "products" not in note(state).data
    assert "; 2 products of activations stay in float" in note(state).text
    assert not any("softmax" in edge for edge in state.grids)
    run(state, [Export()], task, out=tmp_path)
    kernels = ran(tmp_path / "model.onnx", tmp_path)
    assert kernels["MatMul"] + kernels["FusedMatMul"] == 2, kernels


@each_spelling
def test_a_mask_sets_no_range_and_values_around_0_have_no_zero_point(spelling: str) -> None:
    state, _ = quantized(spelling)
    steps = {edge: float(grid.scale.decode()) for edge, grid in state.grids.items()}
    assert max(steps.values()) < 1
    signed = [edge for edge, grid in state.grids.items() if grid.signed]
    assert len(signed) >= 1
    assert all(not state.grids[edge].zero.decode().any() for edge in signed)
    (inside,) = (edge for edge in steps if "softmax" in edge or "matmul:0<0" in edge)
    assert not state.grids[inside].signed
    assert 1 / LENGTH / 255 < steps[inside] <= 1 / 255 * (1 + 1e-6)


@each_spelling
@torch.no_grad()
def test_layers_of_other_modules_leave_it_alone(spelling: str, tmp_path: Path) -> None:
    state, task = quantized(spelling, where="head.weight")
    assert [edge for edge in state.grids if "attention" in edge] == []
    whole, _ = quantized(spelling)
    save(whole, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").model(made(spelling)[0])
    assert torch.equal(again(task.example[0]), whole.model()(task.example[0]))


@pytest.mark.extra
@each_spelling
@torch.no_grad()
def test_openvino_multiplies_integers_in_attention(spelling: str, tmp_path: Path) -> None:
    openvino = present("openvino")
    state, task = quantized(spelling)
    run(state, [Export(to="openvino")], task, out=tmp_path)
    x, path = task.example[0], tmp_path / "model.onnx"
    ours, given = state.model()(x).numpy(), state.given(x).numpy()
    # The module scales queries between two grids, and OpenVINO rounds them once.
    least = 0.7 if spelling == "module" else 0.01
    assert apart(openvino.open(path).run(x)[0], ours) <= least * apart(ours, given)
    inside = [item for item in openvino.operators(path, x) if item.op in ("MatMul", "Subgraph")]
    assert any(item.integer for item in inside), inside
    assert not any(item.op == "MatMul" and not item.integer for item in inside), inside
