"""ONNX floats: what computes in float beside grids stays as exact as in the simulation, in any runtime.

floated    a weight that float operators read is decoded by Cast and Mul, once, when a runtime loads the file
apart      a Gemm of floats that reads decoded codes is a MatMul: ONNX Runtime would put its weight on a grid
ended      for OpenVINO, which leaves out pairs of 16-bit codes, a Clip at the ends of such a grid
Source: the quantized patterns of ONNX Runtime's and OpenVINO's optimizers, found by trying.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tersor.runtimes.onnx_graphs import (
    add_before,
    attribute,
    constant,
    decoded,
    given,
    initializer,
    replaced,
    weight_of,
)

SIXTEEN = (ir.DataType.UINT16, ir.DataType.INT16)


def floated(graph: ir.Graph, node: ir.Node) -> None:
    weight = weight_of(node.outputs[0]) if node.op_type == "DequantizeLinear" else None
    if (
        weight is None
        or weight[1].ndim < 2
        or any(integer(use.node, use.idx) for use in node.outputs[0].uses())
    ):
        return
    _, codes, scale = weight
    factor = given(node, 1)
    if scale.ndim:
        axis = attribute(node, "axis", 1) % codes.ndim
        shape = [-1 if at == axis else 1 for at in range(codes.ndim)]
        factor = initializer(graph, f"{factor.name}_column", scale.reshape(shape))
    values = add_before(graph, node, "Cast", [given(node, 0)], to=int(ir.DataType.FLOAT))
    replaced(node, add_before(graph, node, "Mul", [values, factor]))


def integer(node: ir.Node, at: int) -> bool:
    """Whether an operator that reads a weight at this place may compute with integers."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return False
    before = decoded(node.inputs[1 - at] if at < 2 else None)
    if before is None:
        return False
    zero = before.inputs[2] if len(before.inputs) > 2 else None
    # Else ONNX Runtime makes MatMulNBits of it, and rounds what it reads to 8 bits.
    return node.op_type not in ("MatMul", "Gemm") or zero is None or zero.dtype not in SIXTEEN


def apart(graph: ir.Graph, node: ir.Node) -> None:
    """Between two grids ONNX Runtime rounds the weight of a Gemm to 8 bits with one scale."""
    if node.op_type != "Gemm" or decoded(node.inputs[0]) is None or decoded(node.inputs[1]) is not None:
        return
    biased = len(node.inputs) > 2 and node.inputs[2] is not None
    if biased or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "transA", 0):
        return
    turned = attribute(node, "transB", 0)
    weight = add_before(graph, node, "Transpose", [given(node, 1)], perm=[1, 0]) if turned else given(node, 1)
    replaced(node, add_before(graph, node, "MatMul", [given(node, 0), weight]))


def ended(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type != "QuantizeLinear":
        return
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    if scale is None or zero is None or scale.ndim or np.iinfo(zero.dtype).bits <= 8:
        return
    codes = np.iinfo(zero.dtype)
    ends = [(float(code) - float(zero)) * float(scale) for code in (codes.min, codes.max)]
    name = given(node, 0).name
    limits = [initializer(graph, f"{name}_end", np.array(end, np.float32)) for end in ends]
    inside = add_before(graph, node, "Clip", [given(node, 0), *limits])
    inside.shape, inside.type = given(node, 0).shape, given(node, 0).type
    node.replace_input_with(0, inside)
