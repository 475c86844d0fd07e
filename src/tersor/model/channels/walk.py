"""Walk: one pass over a traced graph that labels every tensor in it, operator by operator.

Parameters and buffers get fresh atoms, once for each tensor, so ties and reuse come for free. The model's
arguments and outputs, and tensors that are not in its state dict, are never cut. Where training reads more
than eval mode does (auxiliary heads), the graph in training mode is walked too: it adds relations, no labels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tersor.model.channels.atoms import Array, Atoms, Label
from tersor.model.channels.call import Call, NoRuleError, tensors
from tersor.model.channels.rules import RULES
from tersor.model.graph import Graph, arguments, op_name, placeholders, value


class Walk:
    """The labels of a graph."""

    def __init__(self, graph: Graph, stored: Collection[str], training: Graph | None = None):
        """`stored`: names of the tensors in the state dict; others cannot be cut. `training`: the graph in
        training mode, if tensors are unread in `graph`."""
        self.graph, self.atoms = graph, Atoms()
        self.trains_more = training is not None  # training reads tensors that are unread in `graph`
        self.labels: dict[fx.Node, Any] = {}  # a label, a list of labels, or None
        self.tensors: dict[str, Label] = {}  # of the model, by first name
        self.groups: dict[fx.Node, Array] = {}  # of operators with groups: the atoms of that axis
        self.unknown: dict[str, int] = {}  # operators without a rule: how many calls
        every = ([] if training is None else [training]) + [graph]
        for self.graph in every:  # the last one's labels stay
            self.labels, self.groups = {}, {}
            for node in placeholders(self.graph.program.graph):
                self.labels[node] = self.placed(node, stored)
            self.run(self.graph.program.graph)
            self.atoms.freeze_all(tensors(self.of(self.graph.output.args)), "output")
        for name in set.intersection(*(set(each.unread) for each in every)) & set(self.tensors):
            self.atoms.freeze_all([self.tensors[name]], "no output depends on it")
        self.freeze_sliced_off()

    def freeze_sliced_off(self) -> None:
        """Indices that each reader slices off, as positions after the last token: longer inputs read them."""
        read = np.zeros(self.atoms.count, bool)
        for node in self.labels:
            if op_name(node) not in ("slice", "narrow"):
                for label in tensors([self.of(used) for used in node.all_input_nodes]):
                    for array in label:
                        read[array] = True
        for label in self.tensors.values():
            for array in label:
                if read[array].any():
                    self.atoms.freeze(array[~read[array]], "it is sliced off in the example")

    def placed(self, node: fx.Node, stored: Collection[str]) -> Any:
        shape, name = sizes(value(node)), self.graph.tensors.get(node)
        if not isinstance(shape, tuple):
            return None
        if name is None or name not in stored:
            reason = "input" if node in self.graph.inputs else "not in the state dict"
            return [self.atoms.dead(reason if size != 1 else "size 1", size) for size in shape]
        if name not in self.tensors:
            self.tensors[name] = [self.atoms.fresh(size) for size in shape]
        return self.tensors[name]

    def of(self, given: Any) -> Any:
        """An argument with labels in place of nodes."""
        if isinstance(given, fx.Node):
            return self.labels.get(given)
        if isinstance(given, (tuple, list)):
            return [self.of(item) for item in given]
        return {key: self.of(item) for key, item in given.items()} if isinstance(given, Mapping) else given

    def run(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_function":
                self.atoms.here = node.name
                inner, given = inside(node, graph.owning_module)
                if inner is None:
                    self.labels[node] = self.ruled(node)
                    continue
                for place, arg in zip(placeholders(inner), given, strict=True):
                    self.labels[place] = self.of(arg)
                self.run(inner)
                self.labels[node] = self.of(next(n for n in inner.nodes if n.op == "output").args[0])

    def ruled(self, node: fx.Node) -> Any:
        name, shape = op_name(node), sizes(value(node))
        given = {key: self.of(item) for key, item in arguments(node).items()}
        if name == "getitem":
            labels, at = given["0"], given["1"]
            return (
                labels[at] if isinstance(labels, list) and isinstance(at, int) and at < len(labels) else None
            )
        if shape is None:
            return None  # a number, an assertion
        name = name if name.endswith("__") else name.removesuffix("_")
        call = Call(self.atoms, name, given, shape)
        try:
            if name not in RULES or not settled(shape):
                raise NoRuleError(name)
            found = RULES[name](call)
            if not agrees(found, shape):
                raise NoRuleError(name)
        except (NoRuleError, LookupError, TypeError, ValueError):  # an unusual call; nothing is assumed of it
            self.unknown[name] = self.unknown.get(name, 0) + 1
            reason = f"no rule for {name}"
            self.atoms.freeze_all([label for item in given.values() for label in tensors(item)], reason)
            return dead(self.atoms, shape, reason)
        if call.groups is not None:
            self.groups[node] = call.groups
        return found


def sizes(output: Any) -> Any:
    """The shape of a tensor, a list of those of several, None for anything else."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, (tuple, list)) and any(isinstance(item, Tensor) for item in output):
        return [tuple(item.shape) if isinstance(item, Tensor) else () for item in output]
    return None


def settled(shape: Any) -> bool:
    """Whether all sizes are numbers."""
    shapes = shape if isinstance(shape, list) else [shape]
    return all(isinstance(size, int) for each in shapes for size in each)


def agrees(found: Any, shape: Any) -> bool:
    """Whether a rule's labels have the sizes of the results."""
    if isinstance(shape, list):
        return isinstance(found, list) and len(found) == len(shape) and all(map(agrees, found, shape))
    return isinstance(found, list) and tuple(len(array) for array in found) == shape


def dead(atoms: Atoms, shape: Any, reason: str) -> Any:
    if isinstance(shape, list):
        return [dead(atoms, each, reason) for each in shape]
    return [atoms.dead(reason, size if isinstance(size, int) else 1) for size in shape]


def inside(node: fx.Node, owner: Any) -> tuple[fx.Graph | None, tuple[Any, ...]]:
    """The graph that a wrapper such as an autocast region runs, and its arguments."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None, ()
    for at, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            inner = getattr(owner, str(arg.target), None)
            rest = node.args[at + 1 :]
            several = any(isinstance(item, fx.Node) and item.op == "get_attr" for item in rest)
            if (
                isinstance(inner, fx.GraphModule)
                and not several
                and len(rest) == len(placeholders(inner.graph))
            ):
                return inner.graph, rest
    return None, ()
