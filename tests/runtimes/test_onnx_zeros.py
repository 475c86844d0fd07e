"""ONNX zeros: additions of zeros go where nothing changes, and stay where they give a shape or numbers."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from tersor.runtimes.onnx_zeros import without_sums_of_zeros


def model(x: list[int], number: float, spread: str, *, last: bool = False) -> onnx.ModelProto:
    """neg(x + numbers of shape [3, 4]), or without the neg."""
    shape = numpy_helper.from_array(np.array([3, 4]), "shape")
    one = numpy_helper.from_array(np.array([number], np.float32), "one")
    if spread == "Expand":
        made = helper.make_node("Expand", ["one", "shape"], ["numbers"])
    else:
        made = helper.make_node("ConstantOfShape", ["shape"], ["numbers"], value=one)
    nodes = [made, helper.make_node("Add", ["x", "numbers"], ["y" if last else "sum"])]
    nodes += [] if last else [helper.make_node("Neg", ["sum"], ["y"])]
    given, got = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x), ("y", [3, 4]))
    )
    between = [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [3, 4])]
    weights = [shape, one] if spread == "Expand" else [shape]
    graph = helper.make_graph(nodes, "g", [given], [got], weights, value_info=[] if last else between)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("spread", ["Expand", "ConstantOfShape"])
@pytest.mark.parametrize(
    ("x", "number", "last", "gone"),
    [([3, 4], 0.0, False, True), ([1, 4], 0.0, False, False), ([3, 4], 2.0, False, False),
     ([3, 4], 0.0, True, False)],
    ids=["same shape", "broadcast", "no zeros", "an output"],
)  # fmt: skip
def test_a_sum_goes_only_if_nothing_changes(
    spread: str, x: list[int], number: float, last: bool, gone: bool
) -> None:
    given = model(x, number, spread, last=last)
    changed = ir.from_proto(given)
    assert without_sums_of_zeros(changed) == gone
    after = ir.to_proto(changed)
    assert ("Add" in [node.op_type for node in after.graph.node]) != gone
    feed = {"x": np.random.default_rng(0).standard_normal(x).astype(np.float32)}
    was, now = (InferenceSession(one.SerializeToString()).run(None, feed)[0] for one in (given, after))
    assert was.shape == now.shape
    np.testing.assert_array_equal(was, now)
