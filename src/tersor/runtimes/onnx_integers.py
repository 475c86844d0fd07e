"""ONNX integers: grids and integer weights as QuantizeLinear and DequantizeLinear, for integer kernels.

Runtimes replace DequantizeLinear -> operator -> QuantizeLinear by one integer kernel if the pattern is
exactly theirs. Each function here changes one thing that would hide it, and none changes what the file
computes:

clip       a clamp before QuantizeLinear goes where a grid of 8 bits clips alike
pool       ReduceMean over height and width is GlobalAveragePool
turned     a transposed integer weight is stored transposed
zeros      weights of Gemm and MatMul have zero points, all 0: without them ONNX Runtime computes in float
parted     what Split, Pad and others make of decoded codes has a pair of its own. Of signed codes views too:
           ONNX Runtime would put in these pairs itself, with a type that it then refuses
shared     equal grids and factors of one value are one
bias       biases become int32, in units of input scale * weight scale, as accumulators are
embedded   of an integer embedding only the rows that are read are decoded
Then what computes in float is kept so: onnx_floats.py.
Source: the quantized patterns of ONNX Runtime's and OpenVINO's optimizers, found by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from tersor.runtimes import onnx_dynamic, onnx_floats, onnx_recurrent
from tersor.runtimes.onnx_graphs import (
    add_before,
    attribute,
    constant,
    decoded,
    equal,
    given,
    initializer,
    made_by,
    replaced,
    unused,
    weight_of,
)

# Operators that take or join such numbers, across which a runtime does not see the grid by itself.
PARTS = ("Split", "Slice", "Gather", "Pad", "Concat", "Expand", "Tile", "DepthToSpace", "SpaceToDepth")
VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
OPSET = 21  # of ONNX: the first with 16-bit codes
INT32 = 2**31 - 1
FEW = 24  # scales, in bytes about as long as the operator that computes them


def grid(  # noqa: PLR0917  an operator has no keywords
    x: Any, scale: Any, zero: Any, bits: int, signed: bool, axis: int
) -> Any:
    if bits > 8:  # torch computes with few of the 16-bit types
        zero = op.Cast(zero, to=int(ir.DataType.INT16 if signed else ir.DataType.UINT16))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero, axis=axis), scale, zero, axis=axis)


def dequantize(codes: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(codes, scale, axis=axis)


def dequantize_blocks(codes: Any, scale: Any, zero: Any, block: int) -> Any:
    return op.DequantizeLinear(codes, scale, zero, axis=1, block_size=block)


def table() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx.export: our operators in ONNX."""
    ours = torch.ops.tersor
    return {
        ours.grid.default: grid, ours.dequantize.default: dequantize,
        ours.dequantize_blocks.default: dequantize_blocks, ours.dynamic_grid.default: onnx_dynamic.grid,
        ours.dynamic_lstm.default: onnx_recurrent.lstm,
    }  # fmt: skip


def tidy(model: ir.Model, openvino: bool = False) -> None:
    """Bring the Q/DQ pairs of a model into the form that runtimes replace. `openvino`: it must clip too."""
    graph = model.graph
    changes = (
        scalar,
        clip,
        pool,
        turned,
        embedded,
        parted,
        onnx_dynamic.product,
        onnx_recurrent.integers,
        bias,
        zeros,
        shared,
        onnx_floats.floated,
        onnx_floats.apart,
        *((onnx_floats.ended,) if openvino else ()),
    )
    for change in changes:
        for node in list(graph):
            if node.graph is graph:
                change(graph, node)
    unused(graph)
    if any(node.domain == onnx_recurrent.DOMAIN for node in graph):
        model.opset_imports.setdefault(onnx_recurrent.DOMAIN, 1)


def scalar(graph: ir.Graph, node: ir.Node) -> None:
    """One scale for a tensor is a scalar: of a vector some patterns assume an axis."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    for at in (1, 2):
        value = node.inputs[at] if at < len(node.inputs) else None
        array = constant(value)
        if value is None or array is None or array.shape != (1,):
            continue
        name = f"{value.name}_scalar"
        made = graph.initializers.get(name)
        node.replace_input_with(at, initializer(graph, name, array.reshape(())) if made is None else made)
    if constant(node.inputs[1]) is not None and constant(node.inputs[1]).ndim == 0:  # type: ignore[union-attr]
        node.attributes.pop("axis", None)


def clip(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type != "QuantizeLinear":
        return
    while (before := made_by(node.inputs[0], "Relu") or made_by(node.inputs[0], "Clip")) is not None:
        if len(before.outputs[0].uses()) > 1 or before.outputs[0].is_graph_output():
            return
        low, high = limits_of(before)
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        if scale is None or zero is None or scale.ndim or low is None or high is None:
            return
        codes = np.iinfo(zero.dtype)
        if codes.bits > 8:  # no kernel waits for the pattern, and OpenVINO's such pairs do not clip
            return
        with np.errstate(over="ignore"):
            first, last = (float(np.rint(np.float32(end) / scale)) + float(zero) for end in (low, high))
        if first > codes.min or last < codes.max:
            return
        node.replace_input_with(0, before.inputs[0])


def limits_of(node: ir.Node) -> tuple[float | None, float | None]:
    """The ends of a Relu or Clip; None where they are not constants."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends: list[float | None] = []
    for at, open_end in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[at] if at < len(node.inputs) else None
        array = constant(value)
        ends.append(open_end if value is None else None if array is None else float(array.reshape(())))
    return ends[0], ends[1]


def pool(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type != "ReduceMean" or decoded(node.inputs[0]) is None:
        return
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = given(node, 0).shape
    if axes is None or shape is None or len(shape) < 3:
        return
    if sorted(int(at) % len(shape) for at in axes) == list(range(2, len(shape))):
        found = add_before(graph, node, "GlobalAveragePool", [given(node, 0)])
        if attribute(node, "keepdims", 1) != 1:
            made = initializer(graph, f"{found.name}_axes", np.arange(2, len(shape)))
            found = add_before(graph, node, "Squeeze", [found, made])
        replaced(node, found)


def turned(graph: ir.Graph, node: ir.Node) -> None:
    weight = weight_of(node.inputs[0]) if node.op_type == "Transpose" else None
    if weight is None:
        return
    before, codes, scale = weight
    order = list(attribute(node, "perm", range(codes.ndim)[::-1]))
    name = str(given(before, 0).name)
    stored = initializer(graph, f"{name}_turned", np.ascontiguousarray(codes.transpose(order)))
    settings = {"axis": order.index(attribute(before, "axis", 1) % codes.ndim)} if scale.ndim else {}
    replaced(node, add_before(graph, node, "DequantizeLinear", [stored, given(before, 1)], **settings))


def embedded(graph: ir.Graph, node: ir.Node) -> None:
    weight = weight_of(node.inputs[0]) if node.op_type == "Gather" else None
    if weight is None or attribute(node, "axis", 0) != 0:
        return
    before, codes, scale = weight
    if scale.ndim and (attribute(before, "axis", 1) % codes.ndim or codes.ndim != 2):
        return
    rows = add_before(graph, node, "Gather", [given(before, 0), given(node, 1)], axis=0)
    values = add_before(graph, node, "Cast", [rows], to=int(ir.DataType.FLOAT))
    factor = given(before, 1)
    if scale.ndim:
        column = initializer(graph, f"{factor.name}_column", scale.reshape(-1, 1))
        factor = add_before(graph, node, "Gather", [column, given(node, 1)], axis=0)
    replaced(node, add_before(graph, node, "Mul", [values, factor]))


def bias(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    floats, weight = constant(node.inputs[2]), weight_of(node.inputs[1])
    reads = decoded(node.inputs[0])
    scale = None if reads is None else constant(reads.inputs[1])
    if reads is None or floats is None or weight is None or scale is None or scale.ndim or floats.ndim != 1:
        return
    if any(attribute(node, word, 1.0) != 1.0 for word in ("alpha", "beta")):
        return
    units = (scale.astype(np.float32) * weight[2].astype(np.float32)).astype(np.float32)  # [] or [O]
    if units.ndim and units.shape != floats.shape:
        return
    codes = np.rint(floats.astype(np.float64) / units)
    if np.abs(codes).max(initial=0) > INT32:
        return
    name = str(given(node, 2).name)
    stored = initializer(graph, f"{name}_codes", codes.astype(np.int32))
    if units.size > FEW:  # a runtime multiplies once, when it loads the file
        unit = add_before(graph, node, "Mul", [given(weight[0], 1), given(reads, 1)])
    else:
        unit = initializer(graph, f"{name}_unit", units)
    settings = {"axis": 0} if units.ndim else {}
    node.replace_input_with(2, add_before(graph, node, "DequantizeLinear", [stored, unit], **settings))


def zeros(graph: ir.Graph, node: ir.Node) -> None:
    weight = weight_of(node.inputs[1]) if node.op_type in ("Gemm", "MatMul") else None
    if weight is None or len(weight[0].inputs) > 2:
        return
    before, codes, scale = weight
    name = f"zeros_{'x'.join(map(str, scale.shape)) or 'scalar'}"
    points = graph.initializers.get(name) or initializer(graph, name, np.zeros(scale.shape, codes.dtype))
    before.resize_inputs(3)
    before.replace_input_with(2, points)


def parted(graph: ir.Graph, node: ir.Node) -> None:
    """A pair after an operator that takes or joins decoded codes, which changes no value."""
    pair = kept_grid(node)
    if pair is None:
        return
    for out in node.outputs:
        uses = list(out.uses())
        if not uses or out.is_graph_output() or all(use.node.op_type == "QuantizeLinear" for use in uses):
            continue
        codes = ir.node("QuantizeLinear", [out, *pair])
        floats = ir.node("DequantizeLinear", [codes.outputs[0], *pair])
        graph.insert_after(node, [codes, floats])
        floats.outputs[0].shape, floats.outputs[0].type = out.shape, out.type
        for use in uses:
            use.node.replace_input_with(use.idx, floats.outputs[0])


def kept_grid(node: ir.Node) -> list[ir.Value] | None:
    """(scale, zero point) of the grid that all values of an operator of PARTS are on, those of an edge."""
    if node.op_type not in (*PARTS, *VIEWS) or (node.op_type == "Pad" and not pads_with_zero(node)):
        return None
    found: list[ir.Value] = []
    for value in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
        before = decoded(value)
        if before is None or constant(before.inputs[0]) is not None or len(before.inputs) < 3:
            return None
        pair = [given(before, 1), given(before, 2)]
        scale = constant(pair[0])
        if scale is None or scale.ndim or (found and not all(map(equal, pair, found))):
            return None
        if node.op_type in VIEWS and pair[1].dtype != ir.DataType.INT8:
            return None
        found = found or pair
    return found or None


def pads_with_zero(node: ir.Node) -> bool:
    """Whether what a Pad adds is on every grid: 0, or values that it has read."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    added = constant(value)
    return (
        value is None
        or attribute(node, "mode", "constant") != "constant"
        or (added is not None and not added.any())
    )


def shared(graph: ir.Graph, node: ir.Node) -> None:
    """Let readers of one value with equal grids, or equal factors, read one operator."""
    kinds = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Mul")
    if node.op_type not in kinds or node.inputs[0] is None:
        return
    for use in list(given(node, 0).uses()):
        other = use.node
        if other is node or other.op_type != node.op_type or other.graph is not graph:
            continue
        same = len(node.inputs) == len(other.inputs) and node.attributes == other.attributes
        if same and all(equal(a, b) for a, b in zip(node.inputs, other.inputs, strict=True)):
            for theirs, ours in zip(other.outputs, node.outputs, strict=True):
                theirs.replace_all_uses_with(ours, replace_graph_outputs=True)
