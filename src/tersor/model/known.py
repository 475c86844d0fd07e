"""Known: a model's graph evaluated with NaN for "depends": what is known of its values without its input.

A NaN spreads through every operator that keeps it (model/passing.py), not past a weight of 0, and fills what
any other operator makes or writes. What is no float cannot be NaN: where it depends, it is DEPENDS.
The batch of the example fixes every shape; what is written in place is written here too, views included.
Cost: one pass of at most BATCH samples each time.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from tersor.errors import RefusedError, first_line
from tersor.model.answers import tensors_of
from tersor.model.batches import evaluating
from tersor.model.graph import Graph, Inputs, arguments, floating, traced, value, values, written
from tersor.model.passing import APART, FACTORS, PASSING, SHAPES, base
from tersor.model.task import MISFIT

BATCH = 128  # samples of the example, at most
ROUNDING = 1e-5  # of the largest number: what two passes over one model may differ by
DEPENDS = object()
Look = Callable[[fx.Node, Tensor, Tensor], Tensor]  # (product, its first factor, its answer) -> answer


@dataclass(frozen=True, eq=False)
class Followed:
    """A model whose graph computes what the model does."""

    graph: Graph
    tensors: dict[str, Tensor]  # the model's own, by the first of their names
    leaves: list[Any]  # of the example, at most BATCH samples
    views: frozenset[fx.Node]  # operators that answer with memory of what they are given
    written: frozenset[fx.Node]  # what lies in memory that the input is written to, sooner or later
    plain: dict[fx.Node, Any]  # what operators make of the example; {} where any of them writes

    @cached_property
    def own(self) -> dict[fx.Node, str]:
        """Placeholders of tensors that one operator reads, and no other under any name."""
        names = Counter(self.graph.tensors.values())
        memory = Counter(x.untyped_storage().data_ptr() for x in self.tensors.values() if x.numel())
        return {
            node: name for node, name in self.graph.tensors.items()
            if len(node.users) == names[name] == 1
            and memory[self.tensors[name].untyped_storage().data_ptr()] <= 1
        }  # fmt: skip

    def constant(self, n: Any) -> bool:
        """Whether this is no operand, or the same for every input."""
        there = not isinstance(n, fx.Node) or n.op == "get_attr"
        there = there or (n in self.graph.constant and n not in self.written)
        return there or (n.op == "placeholder" and n not in self.graph.inputs)

    def fixed(self, n: fx.Node) -> bool:
        """Whether this operator reads and moves the same elements for every input: no masks or indices hang
        on the example."""
        if base(n) == "view" and isinstance(n.args[1], torch.dtype):  # other numbers of the same bits
            return False
        return all(floating(value(one)) or self.constant(one) for one in n.all_input_nodes)

    def answers(self, leaves: Sequence[Any], look: Look, at: fx.Node | None = None) -> list[Any]:
        """The leaves of what the model answers to these, which up to `at` may be taken for the example."""
        feed = self.graph.feed(self.tensors, leaves)
        given = [x if isinstance(x, nn.Parameter) else copied(x) for x in feed.values()]
        there = list(self.plain)[: list(self.plain).index(at)] if at in self.plain else []
        try:
            return tree_leaves(Known(self, look).run(*given, initial_env={n: self.plain[n] for n in there}))
        except MISFIT as error:
            raise RefusedError(f"what is known of it cannot be computed: {first_line(error)}") from error


@torch.no_grad()
def followed(model: nn.Module, inputs: Inputs) -> Followed:
    """RefusedError where torch.export cannot trace the model, or traces what computes something else."""
    inputs = tree_map(lambda x: x[:BATCH].clone() if isinstance(x, Tensor) and x.ndim else x, inputs)
    graph = traced(model, tree_map(copied, inputs))
    whole = graph.program.graph_module
    for n in (n for part in whole.modules() if part is not whole for n in part.graph.nodes):
        if written(n) or fickle(n):
            raise RefusedError(f"{n.name} writes or draws in a part that runs as one operator")
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    feed = {n: copied(x) for n, x in graph.feed(tensors, tree_leaves(inputs)).items()}
    plain = Plain(graph)
    try:
        again = [copied(x) for x in tree_leaves(plain.run(*feed.values())) if isinstance(x, Tensor)]
        for n, x in feed.items():
            if isinstance(x, Tensor) and x._version and n not in graph.inputs:  # copies begin at version 0
                raise RefusedError(f"its forward writes to {graph.tensors.get(n, n.name)}")
        with evaluating(model):
            given = tree_map(copied, inputs)
            out = model(**given) if isinstance(given, dict) else model(*given)
    except MISFIT as error:
        raise RefusedError(f"it cannot be run on its example: {first_line(error)}") from error
    outs = list(tensors_of(out))
    if len(outs) != len(again) or not all(map(near, outs, again)):
        raise RefusedError("what torch.export traces does not compute the same: by chance, or by a hook")
    changed = frozenset(n for n, places in plain.places.items() if places & plain.changed)
    made = {} if any(map(written, graph.nodes)) else {n: plain.env[n] for n in graph.nodes}
    return Followed(graph, tensors, tree_leaves(inputs), frozenset(plain.views), changed, made)


class Plain(fx.Interpreter):
    """An evaluation of real numbers that sees what lies in the same memory."""

    def __init__(self, graph: Graph):
        super().__init__(graph.program.graph_module, garbage_collect_values=False)  # memory is not used twice
        self.constant = graph.constant
        self.views: set[fx.Node] = set()
        self.places: dict[fx.Node, set[int]] = {}
        self.changed: set[int] = set()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(possible(target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        given = {memory(self.env[one]) for one in n.all_input_nodes} - {0}
        made = super().run_node(n)
        found = self.places[n] = {memory(x) for x in tree_leaves(made)} - {0}
        if n.op == "call_function" and not written(n) and found and found <= given:
            self.views.add(n)
        if n not in self.constant:
            self.changed |= {memory(self.env[one]) for one in written(n)}
        return made


class Known(fx.Interpreter):
    """An evaluation in which NaN and DEPENDS mean "depends"."""

    def __init__(self, model: Followed, look: Look):
        super().__init__(model.graph.program.graph_module)
        self.model, self.look = model, look

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op != "call_function" or n.target is operator.getitem:
            return super().run_node(n)
        made = self.made(n, args, kwargs)
        if base(n) in FACTORS and floating(made):
            made = self.look(n, args[0], made)
        return made

    def made(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        name = base(n)
        if name in SHAPES and isinstance(n.args[0], fx.Node):
            like = value(n.args[0])
            args = (torch.zeros(like.shape, dtype=like.dtype), *args[1:])
        given = tree_leaves((args, kwargs))
        moving = n in self.model.views and not self.model.fixed(n)
        if moving or fickle(n) or any(x is DEPENDS for x in given):
            return self.unknown(n)
        if not any(floating(x) and bool(x.sum().isnan()) for x in given):  # the sum of a NaN is one
            return possible(n.target)(*args, **kwargs)
        if name in FACTORS:
            return self.product(n, args, kwargs)
        if name in APART:
            return apart(n, args, kwargs)
        keeps = (passing(n) or n in self.model.views) and self.model.fixed(n)
        if not keeps or not all(floating(self.env[one]) for one in written(n)):
            return self.unknown(n)
        made = possible(n.target)(*args, **kwargs)
        return tree_map(lambda x: x if x is None or floating(x) else DEPENDS, made)

    def product(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """NaN where a NaN meets a factor that is not known to be 0."""
        call: Any = n.target
        k = FACTORS[base(n)]
        bare = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, (args, kwargs))

        def met(first: Tensor, second: Tensor) -> Tensor:
            return call(*bare[0][:k], first, second, *bare[0][k + 2 :], **bare[1]) != 0

        pair = args[k : k + 2]
        nans = [x.isnan() for x in pair]
        numbers = [x.masked_fill(nan, 0) for x, nan in zip(pair, nans, strict=True)]
        out = call(*args[:k], *numbers, *args[k + 2 :], **kwargs)
        for j, nan in enumerate(nans):
            if nan.any():
                both = nan.to(out.dtype), self.some(n.args[k + 1 - j], pair[1 - j])
                out.masked_fill_(met(*both) if j == 0 else met(*both[::-1]), torch.nan)
        return out

    def some(self, n: Any, x: Tensor) -> Tensor:
        """1 where this may be another number than 0: an example's zeros are chance."""
        return (x != 0).to(x.dtype) if self.model.constant(n) else torch.ones_like(x)

    def unknown(self, n: fx.Node) -> Any:
        """What depends in every element: the answer, or all that is written."""
        if n in self.model.views and any(map(floating, values(n))):
            raise RefusedError(f"{n.name} takes a part that depends on the input")
        for one in written(n):
            x = self.env[one]
            if x is not DEPENDS and not floating(x):
                raise RefusedError(f"{n.name} writes what may depend on the input to what is no float")
            if x is not DEPENDS:
                x.fill_(torch.nan)
        if written(n) and isinstance(value(n), Tensor):
            return self.env[written(n)[0]]
        return tree_map(depending, value(n))


def possible(target: Any) -> Any:
    """The operator, and for view, reshape: real strides are not always those that torch.export foresaw."""
    return torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target


def apart(n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """NaN in every sample that is given a NaN, and everywhere if what all samples share has one."""
    call: Any = n.target
    plain = tree_map(lambda x: x.masked_fill(x.isnan(), 0) if floating(x) else x, (args, kwargs))
    out = call(*plain[0], **plain[1])
    for x in tree_leaves((args, kwargs)):
        if floating(x):
            each = x.ndim == out.ndim and len(x) == len(out)
            out[x.isnan().flatten(1).any(1) if each else x.isnan().any().expand(len(out))] = torch.nan
    return out


def passing(n: fx.Node) -> bool:
    """Whether this operator keeps every NaN."""
    if base(n) == "pow":  # NaN ** 0 = 1
        return isinstance(n.args[1], (int, float)) and n.args[1] != 0
    return base(n) in PASSING


def fickle(n: fx.Node) -> bool:
    """Whether the answer may hang on more than what is given: on chance, or in code that is not torch's."""
    if not isinstance(n.target, OpOverload):
        return False
    given = arguments(n)
    drawn = torch.Tag.nondeterministic_seeded in n.target.tags and not (
        given.get("train", given.get("training")) is False or given.get("dropout_p") == 0
    )
    return drawn or "empty" in base(n) or n.target.namespace not in ("aten", "prims")


def depending(made: Any) -> Any:
    """NaN or DEPENDS in the place of this."""
    if not floating(made):
        return made if made is None else DEPENDS
    if not all(isinstance(size, int) for size in made.shape):
        raise RefusedError("a shape in it depends on the input")
    steps = [(size - 1) * step for size, step in zip(made.shape, made.stride(), strict=True)]
    there = torch.full((1 + sum(steps) if made.numel() else 0,), torch.nan, dtype=made.dtype)
    return there.as_strided(made.shape, made.stride())  # what is a view of it must stay one


def near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    largest = a[a.isfinite()].abs().amax() if a.isfinite().any() else 0
    return torch.allclose(a, b, rtol=0, atol=ROUNDING * float(largest))


def memory(x: Any) -> int:
    """Where a tensor's numbers lie; 0 of anything else."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0


def copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
