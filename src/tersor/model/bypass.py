"""Bypass: replacements by stock modules that remove a residual branch, with its parameters and operations.

block    a module that is y = x + f(x) alone (or relu(x + f(x)) of x >= 0) becomes an identity
layers   else the modules inside f: the last ones become zeros, those before them an identity or zeros
There are several plans for a branch, the simplest first. A plan counts only if the changed model runs and
gives what the model gives with zeros on the branch's edge, which the caller tries.
Cost: one forward with hooks for all branches of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.model.branches import MATRIX, Branch
from tersor.model.changes import Replace
from tersor.model.graph import Graph, arguments, first, op_name, value
from tersor.model.zeros import first_floating

Plan = tuple[Replace, ...]
KEEPS_SIGN = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool2d", "adaptive_avg_pool2d", "dropout",
              "view", "reshape", "flatten", "permute", "transpose", "contiguous", "clone",
              "alias")  # fmt: skip
POSITIVE = ("relu", "relu6", "sigmoid", "softmax", "hardsigmoid")
CLAMPS = ("relu6", "hardtanh", "clamp")  # twice is once
SUMS = ("add", "sub", "cat", "stack")  # zero if all of their terms are


class Call(NamedTuple):
    """The only call of a module in a forward."""

    alone: bool  # with one tensor and nothing else
    like: tuple[int, ...]  # the shape of its first floating argument
    shape: tuple[int, ...]  # of its output, or of the first of several
    outputs: int  # 0 for a tensor; for a tuple of a tensor and None its length


class Bypass:
    """The modules of a model as its graph shows them."""

    def __init__(self, graph: Graph, model: nn.Module, run: Callable[[nn.Module], Any]):
        """`model`: a private copy, on which hooks are set. `run` calls it with the inputs of the graph."""
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.weights = {name for name, tensor in model.named_parameters() if tensor.ndim >= MATRIX}
        self.inside: dict[str, set[fx.Node]] = {}  # the operators that run in a module
        for node in graph.nodes:
            if node in graph.live:
                for path in stack(graph, node):
                    self.inside.setdefault(path, set()).add(node)
        self.calls = calls_of(model, run)

    def plans(self, branch: Branch) -> Iterator[Plan]:
        """The plans to try, none twice."""
        tried = set[str]()
        for plan in self.every(branch):
            if plan and str(plan) not in tried:
                tried.add(str(plan))
                yield plan

    def every(self, branch: Branch) -> Iterator[Plan]:
        if (block := self.block(branch)) is not None:
            yield (Replace(block, "identity"),)
        large = self.largest(branch.nodes, "")
        for cover in (large, [path for top in large for path in self.smallest(branch.nodes, top)]):
            for shaped in (False, True):
                ends = self.ends(branch.end, branch.nodes, cover)
                found = [p for path in cover for p in self.stubs(path, branch.nodes, ends, shaped)]
                if ends and None not in found and not self.left(branch, found):
                    yield tuple(change for change in found if change is not None)

    def why_not(self, branch: Branch) -> str:
        """Why there is no plan."""
        large = self.largest(branch.nodes, "")
        for name in branch.tensors:
            if name in self.weights and not any(name.startswith(f"{path}.") for path in large):
                return f"{name} is not read in a module that only this branch runs"
        return "no zeros can stand for what its modules return"

    # The block as a whole

    def block(self, branch: Branch) -> str | None:
        """The module that is nothing but this addition, if there is one."""
        for path in reversed(stack(self.graph, branch.adds)):
            if path and self.is_block(path, branch):
                return path
        return None

    def is_block(self, path: str, branch: Branch) -> bool:
        inside, last = self.inside[path], branch.adds
        after = {last}
        while len(users := self.users(last)) == 1 and users[0] in inside:
            if not unchanged_by(users[0], branch.stream):
                return False
            last = users[0]
            after.add(last)
        call = self.calls.get(path)
        if call is None or not call.alone or call.outputs or branch.stream in inside:
            return False
        read = [used for node in inside for used in node.all_input_nodes if used in self.graph.tensors]
        names = {self.graph.tensors[used] for used in read}
        return (
            inside <= branch.nodes | after
            and names <= set(branch.tensors)
            and self.owns(path, branch.tensors)
        )

    @staticmethod
    def owns(path: str, names: Collection[str]) -> bool:
        return all(name.startswith(f"{path}.") for name in names)

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.graph.live]

    # The layers of the branch

    def largest(self, nodes: Collection[fx.Node], above: str) -> list[str]:
        """The outermost modules below `above` with parameters that only these operators run in."""
        found: list[str] = []
        for path, module in self.modules.items():
            below = path.startswith(f"{above}.") if above else bool(path)
            if not below or any(path.startswith(f"{other}.") for other in found):
                continue
            if next(module.parameters(), None) is None:
                continue
            if path in self.inside and all(node in nodes or returns(node) for node in self.inside[path]):
                found.append(path)
        return found

    def smallest(self, nodes: Collection[fx.Node], path: str) -> list[str]:
        """The innermost ones that hold all parameters of this module."""
        below = self.largest(nodes, path)
        own = [name for name, _ in self.modules[path].named_parameters()]
        if not below or not all(any(f"{path}.{n}".startswith(f"{b}.") for b in below) for n in own):
            return [path]
        return [each for other in below for each in self.smallest(nodes, other)]

    def ends(self, node: fx.Node, nodes: Collection[fx.Node], cover: list[str]) -> set[str]:
        """The modules whose zeros make this operator's result zero; none if that cannot be said."""
        if node not in nodes:
            return set()
        mine = [path for path in stack(self.graph, node) if path in cover]
        if mine:
            return {mine[0]}
        found = [
            self.ends(used, nodes, cover) for used in node.all_input_nodes if used not in self.graph.tensors
        ]
        if op_name(node).removesuffix("_") in SUMS:
            return set[str]().union(*found) if all(found) else set()
        return next((each for each in found if each), set())

    def stubs(
        self, path: str, nodes: Collection[fx.Node], ends: set[str], shaped: bool
    ) -> Iterator[Replace | None]:
        """What stands for a module, or for those in it. `shaped`: each has the shape that the module had."""
        call = self.calls.get(path)
        if call is not None and not shaped and path not in ends and call.alone and not call.outputs:
            yield Replace(path, "identity")
            return
        found = None if call is None else zeros_for(path, call, shaped)
        below = self.largest(nodes, path) if found is None else []
        if below and path not in ends:
            for other in below:
                yield from self.stubs(other, nodes, ends, shaped)
        else:
            yield found

    def left(self, branch: Branch, plan: list[Replace | None]) -> list[str]:
        """The weights of a branch that a plan would leave in the file."""
        paths = tuple(f"{change.module}." for change in plan if change is not None)
        return [name for name in branch.tensors if name in self.weights and not name.startswith(paths)]


def zeros_for(path: str, call: Call, shaped: bool) -> Replace | None:
    """The zeros in place of a module's output; None if their shape does not follow from its argument's."""
    settings = {"outputs": call.outputs} if call.outputs else {}
    if call.shape == call.like or not shaped:
        return Replace(path, "zeros", settings)
    if len(call.shape) != len(call.like):
        return None
    other = [axis for axis, (a, b) in enumerate(zip(call.like, call.shape, strict=True)) if a != b]
    if len(other) != 1 or not other[0]:
        return None
    axis = -1 if other[0] == len(call.shape) - 1 else other[0]  # tokens may have more axes before the last
    return Replace(path, "zeros", {**settings, "axis": axis, "size": call.shape[axis]})


def unchanged_by(node: fx.Node, stream: fx.Node) -> bool:
    """Whether this operator returns the stream as it is: a relu of what a relu made."""
    name = op_name(node).removesuffix("_")
    while op_name(stream).removesuffix("_") in KEEPS_SIGN and stream.args:
        stream = first(stream)
    maker = op_name(stream).removesuffix("_")
    if name == "relu":
        return maker in POSITIVE
    mine, theirs = (
        {k: v for k, v in arguments(n).items() if not isinstance(v, fx.Node)} for n in (node, stream)
    )
    return name in CLAMPS and maker == name and mine == theirs


def returns(node: fx.Node) -> bool:
    """Whether this operator returns its argument itself: x.float() of a float."""
    return op_name(node) == "to" and value(node).dtype is value(first(node)).dtype


def stack(graph: Graph, node: fx.Node) -> list[str]:
    """The modules that run this operator, the outermost first, by their first names."""
    return [graph.first_name(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


@torch.no_grad()
def calls_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Call]:
    """The modules that run once and return a tensor, or a tensor with None."""
    found: dict[str, Call | None] = {}
    handles = []
    for path, module in model.named_modules():

        def see(module: Any, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
            like = first_floating((*args, *kwargs.values()))
            several = isinstance(out, tuple) and len(out) > 0 and all(item is None for item in out[1:])
            one = out[0] if several else out
            if path in found or like is None or not (isinstance(one, Tensor) and one.is_floating_point()):
                found[path] = None
                return
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            outputs = len(out) if several else 0
            found[path] = Call(alone, tuple(like.shape), tuple(one.shape), outputs)

        handles.append(module.register_forward_hook(see, with_kwargs=True))
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {path: call for path, call in found.items() if call is not None}
