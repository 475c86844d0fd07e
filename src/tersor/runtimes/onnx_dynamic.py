"""ONNX, dynamic: products whose activations get their range when the file runs.

DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scale of x * scales of w) (-> Add)
ONNX Runtime replaces it by DynamicQuantizeMatMul, or where several products read one tensor by
DynamicQuantizeLinear and MatMulIntegerToFloat. The latter needs a vector of scales. Codes of activations are
uint8, of weights int8.
Source: ONNX Runtime's DynamicQuantizeMatMulFusion and MatMulIntegerToFloatFusion.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

from tersor.runtimes.onnx_graphs import (
    add_before,
    attribute,
    given,
    initializer,
    made_by,
    replaced,
    weight_of,
)


def grid(x: Any) -> Any:
    """tersor::dynamic_grid in ONNX."""
    codes, scale, zero = op.DynamicQuantizeLinear(x)
    return op.DequantizeLinear(codes, scale, zero)


def product(graph: ir.Graph, node: ir.Node) -> None:
    """A product of a dynamic grid's values and an integer weight, from their codes."""
    if node.op_type not in ("Gemm", "MatMul"):
        return
    decodes = made_by(node.inputs[0], "DequantizeLinear")
    rounds = None if decodes is None else made_by(decodes.inputs[0], "DynamicQuantizeLinear")
    weight = weight_of(node.inputs[1])
    if rounds is None or weight is None or weight[1].ndim != 2 or not plain(node):
        return
    before, codes, scale = weight
    stored = given(before, 0)
    turned = attribute(node, "transB", 0) == 1
    if scale.ndim and (attribute(before, "axis", 1) % 2 == 0) != turned:
        return  # a scale for each input would have to be in the sum
    name = str(stored.name)
    if turned:
        stored = initializer(graph, f"{name}_turned", np.ascontiguousarray(codes.T))
    scales = given(before, 1)
    if not scale.ndim:
        outputs = codes.shape[0 if turned else 1]
        scales = initializer(graph, f"{name}_scales", np.full(outputs, scale, np.float32))
    codes_of, step, zero = rounds.outputs
    sums = add_before(graph, node, "MatMulInteger", [codes_of, stored, zero])
    floats = add_before(graph, node, "Cast", [sums], to=int(ir.DataType.FLOAT))
    unit = add_before(graph, node, "Mul", [step, scales])
    found = add_before(graph, node, "Mul", [floats, unit])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        found = add_before(graph, node, "Add", [found, given(node, 2)])
    replaced(node, found)


def plain(node: ir.Node) -> bool:
    """Whether it is x @ w + b, without factors."""
    return not attribute(node, "transA", 0) and all(
        attribute(node, word, 1.0) == 1.0 for word in ("alpha", "beta")
    )
