"""ONNX graphs: what writers ask of a graph's values, and how they put operators in.

A value is decoded if its numbers are those that a DequantizeLinear gives, perhaps in another shape or order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import onnx_ir as ir

# Operators whose outputs are some of their inputs' numbers.
MOVES = (
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Identity",
    "MaxPool",
    "Gather",
)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant, None for anything else."""
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if found is None else found.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    name = next(other for other in names(name) if other not in graph.initializers)
    made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    made.shape, made.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(made)
    return made


def names(name: str) -> Iterator[str]:
    yield name
    at = 1
    while True:
        yield f"{name}_{at}"
        at += 1


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def given(node: ir.Node, at: int) -> ir.Value:
    """An input that this kind of operator always has."""
    return cast(ir.Value, node.inputs[at])


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def add_before(
    graph: ir.Graph, node: ir.Node, kind: str, inputs: list[ir.Value], **settings: Any
) -> ir.Value:
    """The output of a new operator that runs before `node`."""
    made = ir.node(kind, inputs, attributes=settings)
    graph.insert_before(node, made)
    return made.outputs[0]


def replaced(node: ir.Node, found: ir.Value) -> None:
    """Let all that reads this operator's output read another value."""
    old = node.outputs[0]
    found.shape, found.type = old.shape, old.type
    old.replace_all_uses_with(found, replace_graph_outputs=True)


def weight_of(value: ir.Value | None) -> tuple[ir.Node, np.ndarray, np.ndarray] | None:
    """(DequantizeLinear, codes, scale) of an integer weight."""
    node = made_by(value, "DequantizeLinear")
    codes = None if node is None else constant(node.inputs[0])
    scale = None if node is None else constant(node.inputs[1])
    return None if node is None or codes is None or scale is None else (node, codes, scale)


def decoded(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear whose numbers a value has, perhaps in another shape or order."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVES:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    one, two = constant(a), constant(b)
    return a is b or (
        one is not None and two is not None and np.array_equal(one, two) and one.dtype == two.dtype
    )


def unused(graph: ir.Graph) -> None:
    """Remove operators and weights that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]
