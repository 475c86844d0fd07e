"""ONNX zeros: take out additions of zeros, which stand where a residual branch was removed.

Add(x, Expand(0, shape)) -> x        if the sum has the shape of x
Constant folding leaves them in, because the batch size is not known when the file is written.
"""

from __future__ import annotations

import onnx_ir as ir

from tersor.runtimes.onnx_graphs import constant, given, unused

SPREAD = ("Expand", "ConstantOfShape")


def without_sums_of_zeros(model: ir.Model) -> int:
    """Take out additions of zeros, and what made the zeros; the number of additions."""
    graph, count = model.graph, 0
    outputs = set(graph.outputs)
    for node in list(graph):
        if node.op_type != "Add" or node.domain or node.outputs[0] in outputs:
            continue
        for zeros, rest in ((1, 0), (0, 1)):
            other = given(node, rest)
            if all_zero(given(node, zeros)) and same_shape(other, node.outputs[0]):
                node.outputs[0].replace_all_uses_with(other)
                count += 1
                break
    if count:
        unused(graph)
    return count


def all_zero(value: ir.Value) -> bool:
    """Whether these are zeros for every input."""
    node = value.producer()
    if node is None or node.op_type not in SPREAD or node.domain:
        return False
    if node.op_type == "Expand":
        array = constant(node.inputs[0])
        return array is not None and not array.any()
    filled = node.attributes.get("value")  # left out: a zero
    return filled is None or not filled.as_tensor().numpy().any()


def same_shape(x: ir.Value, y: ir.Value) -> bool:
    """Whether both have the same shape, each size a number or a name."""
    if x.shape is None or y.shape is None or len(x.shape) != len(y.shape):
        return False
    pairs = zip(x.shape, y.shape, strict=True)
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in pairs)
