"""ONNX, recurrent: LSTMs whose matrices are integers, by ONNX Runtime's DynamicQuantizeLSTM (com.microsoft).

One operator for each layer and direction. It rounds x and h to uint8, takes W and R as int8 [1, I, 4 H] with
a scale for the tensor [1] or for each column [1, 4 H], and computes the gates in float. Gates: i o f c in the
file, i f c o in torch.
Between export and `integers` an LSTM reads torch's own decoded matrices [4 H, I], which no runtime would
load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

from tersor.errors import RefusedError
from tersor.runtimes.onnx_graphs import attribute, constant, given, initializer, made_by, weight_of

DOMAIN = "com.microsoft"
ORDER = (0, 3, 1, 2)  # of torch's gates in the file


def lstm(  # noqa: PLR0917  an operator has no keywords
    x: Any, h: Any, c: Any, params: Sequence[Any], biased: bool, layers: int, both: bool, batch_first: bool
) -> Any:
    """tersor::dynamic_lstm in ONNX, for `integers`."""
    ways, each = 1 + both, 4 if biased else 2
    hidden, hs, cs = int(h.shape[-1]), [], []
    x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            at = layer * ways + way
            w, r, *biases = params[at * each : (at + 1) * each]
            bias = op.Concat(*biases, axis=0) if biases else None
            state = [op.Slice(item, *map(whole, (at, at + 1, 0))) for item in (h, c)]
            direction = "reverse" if way else "forward"
            y, *last = op.LSTM(x, w, r, bias, None, *state, hidden_size=hidden, direction=direction)
            outputs.append(op.Squeeze(y, whole(1)))
            hs.append(last[0])
            cs.append(last[1])
        x = op.Concat(*outputs, axis=-1) if both else outputs[0]
    y = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    return y, op.Concat(*hs, axis=0), op.Concat(*cs, axis=0)


def whole(number: int) -> Any:
    return op.Constant(value_ints=[number])


def integers(graph: ir.Graph, node: ir.Node) -> None:
    """An LSTM that reads torch's matrices, from their codes. RefusedError if these are no codes any more."""
    if node.op_type != "LSTM" or node.domain or not own(given(node, 1)):
        return
    hidden = attribute(node, "hidden_size", 0)
    grids: list[ir.Value] = []
    codes: list[ir.Value] = []
    for value in (given(node, 1), given(node, 2)):
        weight = weight_of(value)
        if weight is None or (weight[2].size > 1 and attribute(weight[0], "axis", 1) % 2):
            raise RefusedError(
                f"onnxruntime: {value.name}: its LSTM is to compute with integers, and later steps left this "
                f"weight without int8 codes. Undo them, or leave the LSTM's weights out of them"
            )
        before, array, scale = weight
        name = str(given(before, 0).name)
        turned = np.ascontiguousarray(gates(array, 0).T)[None]  # [1, I, 4 H]
        scale = gates(scale, 0)[None] if scale.size > 1 else scale.reshape(1)
        codes.append(named(graph, f"{name}_lstm", turned))
        grids.append(named(graph, f"{name}_scales", scale))
        grids.append(named(graph, f"{name}_zeros", np.zeros(scale.shape, np.int8)))
    bias = bias_of(graph, node.inputs[3])
    inputs = [given(node, 0), *codes, bias, None, *node.inputs[5:7], None, *grids]
    settings = {"hidden_size": hidden, "direction": attribute(node, "direction", "forward")}
    made = ir.node(
        "DynamicQuantizeLSTM", inputs, domain=DOMAIN, attributes=settings, num_outputs=len(node.outputs)
    )
    graph.insert_before(node, made)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def own(matrix: ir.Value) -> bool:
    """Whether a matrix is as torch has it; ONNX's have an axis of directions."""
    return matrix.shape is not None and len(matrix.shape) == 2


def bias_of(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    """Both biases [1, 8 H]."""
    if value is None:
        return None
    whole = constant(value)
    if whole is None:  # too large for the exporter to compute
        joined = made_by(value, "Concat")
        parts = [constant(item) for item in joined.inputs] if joined is not None else []
        whole = np.concatenate([part for part in parts if part is not None])
    both = np.concatenate([gates(part, 0) for part in np.split(whole, 2)])
    return named(graph, f"{value.name}_lstm", both[None])


def gates(array: np.ndarray, axis: int) -> np.ndarray:
    """Torch's gates in the order of the file."""
    parts = np.split(array, 4, axis)
    return np.concatenate([parts[at] for at in ORDER], axis)


def named(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant that all calls of a layer share."""
    made = graph.initializers.get(name)
    return initializer(graph, name, array) if made is None else made
