"""Operators: a network in integers but for its softmax, and the same in float, as each runtime runs them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import qdq
import torch
from onnx.reference import ReferenceEvaluator
from present import EACH, present

from tersor.runtimes.operators import Names, Operator, left_integers


@pytest.mark.parametrize("name", EACH)
def test_what_left_the_integers_is_named(name: str, tmp_path: Path) -> None:
    runtime, path = present(name), qdq.network(tmp_path / "m.onnx")
    found = runtime.operators(path, torch.from_numpy(qdq.inputs(2)))
    by_name = {item.name: item for item in found}
    assert all(by_name[word].integer for word in ("first", "second", "sum"))
    assert not any(item.converts for item in map(by_name.get, ("first", "second", "sum", "softmax")) if item)
    assert [item.name for item in left_integers(found)] == ["softmax"]
    assert by_name["input/q"].converts, "the one conversion that no runtime can leave out"
    assert all(0 <= item.ms < 50 for item in found)
    assert sum(item.ms for item in found) > 0
    assert list(by_name).index("first") < list(by_name).index("softmax")
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", EACH)
def test_a_float_network_has_no_integers(name: str, tmp_path: Path) -> None:
    runtime, path = present(name), qdq.network(tmp_path / "m.onnx", integers=False)
    found = runtime.operators(path, {"x": torch.from_numpy(qdq.inputs(2))}, threads=2)
    assert not [item for item in found if item.integer]
    left = left_integers(found)
    assert {"first", "second", "softmax"} <= {item.name for item in left}
    assert [item.ms for item in left] == sorted((item.ms for item in left), reverse=True)


@pytest.mark.parametrize("name", EACH)
def test_integers_are_those_of_the_standard(name: str, tmp_path: Path) -> None:
    """Against the evaluator of the onnx package. A sum near a tie may be rounded to the other side, and two
    of them are added."""
    path = qdq.network(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("edge3/dq_out", onnx.TensorProto.FLOAT, ["B", qdq.WIDTH, 9, 7])
    )
    onnx.save(model, path)
    x = qdq.inputs(5)
    found, expected = present(name).open(path).run(x)[1], ReferenceEvaluator(model).run(None, {"x": x})[1]
    steps = np.abs(found - expected) * 32
    assert steps.max() <= 2.001
    assert (steps > 0.5).mean() < 0.01
    assert len(np.unique(expected)) > 40


@pytest.mark.parametrize(
    ("theirs", "op", "ours"),
    [
        ("conv", "QLinearConv", "conv"),
        ("conv_token_12", "QLinearConv", "conv"),
        ("relu_out_nchwc", "Conv", "conv"),  # fused, and called after what it gives
        ("conv/WithoutBiases", "Convolution", "conv"),
        ("relu", "Relu", "relu"),
        ("nameless_out", "Exp", "nameless_out"),
        ("nameless_out_x.y", "Exp", "nameless_out"),
        ("conv2", "Conv", None),
        ("_", "Conv", None),
    ],
)
def test_names_are_those_of_the_file(theirs: str, op: str, ours: str | None, tmp_path: Path) -> None:
    graph = qdq.Graph()
    y = graph.add("Relu", "relu", graph.conv("x", "conv", qdq.SHAPE[0], False))
    graph.nodes.append(onnx.helper.make_node("Exp", [y], ["nameless_out"]))
    graph.add("Neg", "last", "nameless_out")
    assert Names(graph.save(tmp_path / "m.onnx")).find(theirs, op) == ours


def test_left_integers_leaves_out_conversions() -> None:
    slow, fast = Operator("a", "Exp", False, 1.0), Operator("b", "Exp", False, 3.0)
    others = Operator("c", "QLinearConv", True, 9.0), Operator("d", "Cast", False, 9.0, True)
    assert left_integers((slow, *others, fast)) == [fast, slow]
