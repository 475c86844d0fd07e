"""Graph: one trace of a model's forward, the source for everything that depends on how tensors are used.

torch.export, neither strict nor decomposed: the ATen operators in order, each with the module that ran it and
the shapes of its outputs. In eval mode, for the shapes of one example; nothing is computed.
Cost: some milliseconds and some kB an operator, a second for a ResNet-50.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tersor.errors import RefusedError, first_line
from tersor.model.batches import evaluating, steady
from tersor.model.ops import OPS
from tersor.model.output_comparison import tensors_of
from tersor.model.watch import holds_tensors

Inputs = tuple[Any, ...] | dict[str, Any]  # a model's arguments: in order, or by name


class UntraceableError(RefusedError):
    """A model that torch.export cannot trace."""


@dataclass(frozen=True, eq=False)
class Graph:
    """The operators of one forward, and the model's tensors that they read."""

    program: ExportedProgram
    paths: Mapping[str, str]  # every name of a module -> its first
    tensors: Mapping[fx.Node, str]  # placeholders of parameters and buffers -> the first of their names
    bare: frozenset[str] = frozenset()  # modules without tensors, by their first names

    @property
    def nodes(self) -> list[fx.Node]:
        """The operators, in the order in which they run."""
        return [node for node in self.program.graph.nodes if node.op == "call_function"]

    @cached_property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the model's arguments, in order."""
        names = set(self.program.graph_signature.user_inputs)
        return [node for node in placeholders(self.program.graph) if node.name in names]

    @property
    def output(self) -> fx.Node:
        return next(node for node in self.program.graph.nodes if node.op == "output")

    def feed(self, tensors: Mapping[str, Tensor], leaves: Iterable[Any]) -> dict[fx.Node, Any]:
        """The values of the placeholders, in order, from the model's tensors by the first of their names and
        the leaves of its arguments."""
        signature, rest = self.program.graph_signature, iter(leaves)
        constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_lifted_custom_objs}
        return {
            node: tensors[self.tensors[node]] if node in self.tensors
            else self.program.constants[constants[node.name]] if node.name in constants else next(rest)
            for node in placeholders(self.program.graph)
        }  # fmt: skip

    def path(self, node: fx.Node) -> str:
        """The module whose forward calls this operator, by its first name; "" for the model itself."""
        stack = node.meta.get("nn_module_stack") or {}
        return self.first_name(list(stack.values())[-1][0]) if stack else self.paths[""]

    def first_name(self, path: str) -> str:
        """The first name of a module on the trace's stack."""
        return self.paths[own_name(path.partition("@")[0])]

    def call(self, node: fx.Node) -> tuple[tuple[str, str], ...]:
        """The call in which edges are counted: of the innermost module with tensors."""
        stack = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]
        while stack and self.first_name(stack[-1][1]) in self.bare:
            stack.pop()
        return tuple(stack)

    @cached_property
    def made(self) -> dict[tuple[fx.Node, int | None], str]:
        """The edge name of watch.py, `path/op:k`, of each output of each operator that makes edges; the index
        is None if the operator has only one output. Calls of a shared module make edges of the same name."""
        counts: dict[Any, int] = {}
        found: dict[tuple[fx.Node, int | None], str] = {}
        for node in self.nodes:
            op, outputs = OPS.get(op_name(node)), values(node)
            if op is None or not any(map(floating, outputs)):
                continue
            made, call = f"{self.path(node)}/{op}", self.call(node)
            k = counts[call, made] = counts.get((call, made), -1) + 1
            several = isinstance(value(node), (tuple, list))
            for j, output in enumerate(outputs):
                if floating(output):
                    found[node, j if several else None] = f"{made}:{k}.{j}" if several else f"{made}:{k}"
        return found

    @cached_property
    def parts(self) -> dict[tuple[fx.Node, int | None], fx.Node]:
        """Of operators with several edges, such as recurrent layers: the first node that takes each."""
        found: dict[tuple[fx.Node, int | None], fx.Node] = {}
        for node in self.nodes:
            if op_name(node) == "getitem" and (made := (node.args[0], node.args[1])) in self.made:
                found.setdefault(made, node)
        return found

    @cached_property
    def edges(self) -> dict[str, tuple[fx.Node, int | None]]:
        """For each edge name the operator that first makes the edge, and the index of the output."""
        found: dict[str, tuple[fx.Node, int | None]] = {}
        for made, name in self.made.items():
            found.setdefault(name, made)
        return found

    @cached_property
    def constant(self) -> frozenset[fx.Node]:
        """The operators whose outputs do not depend on any argument of the model."""
        reached, memory = set(self.inputs), set(self.inputs)
        for node in self.nodes:  # an in-place write also reaches the memory that its target is a view of
            if any(used in reached or viewed_of(used) in memory for used in node.all_input_nodes):
                reached.add(node)
                memory |= {viewed_of(target) for target in written(node)}
        return frozenset(node for node in self.nodes if node not in reached)

    @cached_property
    def live(self) -> frozenset[fx.Node]:
        """What outputs depend on."""
        found = {self.output}
        for node in reversed(list(self.program.graph.nodes)):
            if node in found or written(node):  # a written tensor may be read through another node
                found |= {node, *node.all_input_nodes}
        return frozenset(found)

    @cached_property
    def unread(self) -> frozenset[str]:
        """Parameters and buffers that no output depends on."""
        return frozenset(
            set(self.tensors.values()) - {self.tensors[n] for n in self.live if n in self.tensors}
        )


def traced(model: nn.Module, inputs: Inputs, *, training: bool = False) -> Graph:
    """The graph of `model(*inputs)`, or of `model(**inputs)`, in eval mode, or in training mode. The model,
    its modes and all random state do not change. UntraceableError if the model cannot be traced."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    with evaluating(model), steady(), quiet():
        model.train(training)
        try:
            program = torch.export.export(TensorOutputs(model), args, kwargs, strict=False)
        except Exception as error:  # any class: torch.export has many of its own and runs the user's code
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UntraceableError(f"torch.export cannot trace the model: {reason}") from error
    signature, first = program.graph_signature, first_names(model)
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named = {node: own_name(names[node.name]) for node in placeholders(program.graph) if node.name in names}
    tensors = {node: first.get(name, name) for node, name in named.items()}
    once = {id(module): path for path, module in model.named_modules()}
    paths = {path: once[id(module)] for path, module in model.named_modules(remove_duplicate=False)}
    bare = frozenset(path for path, module in model.named_modules() if not holds_tensors(module))
    return Graph(program, paths, tensors, bare)


class TensorOutputs(nn.Module):
    """Wraps a model so that it returns only the tensors of its output, as a tuple. torch.export cannot return
    caches and other objects."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.model(*args, **kwargs)))


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders of a graph, in order: of the model's tensors and arguments, for that of a program."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def own_name(name: str) -> str:
    """The name in the model itself, for a name in TensorOutputs."""
    return "" if name == "model" else name.removeprefix("model.")


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    found: dict[str, str] = {}
    seen: dict[int, str] = {}
    every = (model.named_parameters, model.named_buffers)
    for name, tensor in (pair for each in every for pair in each(remove_duplicate=False)):
        found[name] = seen.setdefault(id(tensor), name)
    return found


def op_name(node: fx.Node) -> str:
    """ "conv2d" for aten.conv2d.default; a Python function's own name."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet or node.target, "__name__", node.target))


def value(node: fx.Node) -> Any:
    """The operator's output, with tensors that have shapes but no data."""
    return node.meta.get("val")


def first(node: fx.Node) -> fx.Node:
    """The operator's first argument, where that is a tensor."""
    return cast(fx.Node, node.args[0])


def values(node: fx.Node) -> list[Any]:
    output = value(node)
    return list(output) if isinstance(output, (tuple, list)) else [output]


def floating(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, in its order, defaults included. For a function without a schema the
    names are the positions: "0"."""
    schema = getattr(getattr(node.target, "_schema", None), "arguments", ())
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    names = [a.name for a in schema] or [str(at) for at in range(len(node.args))]
    given = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {name: given[name] for name in (*names, *given) if name in given}


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that this operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given, found = arguments(node), []
    for argument in schema.arguments:
        arg = given.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [n for n in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(n, fx.Node)]
    return found


def viewed_of(node: fx.Node) -> fx.Node:
    """The operator that allocated the memory of this one's output: itself, unless its output is a view."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None and op_name(node) != "getitem":
            break
        shown = schema is None or any(result.alias_info is not None for result in schema.returns)
        if not shown or not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]  # every ATen operator that returns a view takes its base as first argument
    return node


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the logs and warnings of torch.export."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failures are raised anyway
    try:
        # torch.export prints the whole graph when it fails on a data-dependent size.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
