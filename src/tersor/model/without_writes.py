"""Without writes: operators that write in place become those that return a new tensor.

relu_(x); f(x)     y = relu(x); f(y)
Only where nothing else shares the memory of x: no view of it, no argument of the model. Networks write
`ReLU(inplace=True)` and `y += x` to save memory. A graph without writes has gradients, and any operator can
be run again from the values before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from tersor.model.graph import op_name, value, written


def without_writes(graph: fx.Graph, places: Mapping[fx.Node, Set[int]]) -> None:
    """Replace such operators of a graph. `places`: where the memory of each operator's output is."""
    nodes = list(graph.nodes)
    held = {node: set(places.get(node, ())) for node in nodes}
    for at, node in enumerate(nodes):
        returning = returns_new(node)
        targets = written(node) if returning is not None else []
        if len(targets) != 1 or targets[0].op != "call_function" or not same_dtype(node):
            continue
        given, later = targets[0], nodes[at + 1 :]
        memory = held[given]
        if not memory or any(held[other] & memory for other in nodes[:at] if other is not given):
            continue
        node.target = returning
        for user in [user for user in later if user in given.users]:
            user.replace_input_with(given, node)
        for other in (other for other in (node, *later) if held[other] & memory):
            held[other] = {-at}  # its views are views of the new tensor


def returns_new(node: fx.Node) -> OpOverload | None:
    """relu for relu_: the operator that returns what this one writes to its argument."""
    name = op_name(node)
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), name[:-1], None)
    return getattr(packet, node.target._overloadname, None)


def same_dtype(node: fx.Node) -> bool:
    """Whether all tensors that it reads have one dtype, so that a new tensor has it too."""
    read = [value(n) for n in node.all_input_nodes]
    return all(isinstance(x, Tensor) for x in read) and len({x.dtype for x in read}) == 1
