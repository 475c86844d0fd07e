"""ONNX halves: weights that 16 bits hold exactly are 16-bit floats in the file, and a Cast widens them.

weight float32 -> Cast(weight float16)      float16 if that holds each number, else bfloat16
A runtime computes the same numbers: it widens them once, when it loads the file. Small arrays stay: a Cast
takes about as many bytes as is saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tersor.runtimes.onnx_graphs import add_before, constant, initializer

LEAST = 128  # numbers in an array
INSIDE = "net."  # a deployed model's own names begin so
SMALL = f"fewer than {LEAST} numbers"
FOLDED = "a batch norm goes into it when the file is written: put fold before quantize"
# They read scales, which runtimes and accelerators take as constants alone.
OF_CODES = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "GatherBlockQuantized")
NARROW = (np.float16, ml_dtypes.bfloat16)


def halve(model: ir.Model, wanted: Iterable[str]) -> dict[str, str]:
    """Store each such float32 array of a model in 16 bits. For each of the weights `wanted` why it stays
    in 32 bits; "" if it does not."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        array = constant(value)
        short = None if array is None or value in graph.outputs else narrowed(array)
        if short is None or any(use.node.op_type in OF_CODES for use in value.uses()):
            continue
        stored = initializer(graph, f"{name}_half", short)
        wide = add_before(graph, graph[0], "Cast", [stored], to=int(ir.DataType.FLOAT))
        wide.shape, wide.type = value.shape, value.type
        value.replace_all_uses_with(wide)
        del graph.initializers[name]
    # The exporter keeps the name of a weight that it multiplies, and gives new ones to those that it turns.
    arrays = {name: constant(graph.initializers.get(f"{INSIDE}{name}")) for name in wanted}
    return {name: "" if a is None else FOLDED if a.size >= LEAST else SMALL for name, a in arrays.items()}


def narrowed(array: np.ndarray) -> np.ndarray | None:
    """The array in 16 bits if it is float32, is large, and loses nothing."""
    if array.dtype != np.float32 or array.size < LEAST:
        return None
    with np.errstate(over="ignore"):
        for kind in NARROW:
            short = array.astype(kind)
            if np.array_equal(short.astype(np.float32), array):
                return short
    return None
