"""Program builder: make a module (program.py) of what torch.export made of a model.

get_attr fc.weight -> a tensor under its name      linear(x, fc.weight, fc.bias) -> nn.Linear at fc
view(x, [s, 2, 58]) -> a call with the integers view__1_1 = 2 and view__1_2 = 58 of the module
Checks of the trace are left out: the arguments are compared with their traced sizes in their place.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Mapping
from pickle import PickleError
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from tersor.errors import RefusedError, SettingError, first_line
from tersor.model.batches import MISFIT
from tersor.model.channels.integers import SHAPING
from tersor.model.graph import arguments, first, op_name, placeholders, quiet
from tersor.model.program import Call, Constant, Held, Number, Program, Value, held
from tersor.model.program_guards import guards_of
from tersor.model.program_layers import LAYERS, dropout_of
from tersor.model.program_modes import asleep, training

CHECKS = ("_assert", "_guards", "sym_constrain")  # of the trace: no value
# Operators whose integers may follow a width; besides those of Python, for sizes that vary with the batch.
WIDTHS = (*SHAPING, "slice", "narrow", "chunk", "split", "split_with_sizes", "repeat", "repeat_interleave",
          "tile", "channel_shuffle", "layer_norm", "rms_norm", "group_norm", "conv1d", "conv2d")  # fmt: skip
NUMBERED = ("chunk", "split")  # operators whose parts get sizes of their own
STATISTICS = "num_batches_tracked"  # a batch norm has it, and no operator reads it in eval mode
ATTENTION = "scaled_dot_product_attention"
DROPOUTS = "dropouts"  # they have no tensors, so no name of their own; with _ where the model uses it
TRAINED = ("weight", "bias")
OWNED = (*TRAINED, "running_mean", "running_var")
LARGEST = 2**31  # a slice without an end has the largest integer


def is_program(model: Any) -> bool:
    """Whether this is what torch.export makes: an ExportedProgram, or the module() of one."""
    return isinstance(model, ExportedProgram) or (
        isinstance(model, fx.GraphModule) and hasattr(model, "_in_spec") and hasattr(model, "_out_spec")
    )


def program_of(source: ExportedProgram | fx.GraphModule) -> Program:
    """The program as a module with its parameters and buffers, under their names. RefusedError for a program
    of a model in training mode, and for one with parts that are graphs of their own (regions of autocast)."""
    graph = source.module() if isinstance(source, ExportedProgram) else source
    return Builder(graph, guards_of(source, graph)).built()


def program_in(path: str, noun: str) -> Program:
    """The program in a file of torch.export.save. SettingError if it cannot be read; `noun` is for it."""
    try:
        with quiet():
            found = torch.export.load(path)
    except (*MISFIT, OSError, ImportError, PickleError, BadZipFile) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SettingError(f"{noun}: {path} cannot be read as an exported program: {what}") from error
    return program_of(found)


class Builder:
    """Makes a Program of a graph module."""

    def __init__(self, source: Any, guards: tuple[str, ...]) -> None:
        self.source, self.new, self.guards = source, Program(), guards
        nodes = list(source.graph.nodes)
        named = {n: str(n.target) for n in nodes if n.op == "get_attr"}
        tensors = {n: held(source, path) for n, path in named.items()}
        self.tensors = {n: named[n] for n, value in tensors.items() if isinstance(value, Tensor)}
        used = {path.partition(".")[0] for path in source.state_dict()} | {*named.values()}
        self.dropouts = next(name for n in itertools.count() if (name := DROPOUTS + n * "_") not in used)
        called = [str(n.target) for n in nodes if n.op == "call_module" and "_guards" not in str(n.target)]
        if region := [*called, *(path for n, path in named.items() if n not in self.tensors)]:
            raise RefusedError(
                f"the program has a part that is a graph of its own ({region[0]}: a region of autocast or "
                "no_grad, or a branch). Export the model without it"
            )
        self.readers: dict[str, list[fx.Node]] = {}
        for node, path in self.tensors.items():
            self.readers.setdefault(path, []).extend(node.users)
        self.nodes = [n for n in nodes if n.op == "call_function" and not op_name(n).startswith(CHECKS)]
        self.layers: dict[fx.Node, str] = {}

    def built(self) -> Program:
        for node in self.nodes:
            if training(node):
                raise RefusedError(
                    f"the program was exported in training mode ({node.name}). Export it in eval mode: "
                    "torch.export.export(model.eval(), ...); its layers train all the same"
                )
        taken: dict[str, nn.Module] = {}
        for node in self.nodes:
            if (found := self.layer(node, taken)) is not None:
                self.layers[node], taken[found[0]] = found
        self.hold(taken)
        last, run = self.last_uses(), self.new.forward
        inputs = placeholders(self.source.graph)
        output = next(node for node in self.source.graph.nodes if node.op == "output")
        run.inputs = tuple(node.name for node in inputs)
        run.shapes = tuple(shape_of(node.meta.get("val")) for node in inputs)
        run.calls = tuple(self.call(node, tuple(last.get(node, ()))) for node in self.nodes)
        run.results = tuple(self.shown(item) for item in tree_flatten(output.args[0])[0])
        run.in_spec, run.out_spec = self.source._in_spec, self.source._out_spec
        run.__signature__ = inspect.signature(self.source.forward)
        run.guard(self.guards)
        run.asleep = tuple(node.name for node in self.nodes if node not in self.layers and asleep(node))
        return self.new.eval()

    def hold(self, layers: Mapping[str, nn.Module]) -> None:
        """Put layers and the other tensors at their names."""
        inside = tuple(f"{path}." for path in layers)
        kept = set(self.source.state_dict())
        stored: dict[Any, Tensor] = {}
        for path in dict.fromkeys(self.tensors.values()):
            above, _, name = path.rpartition(".")
            tensor: Any = held(self.source, path)
            tensor = stored.setdefault(memory(tensor), tensor)  # a file has tied tensors as two of one memory
            if path.startswith(inside):
                layer = layers[above]
                store = layer._parameters if name in layer._parameters else layer._buffers
                store[name] = tensor
                continue
            owner = container(self.new, above)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(name, tensor)
            else:
                owner.register_buffer(name, tensor, persistent=path in kept)
        for path, layer in layers.items():
            above, _, name = path.rpartition(".")
            container(self.new, above).add_module(name, layer)

    def layer(self, node: fx.Node, taken: Mapping[str, nn.Module]) -> tuple[str, nn.Module] | None:
        """(path, stock layer) for an operator that is the whole of one."""
        given = arguments(node)
        if (dropout := dropout_of(node)) is not None:
            return f"{self.dropouts}.{node.name}", dropout
        if (make := LAYERS.get(op_name(node))) is None:
            return None
        read = {k: self.tensors[i] for k, i in given.items() if isinstance(i, fx.Node) and i in self.tensors}
        paths = {path.rpartition(".")[0] for path in read.values()}
        own = all(path.rpartition(".")[2] == key for key, path in read.items())
        computed = any(isinstance(given.get(key), fx.Node) and key not in read for key in OWNED)
        if len(paths) != 1 or not own or computed or not (path := paths.pop()):
            return None
        others = {
            at for at in self.tensors.values()
            if at.startswith(f"{path}.") and at not in read.values() and at != f"{path}.{STATISTICS}"
        }  # fmt: skip
        same = all(op_name(user) == op_name(node) and alike(user, node) for at in read.values()
                   for user in self.readers[at])  # fmt: skip
        tensors = {key: held(self.source, at) for key, at in read.items()}
        # A frozen batch norm has buffers as weight and bias. As a layer it would train.
        stored = all(isinstance(t, nn.Parameter) == (key in TRAINED) for key, t in tensors.items())
        if others or not same or not stored:
            return None
        layer = taken[path] if path in taken else make(given, tensors)
        return None if layer is None else (path, layer)

    def last_uses(self) -> dict[fx.Node, list[str]]:
        """For each operator the values that nothing after it reads. Checks of the trace are no readers."""
        output = next(n for n in self.source.graph.nodes if n.op == "output")
        last = {used: node for node in (*self.nodes, output) for used in node.all_input_nodes}
        found: dict[fx.Node, list[str]] = {}
        for used, node in last.items():
            if used not in self.tensors:
                found.setdefault(node, []).append(used.name)
        return found

    def call(self, node: fx.Node, last: tuple[str, ...]) -> Call:
        if node in self.layers:
            return Call(node.name, self.layers[node], (self.shown(node.args[0]),), {}, last, layer=True)
        target: Any = node.target
        args, kwargs = node.args, dict(node.kwargs)
        if op_name(node) in NUMBERED and isinstance(node.args[0], fx.Node):
            at = int(arguments(node).get("dim") or 0)
            parts = [item.shape[at] for item in node.meta["val"]]
            if all(type(part) is int for part in parts):
                target, args, kwargs = torch.ops.aten.split_with_sizes.default, (args[0], parts, at), {}
        if op_name(node) == ATTENTION and kwargs.get("scale") is None:
            # Of the width that it was trained with: the default follows the width.
            kwargs["scale"] = first(node).meta["val"].shape[-1] ** -0.5
        sized = op_name(node).removesuffix("_") in WIDTHS or inspect.isbuiltin(target)
        name = node.name if sized and target is not operator.getitem else ""
        target = str(target) if isinstance(target, torch._ops.OpOverload) else target
        return Call(node.name, target, self.shown(args, name), self.shown(kwargs, name), last)

    def shown(self, item: Any, name: str = "", *at: Any) -> Any:
        """An argument, with names for what is known only when it runs. Its integers become attributes."""
        if isinstance(item, fx.Node):
            return Held(self.tensors[item]) if item in self.tensors else Value(item.name)
        if isinstance(item, dict):
            return {key: self.shown(each, name, *at, key) for key, each in item.items()}
        if isinstance(item, (tuple, list)):
            return (tuple if isinstance(item, tuple) else list)(
                self.shown(each, name, *at, k) for k, each in enumerate(item)
            )
        if type(item) is int and name and 1 < item < LARGEST:
            key = f"{name}__{'_'.join(map(str, at))}"
            setattr(self.new, key, item)
            return Number(key)
        return item


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two calls have the same settings."""
    mine, other = ({k: v for k, v in arguments(n).items() if not isinstance(v, fx.Node)} for n in (a, b))
    return mine == other


def memory(tensor: Tensor) -> Any:
    """What two tensors have in common if they are one parameter; itself for others."""
    if not isinstance(tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def container(module: nn.Module, path: str) -> nn.Module:
    """The module at this path, made if there is none."""
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def shape_of(value: Any) -> tuple[int | None, ...] | Constant | None:
    """The sizes of an argument in the trace, with None for those that may vary; None for an integer that may
    vary; what it was if it is no tensor."""
    if not isinstance(value, Tensor):
        return None if isinstance(value, torch.SymInt) else Constant(value)
    return tuple(n if type(n) is int else None for n in value.shape)
