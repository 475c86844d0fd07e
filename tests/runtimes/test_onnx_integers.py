"""Int8 files: what each change of the graph computes, by the evaluator of the onnx package, and which integer
kernels ONNX Runtime then runs."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from integer_nets import NETS, made
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.task import Task
from tersor.runtimes import onnx_integers, onnxruntime
from tersor.steps import Entropy, Export, Quantize


def quantized(name: str, **settings: Any) -> tuple[State, Any]:
    net, task = made(name)
    return run(net, [Quantize(activations=8, products="integer", **settings)], task), task


def kernels(path: Path, tmp_path: Path) -> collections.Counter:
    """The operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


FLOAT = {
    "residual": [], "branches": [], "inverted": ["HardSwish", "HardSigmoid", "Mul"],
    "mlp": ["LayerNormalization"], "shuffled": [], "columns": [], "attended": ["LayerNormalization"],
}  # fmt: skip


@pytest.mark.sampled(name=("mlp", "columns"))
@pytest.mark.parametrize("name", NETS)
def test_all_layers_run_as_integers(name: str, tmp_path: Path) -> None:
    result, task = quantized(name)
    run(result, [Export()], task, out=tmp_path)
    path = tmp_path / "model.onnx"
    found = kernels(path, tmp_path)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(found), found
    assert {kind for kind in FLOAT[name] if kind in found} <= set(FLOAT[name])
    x = task.example[0]
    ours = result.model()(x).detach().numpy()
    theirs = onnxruntime.open(path).run(x)[0]
    given = result.given(x).detach().numpy()
    assert np.abs(ours - theirs).max() <= 0.3 * np.abs(ours - given).max()  # far below the rounding itself
    slow = ReferenceEvaluator(str(path)).run(None, {onnxruntime.open(path).inputs[0]: x.numpy()})[0]
    assert np.square(ours - slow).mean() <= 0.1 * np.square(ours - given).mean()


def test_the_file_holds_each_weight_once_and_as_integers(tmp_path: Path) -> None:
    result, task = quantized("branches")
    run(result, [Export()], task, out=tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    integers = [array for array in arrays.values() if array.dtype == np.int8 and array.ndim > 1]
    weights = [form for name, form in result.forms.items() if result.sites[name].is_weight]
    assert sorted(array.size for array in integers) == sorted(form.decode().numel() for form in weights)
    for form in weights:
        codes = form.codes.decode().numpy()  # type: ignore[attr-defined]
        assert any(np.array_equal(codes, array) or np.array_equal(codes.T, array) for array in integers)
    assert not any(array.dtype == np.float32 and array.size > 100 for array in arrays.values())
    assert not any(node.metadata_props for node in model.graph.node)


def test_biases_are_in_units_of_the_accumulator() -> None:
    """Rounded in PyTorch already, so the int32 of the file decodes to the same bias."""
    result, _ = quantized("residual")
    step = result.grids["/input:x"].scale.decode().double()
    scale = result.forms["stem.weight"].scale.decode()[:, 0].double()  # type: ignore[attr-defined]
    codes = result.forms["stem.bias"].decode().double() / (step * scale)
    assert (codes - codes.round()).abs().max() < 1e-2
    assert codes.abs().max() > 100


def test_a_bias_beside_vanishing_weights_still_fits_32_bits(tmp_path: Path) -> None:
    net, task = made("residual")
    with torch.no_grad():
        net.a.weight[0] = 0  # type: ignore[union-attr]
        net.a.weight[1] *= 1e-20  # type: ignore[union-attr]
        net.a.bias[:2] = torch.tensor([1.5, 2.5])  # type: ignore[union-attr]
    result = run(net, [Quantize(activations=8), Export()], task, out=tmp_path)
    assert torch.allclose(result.forms["a.bias"].decode()[:2], torch.tensor([1.5, 2.5]), rtol=1e-6)
    assert "QLinearConv" in kernels(tmp_path / "model.onnx", tmp_path)
    x = task.example[0]
    theirs = onnxruntime.open(tmp_path / "model.onnx").run(x)[0]
    assert np.allclose(theirs, result.model()(x).detach().numpy(), atol=0.1)


# Single changes of the graph, on graphs made by hand


def graph_of(
    nodes: list[Any], arrays: dict[str, np.ndarray], shape: list[Any], out: list[Any]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", onnx_integers.OPSET)], ir_version=10
    )
    return onnx.shape_inference.infer_shapes(model)


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.serde.deserialize_model(model)
    onnx_integers.tidy(found)
    made = ir.serde.serialize_model(found)
    onnx.checker.check_model(made, full_check=True)
    return made


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def qdq(source: str, name: str) -> list[Any]:
    """QuantizeLinear and DequantizeLinear of `source`, as `name`."""
    return [
        helper.make_node("QuantizeLinear", [source, "s", "z"], [f"{name}_codes"]),
        helper.make_node("DequantizeLinear", [f"{name}_codes", "s", "z"], [name]),
    ]


@pytest.mark.parametrize(
    ("node", "arrays", "scale", "zero", "gone"),
    [
        ("Relu", {}, 0.02, 0, True),
        ("Relu", {}, 0.02, 100, False),  # the grid holds negative numbers
        ("Clip", {"low": 0.0, "high": 6.0}, 6 / 255, 0, True),
        ("Clip", {"low": 0.0, "high": 6.0}, 7 / 255, 0, False),  # the grid goes on beyond 6
        ("Clip", {"low": -1.0, "high": 6.0}, 6 / 255, 0, True),
        ("Clip", {"low": 1.0, "high": 6.0}, 6 / 255, 0, False),
    ],
)
def test_a_clamp_goes_only_where_the_grid_clips_alike(
    node: str, arrays: dict[str, float], scale: float, zero: int, gone: bool
) -> None:
    tensors = {name: np.float32(value) for name, value in arrays.items()}
    tensors |= {"s": np.float32([scale]), "z": np.uint8([zero])}  # type: ignore[dict-item]
    nodes = [helper.make_node(node, ["x", *arrays], ["a"]), *qdq("a", "y")]
    model = graph_of(nodes, tensors, [50], [50])  # type: ignore[arg-type]
    after = tidied(model)
    assert (node not in kinds(after)) == gone
    x = np.linspace(-9, 9, 50).astype(np.float32)
    assert np.array_equal(answer(model, x), answer(after, x))


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [1, 2], [3]])
def test_means_over_all_positions_are_pools(axes: list[int], keepdims: int) -> None:
    arrays = {"s": np.float32(0.1), "z": np.uint8(128), "axes": np.int64(axes)}
    nodes = [*qdq("x", "a"), helper.make_node("ReduceMean", ["a", "axes"], ["y"], keepdims=keepdims)]
    left = [n if at not in [a % 4 for a in axes] else 1 for at, n in enumerate((2, 3, 4, 5))]
    out = left if keepdims else [n for at, n in enumerate((2, 3, 4, 5)) if at not in [a % 4 for a in axes]]
    model = graph_of(nodes, arrays, [2, 3, 4, 5], out)
    after = tidied(model)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    assert np.allclose(answer(model, x), answer(after, x), atol=1e-6)
    assert ("GlobalAveragePool" in kinds(after)) == (sorted(a % 4 for a in axes) == [2, 3])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_transposed_weight_is_stored_transposed(axis: int) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (3, 4)).astype(np.int8)
    arrays = {"w": codes, "ws": np.float32([0.1, 0.2, 0.3, 0.4][: codes.shape[axis]])}
    arrays |= {"s": np.float32(0.1), "z": np.uint8(128)}  # type: ignore[dict-item]
    nodes = [
        *qdq("x", "a"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], axis=axis),
        helper.make_node("Transpose", ["wf"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "wt"], ["y"]),
    ]
    model = graph_of(nodes, arrays, [2, 4], [2, 3])
    after = tidied(model)
    assert sorted(kinds(after)) == ["DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear"]
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    assert np.allclose(answer(model, x), answer(after, x), atol=1e-6)


def test_parts_of_codes_are_decoded_apart() -> None:
    arrays = {"s": np.float32(0.1), "z": np.uint8(128), "i": np.int64(1)}
    nodes = [
        *qdq("x", "a"),
        helper.make_node("Split", ["a"], ["b", "c"], axis=0, num_outputs=2),
        helper.make_node("Gather", ["c", "i"], ["d"], axis=0),
        helper.make_node("Add", ["b", "d"], ["y"]),
    ]
    model = graph_of(nodes, arrays, [4, 3], [2, 3])  # type: ignore[arg-type]
    after = tidied(model)
    before = {out: node.op_type for node in after.graph.node for out in node.output}
    add = next(node for node in after.graph.node if node.op_type == "Add")
    assert [before[name] for name in add.input] == ["DequantizeLinear"] * 2
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert np.array_equal(answer(model, x), answer(after, x))


@pytest.mark.parametrize(("value", "apart"), [(0.0, True), (0.25, False)])
def test_padded_codes_are_decoded_apart_where_the_padding_is_on_the_grid(value: float, apart: bool) -> None:
    arrays = {"s": np.float32(0.1), "z": np.uint8(128), "p": np.int64([0, 1, 0, 1]), "v": np.float32(value)}
    nodes = [
        *qdq("x", "a"),
        helper.make_node("Pad", ["a", "p", "v"], ["b"]),
        helper.make_node("Add", ["b", "b"], ["y"]),
    ]
    model = graph_of(nodes, arrays, [4, 3], [4, 5])  # type: ignore[arg-type]
    after = tidied(model)
    assert kinds(after).count("DequantizeLinear") == 1 + apart
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert np.array_equal(answer(model, x), answer(after, x))


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_weight_that_float_operators_read_is_decoded_when_a_runtime_loads(
    axis: int | None, tmp_path: Path
) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (3, 3)).astype(np.int8)
    scale = np.float32(0.1) if axis is None else np.float32([0.1, 0.2, 0.3])
    settings = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], **settings),  # type: ignore[arg-type]
        helper.make_node("MatMul", ["x", "wf"], ["y"]),  # x has no grid
    ]
    model = graph_of(nodes, {"w": codes, "ws": scale}, [2, 3], [2, 3])  # type: ignore[dict-item]
    after = tidied(model)
    x = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    assert np.array_equal(answer(model, x), answer(after, x))
    onnx.save(after, tmp_path / "model.onnx")
    assert kernels(tmp_path / "model.onnx", tmp_path) == {"MatMul": 1}


@pytest.mark.parametrize("scales", [1, 5])
def test_only_the_rows_of_an_embedding_that_are_read_are_decoded(scales: int) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (5, 3)).astype(np.int8)
    arrays = {"w": codes, "ws": np.float32([0.5, 0.25, 2, 1, 3])[:scales], "i": np.int64([[4, 0], [2, 2]])}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], axis=0),
        helper.make_node("Gather", ["wf", "i"], ["e"], axis=0),
        helper.make_node("Add", ["x", "e"], ["y"]),
    ]
    if scales == 1:
        arrays["ws"] = np.float32(0.5)  # type: ignore[assignment]
    model = graph_of(nodes, arrays, [2, 2, 3], [2, 2, 3])
    after = tidied(model)
    assert "DequantizeLinear" not in kinds(after)
    x = np.zeros((2, 2, 3), np.float32)
    assert np.array_equal(answer(model, x), answer(after, x))


def test_a_file_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, task = made("residual")
    result = run(net, [Quantize(activations=8)], task)
    before = onnx_integers.dequantize
    monkeypatch.setattr(
        onnx_integers, "dequantize", lambda codes, scale, axis: before(codes, scale + scale, axis)
    )
    with pytest.raises(RefusedError, match="does not compute what"):
        run(result, [Export()], task, out=tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


def test_the_operators_left_in_float_are_listed_with_their_times(tmp_path: Path) -> None:
    result, task = quantized("inverted")
    done = run(result, [Export()], task, out=tmp_path)
    *_, note = done.ledger.notes("operators")
    kinds = {item["op"] for item in note.data["float"]}
    assert "HardSigmoid" in kinds
    assert not {"QLinearConv", "QGemm", "QuantizeLinear"} & kinds
    assert all(item["ms"] >= 0 for item in note.data["float"])
    assert sum(item["ms"] for item in note.data["float"]) <= note.data["ms"]
    assert "compute in float" in note.text


@pytest.mark.parametrize("outputs", [3, onnx_integers.FEW + 6])
def test_biases_become_codes_in_units_of_the_accumulator(outputs: int) -> None:
    """Stored units, or units that the file multiplies."""
    draw = np.random.default_rng(0)
    scales = draw.uniform(0.01, 0.02, outputs).astype(np.float32)
    codes = draw.integers(-1000, 1000, outputs)
    arrays = {
        "s": np.float32(0.05), "z": np.uint8(7), "w": draw.integers(-127, 128, (outputs, 4)).astype(np.int8),
        "ws": scales, "b": (codes * (np.float32(0.05) * scales)).astype(np.float32),
    }  # fmt: skip
    nodes = [
        *qdq("x", "a"), helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], axis=0),
        helper.make_node("Gemm", ["a", "wf", "b"], ["y"], transB=1),
    ]  # fmt: skip
    model = graph_of(nodes, arrays, [5, 4], [5, outputs])  # type: ignore[arg-type]
    after = tidied(model)
    stored = [
        array for item in after.graph.initializer if (array := numpy_helper.to_array(item)).dtype == np.int32
    ]
    assert [array.tolist() for array in stored] == [codes.tolist()]
    assert ("Mul" in kinds(after)) == (outputs > onnx_integers.FEW)
    x = draw.normal(size=(5, 4)).astype(np.float32)
    assert np.allclose(answer(model, x), answer(after, x), atol=1e-5)


@pytest.mark.wide
def test_the_coded_file_gives_the_same_runtime_file_byte_for_byte(tmp_path: Path) -> None:
    """So a small .tersor can be shipped, and the file that was timed is made from it."""
    net, task = made("inverted")
    result = run(net, [Quantize(activations=8), Entropy(), Export()], task, out=tmp_path)
    save(result, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").on(made("inverted")[0])
    run(again, [Export(path="again.onnx")], task, out=tmp_path)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert (tmp_path / "m.tersor").stat().st_size < (tmp_path / "model.onnx").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_edges_of_another_type_than_float32_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    net, task = made("branches")
    x = task.example[0].to(dtype)
    task = Task(evaluate=[(x, torch.zeros(len(x), dtype=torch.int64))], calibrate=[(x,)], example=(x,))
    result = run(net.to(dtype), [Quantize(activations=8)], task)
    assert result.model()(x).dtype == dtype
    with pytest.raises(RefusedError, match=rf"/input:x is {str(dtype)[6:]}.*model.float\(\)"):
        run(result, [Export()], task, out=tmp_path)
    assert not list(tmp_path.glob("*.onnx"))
