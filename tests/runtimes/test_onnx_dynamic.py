"""Dynamic grids: value by value as ONNX Runtime's DynamicQuantizeLinear rounds, and whole nets against the
file that runs there, with the integer kernels that it runs."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integer_nets import made
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from test_onnx_integers import answer, graph_of, kernels, kinds, tidied
from torch import Tensor, nn

from tersor.core.run import run
from tersor.maths.rounding import dynamic, dynamic_range
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import Export, Quantize

STEP = Quantize(activations=8, activation_range="dynamic")


@pytest.fixture(scope="module")
def oracle() -> ort.InferenceSession:
    """x -> what DynamicQuantizeLinear and DequantizeLinear make of it, with scale and zero point."""
    float_, out = TensorProto.FLOAT, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g", [out("x", float_, ["N"])],
        [out("y", float_, ["N"]), out("s", float_, []), out("z", TensorProto.UINT8, [])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def same(oracle: ort.InferenceSession, x: Tensor) -> None:
    y, scale, zero = oracle.run(None, {"x": x.numpy()})
    ours = dynamic_range(x)
    assert np.array_equal(dynamic(x).numpy(), y)
    assert (float(ours[0]), float(ours[1])) == (float(scale), float(zero))


@given(
    st.lists(
        st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_subnormal=False), max_size=50
    ),
    st.sampled_from((1.0, 2.0**-20, 2.0**-120)),
)
def test_each_value_is_rounded_as_the_runtime_does(
    oracle: ort.InferenceSession, values: list[float], times: float
) -> None:
    x = torch.tensor(values, dtype=torch.float32) * times
    if float(dynamic_range(x)[0]) >= 2.0**-126:  # smaller scales: below
        same(oracle, x)


@pytest.mark.parametrize("seed", range(8))
def test_random_tensors_and_ties(oracle: ort.InferenceSession, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for size in (1, 7, 400):
        x = torch.randn(size, generator=draw)
        for values in (x, x * 1e-6, x + 100, -x.abs(), x.exp()):
            same(oracle, values)
        halves = torch.randint(-100, 156, (size,), generator=draw) + 0.5 * torch.randint(
            0, 2, (size,), generator=draw
        )
        same(oracle, torch.cat([halves.clamp(-100, 155), torch.tensor([-100.0, 155.0])]) * 2.0**-seed)


@pytest.mark.parametrize("values", [
    [0.0] * 5, [], [-0.0, 0.0], [3.0], [-3.0], [-4.0, -2.0, -1.0], [2.0, 5.0], [1e-38, -2e-38], [3e38, 1.0],
    [1e-40, -1e-40, 3e-41], [-3e38, 3e38, 1.0],
])  # fmt: skip
def test_special_tensors(oracle: ort.InferenceSession, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    y, *_ = oracle.run(None, {"x": x.numpy()})
    assert np.array_equal(dynamic(x).numpy(), y, equal_nan=True)


def test_a_range_too_small_for_a_scale_is_zeros(oracle: ort.InferenceSession) -> None:
    x = torch.tensor([1.4e-45, 0.0])
    assert dynamic(x).tolist() == oracle.run(None, {"x": x.numpy()})[0].tolist() == [0.0, 0.0]


def test_nan_does_not_become_a_number() -> None:
    """In the runtime it may: its minimum passes over NaN."""
    assert dynamic(torch.tensor([1.0, float("nan")])).isnan().all()


def test_gradients_pass_and_values_stay() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    weights = torch.randn(4, 5)
    y = dynamic(x)
    (y * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)
    assert torch.equal(y.detach(), dynamic(x.detach()))
    assert 0 < (y - x).abs().max() <= (x.max() - x.min()) / 255 / 2 * 1.001


class Several(nn.Module):
    """Three layers that read one tensor, one that is called twice, a weight on the left, one of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 8) for _ in range(3))
        self.twice, self.left = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 6))
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, 6, 16]
        y = self.q(x) * self.k(x).sigmoid() + self.v(x)
        y = self.twice(self.twice(y).relu())
        return self.head((self.left @ y)[:, 0])


def task_of(x: Tensor) -> Task:
    return Task(evaluate=[(x, torch.zeros(len(x), dtype=torch.int64))], example=(x[:4],))


def test_layers_that_read_one_tensor_round_it_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Several().eval(), torch.randn(8, 6, 16)
    result = run(net, [STEP, Export()], task_of(x), out=tmp_path)
    path = tmp_path / "model.onnx"
    found = kernels(path, tmp_path)
    assert found["MatMulIntegerToFloat"] == 3
    assert found["DynamicQuantizeLinear"] == 1
    assert found["DynamicQuantizeMatMul"] == 3  # `twice` two times, and `head`
    assert found["MatMul"] == 1  # from the left
    *_, note = result.ledger.notes("integers")
    assert note.data["float"] == {"left": "matmul computes in float"}
    ours = result.model()(x).detach().numpy()
    theirs = onnxruntime.open(path).run(x)[0]
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()
    assert np.abs(ours - net(x).detach().numpy()).max() > 1e-3 * np.abs(ours).max()


@pytest.mark.sampled(name=("mlp", "residual"))
@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("name", ["mlp", "columns", "residual"])
def test_whole_nets_compute_what_the_simulation_does(name: str, per: str, tmp_path: Path) -> None:
    net, task = made(name)
    step = Quantize(activations=8, activation_range="dynamic", per=per)
    result = run(net, [step, Export()], task, out=tmp_path)
    path = tmp_path / "model.onnx"
    layers = {"mlp": 3, "columns": 3, "residual": 1}[name]
    assert kernels(path, tmp_path)["DynamicQuantizeMatMul"] == layers
    session = onnxruntime.open(path)
    for x in (
        task.example[0],
        100 * task.example[0][:3],
        torch.zeros_like(task.example[0]),
    ):  # no range is fixed
        ours, given_ = result.model()(x).detach().numpy(), net(x).detach().numpy()
        theirs = session.run(x)[0]
        apart = np.abs(ours - theirs).max()
        assert apart <= 0.05 * np.abs(ours - given_).max() or apart <= 1e-5 * np.abs(ours).max()
        slow = ReferenceEvaluator(str(path)).run(None, {session.inputs[0]: x.numpy()})[0]
        assert np.square(ours - slow).mean() <= 0.1 * np.square(ours - given_).mean() + 1e-9


def test_padding_changes_a_range(tmp_path: Path) -> None:
    """As in the guide: a value depends on the batch that it is in."""
    net, task = made("mlp")
    result = run(net, [STEP, Export()], task, out=tmp_path)
    x = task.example[0][:2]
    wide = torch.cat([x, 50 * torch.ones(1, *x.shape[1:])])
    alone, padded = (result.model()(each)[:2] for each in (x, wide))
    assert (alone - padded).abs().max() > 1e-2
    theirs = onnxruntime.open(tmp_path / "model.onnx").run(wide)[0][:2]
    assert np.abs(padded.detach().numpy() - theirs).max() < 1e-4


@pytest.mark.parametrize(("turned", "axis"), [(0, 1), (1, 0), (0, 0), (0, None)])
def test_products_from_codes_on_graphs_made_by_hand(turned: int, axis: int | None) -> None:
    """Scales of outputs are taken out of the sum; scales of inputs cannot be, and the product stays."""
    draw = np.random.default_rng(0)
    codes = draw.integers(-127, 128, (4, 4)).astype(np.int8)
    scale = np.float32(0.1) if axis is None else draw.uniform(0.1, 0.2, 4).astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], **({} if axis is None else {"axis": axis})),
        helper.make_node("Gemm", ["a", "wf", "b"], ["y"], transB=turned),
    ]
    arrays = {"w": codes, "ws": scale, "b": draw.normal(size=4).astype(np.float32)}
    model = graph_of(nodes, arrays, [3, 4], [3, 4])  # type: ignore[arg-type]
    after = tidied(model)
    assert ("MatMulInteger" in kinds(after)) == ((turned, axis) != (0, 0))
    x = draw.normal(size=(3, 4)).astype(np.float32)
    assert np.allclose(answer(model, x), answer(after, x), atol=1e-5)
