"""NaN propagation: find constant values by evaluating a graph with NaN for "depends on the input".

A NaN passes through every operator that keeps NaNs (model/nan_rules.py), except where a weight is 0. All
other operators turn their whole output, and whatever they write in place, to NaN. A value that is not a float
and depends on the input is DEPENDS. Shapes are those of the example. In-place writes are carried out, views
included. Cost: one pass of at most BATCH samples per evaluation.
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
from tersor.model.batches import evaluating
from tersor.model.graph import Graph, Inputs, arguments, floating, traced, value, values, written
from tersor.model.nan_rules import APART, FACTORS, PASSING, SHAPES, base
from tersor.model.output_comparison import tensors_of
from tersor.model.task import MISFIT
from tersor.model.without_writes import without_writes

BATCH = 128  # most samples used of the example
ROUNDING = 1e-5  # allowed difference of two passes over one model, relative to the largest output
DEPENDS = object()
# (operator of a product, its first factor, its output) -> output
OnProduct = Callable[[fx.Node, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Followed:
    """A model with a graph that was checked to compute the same."""

    graph: Graph
    tensors: dict[str, Tensor]  # the model's, by the first of their names
    leaves: list[Any]  # of the example's arguments, at most BATCH samples
    views: frozenset[fx.Node]  # operators whose output shares memory with an argument
    written: frozenset[fx.Node]  # nodes in memory to which input-dependent values are written at any time
    plain: dict[fx.Node, Any]  # outputs of the operators for the example; {} if any of them writes in place

    @cached_property
    def own(self) -> dict[fx.Node, str]:
        """Placeholders of tensors with one name and memory of their own that exactly one operator reads."""
        names = Counter(self.graph.tensors.values())
        memory = Counter(x.untyped_storage().data_ptr() for x in self.tensors.values() if x.numel())
        return {
            node: name for node, name in self.graph.tensors.items()
            if len(node.users) == names[name] == 1
            and memory[self.tensors[name].untyped_storage().data_ptr()] <= 1
        }  # fmt: skip

    def constant(self, n: Any) -> bool:
        """Whether this argument has the same value for every input of the model."""
        fixed = not isinstance(n, fx.Node) or n.op == "get_attr"
        fixed = fixed or (n in self.graph.constant and n not in self.written)
        return fixed or (n.op == "placeholder" and n not in self.graph.inputs)

    def fixed(self, n: fx.Node) -> bool:
        """Whether this operator reads and moves the same elements for every input: none of its masks or
        indices depend on the input."""
        if base(n) == "view" and isinstance(n.args[1], torch.dtype):  # same bits, but a NaN may be lost
            return False
        return all(floating(value(arg)) or self.constant(arg) for arg in n.all_input_nodes)

    def outputs(self, leaves: Sequence[Any], on_product: OnProduct, at: fx.Node | None = None) -> list[Any]:
        """The leaves of the model's output for these arguments. `on_product` may change the output of each
        product. Operators before `at` are not run again: their outputs for the example are used."""
        feed = self.graph.feed(self.tensors, leaves)
        given = [x if isinstance(x, nn.Parameter) else copied(x) for x in feed.values()]
        done = list(self.plain)[: list(self.plain).index(at)] if at in self.plain else []
        try:
            return tree_leaves(
                Known(self, on_product).run(*given, initial_env={n: self.plain[n] for n in done})
            )
        except MISFIT as error:
            raise RefusedError(f"its graph cannot be evaluated with NaN: {first_line(error)}") from error


@torch.no_grad()
def few_samples(inputs: Inputs, most: int) -> Inputs:
    """The first samples. Tensors that are not as long as the first one have no axis of samples: a mask of
    places by places stays whole."""
    sizes = [len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim]

    def few(x: Any) -> Any:
        return x[:most].clone() if isinstance(x, Tensor) and x.ndim and len(x) == sizes[0] else x

    return tree_map(few, inputs)


def followed(model: nn.Module, inputs: Inputs, samples: int = BATCH) -> Followed:
    """Trace a model with at most `samples` of its example, and check the trace. RefusedError if torch.export
    cannot trace it, if the trace computes something else, or if the forward writes to the model's tensors."""
    inputs = few_samples(inputs, samples)
    graph = traced(model, tree_map(copied, inputs))
    whole = graph.program.graph_module
    for n in (n for part in whole.modules() if part is not whole for n in part.graph.nodes):
        if written(n) or nondeterministic(n):
            raise RefusedError(f"{n.name} writes in place or is random, inside a higher-order operator")
    tensors = dict((*model.named_parameters(), *model.named_buffers()))

    def fed() -> dict[fx.Node, Any]:
        return {n: copied(x) for n, x in graph.feed(tensors, tree_leaves(inputs)).items()}

    plain, feed = Plain(graph), fed()
    try:
        if any(map(written, graph.nodes)):
            plain.run(*feed.values())
            without_writes(whole.graph, plain.places)
            plain, feed = Plain(graph), fed()
        again = [copied(x) for x in tree_leaves(plain.run(*feed.values())) if isinstance(x, Tensor)]
        for n, x in feed.items():
            if isinstance(x, Tensor) and x._version and n not in graph.inputs:  # a fresh copy has version 0
                raise RefusedError(f"its forward writes to {graph.tensors.get(n, n.name)}")
        with evaluating(model):
            given = tree_map(copied, inputs)
            out = model(**given) if isinstance(given, dict) else model(*given)
    except MISFIT as error:
        raise RefusedError(f"it cannot run on its example: {first_line(error)}") from error
    outs = list(tensors_of(out))
    if len(outs) != len(again) or not all(map(near, outs, again)):
        raise RefusedError(
            "the trace of torch.export does not compute the same: the model is random, or has a hook"
        )
    changed = frozenset(n for n, places in plain.places.items() if places & plain.changed)
    made = {} if any(map(written, graph.nodes)) else {n: plain.env[n] for n in graph.nodes}
    return Followed(graph, tensors, tree_leaves(inputs), frozenset(plain.views), changed, made)


class Plain(fx.Interpreter):
    """An evaluation of the example that also records which values share memory."""

    def __init__(self, graph: Graph):
        # Keep all values, so that no memory is reused: the addresses are compared.
        super().__init__(graph.program.graph_module, garbage_collect_values=False)
        self.constant = graph.constant
        self.views: set[fx.Node] = set()
        self.places: dict[fx.Node, set[int]] = {}
        self.changed: set[int] = set()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(runnable(target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        given = {memory(self.env[arg]) for arg in n.all_input_nodes} - {0}
        output = super().run_node(n)
        found = self.places[n] = {memory(x) for x in tree_leaves(output)} - {0}
        if n.op == "call_function" and not written(n) and found and found <= given:
            self.views.add(n)
        if n not in self.constant:
            self.changed |= {memory(self.env[target]) for target in written(n)}
        return output


class Known(fx.Interpreter):
    """An evaluation in which NaN and DEPENDS mean "depends on the input"."""

    def __init__(self, model: Followed, on_product: OnProduct):
        super().__init__(model.graph.program.graph_module)
        self.model, self.on_product = model, on_product

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op != "call_function" or n.target is operator.getitem:
            return super().run_node(n)
        output = self.evaluated(n, args, kwargs)
        if base(n) in FACTORS and floating(output):
            output = self.on_product(n, args[0], output)
        return output

    def evaluated(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        name = base(n)
        if name in SHAPES and isinstance(n.args[0], fx.Node):
            like = value(n.args[0])
            args = (torch.zeros(like.shape, dtype=like.dtype), *args[1:])
        given = tree_leaves((args, kwargs))
        moving = n in self.model.views and not self.model.fixed(n)
        if moving or nondeterministic(n) or any(x is DEPENDS for x in given):
            return self.unknown(n)
        if not any(floating(x) and bool(x.sum().isnan()) for x in given):  # a NaN in x makes the sum NaN
            return runnable(n.target)(*args, **kwargs)
        if name in FACTORS:
            return self.product(n, args, kwargs)
        if name in APART:
            return per_sample(n, args, kwargs)
        keeps = (passing(n) or n in self.model.views) and self.model.fixed(n)
        if not keeps or not all(floating(self.env[target]) for target in written(n)):
            return self.unknown(n)
        output = runnable(n.target)(*args, **kwargs)
        return tree_map(lambda x: x if x is None or floating(x) else DEPENDS, output)

    def product(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A product. NaN in each element for which a NaN is multiplied by a factor that may be nonzero."""
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
                both = nan.to(out.dtype), self.may_be_nonzero(n.args[k + 1 - j], pair[1 - j])
                out.masked_fill_(met(*both) if j == 0 else met(*both[::-1]), torch.nan)
        return out

    def may_be_nonzero(self, n: Any, x: Tensor) -> Tensor:
        """1 where this factor may be nonzero. Its zeros count only if they are the same for every input."""
        return (x != 0).to(x.dtype) if self.model.constant(n) else torch.ones_like(x)

    def unknown(self, n: fx.Node) -> Any:
        """Mark the operator's whole output, and everything it writes, as depending on the input."""
        if n in self.model.views and any(map(floating, values(n))):
            raise RefusedError(f"{n.name} makes a view that depends on the input")
        for target in written(n):
            x = self.env[target]
            if x is not DEPENDS and not floating(x):
                raise RefusedError(
                    f"{n.name} writes a value that may depend on the input to a tensor that is not float"
                )
            if x is not DEPENDS:
                x.fill_(torch.nan)
        if written(n) and isinstance(value(n), Tensor):
            return self.env[written(n)[0]]
        return tree_map(depending, value(n))


def runnable(target: Any) -> Any:
    """The operator itself, but reshape for view: real strides may differ from those in the trace."""
    return torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target


def per_sample(n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """NaN in every sample whose input has a NaN; everywhere if an argument without a batch axis has one."""
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


def nondeterministic(n: fx.Node) -> bool:
    """Whether the output may depend on more than the arguments: random operators, uninitialized memory, and
    operators that are not PyTorch's."""
    if not isinstance(n.target, OpOverload):
        return False
    given = arguments(n)
    random = torch.Tag.nondeterministic_seeded in n.target.tags and not (
        given.get("train", given.get("training")) is False or given.get("dropout_p") == 0
    )
    return random or "empty" in base(n) or n.target.namespace not in ("aten", "prims")


def depending(output: Any) -> Any:
    """A value of the same shape that is all NaN, or DEPENDS if it is not a float tensor."""
    if not floating(output):
        return output if output is None else DEPENDS
    if not all(isinstance(size, int) for size in output.shape):
        raise RefusedError("the shape of a tensor in it depends on the input")
    steps = [(size - 1) * step for size, step in zip(output.shape, output.stride(), strict=True)]
    flat = torch.full((1 + sum(steps) if output.numel() else 0,), torch.nan, dtype=output.dtype)
    return flat.as_strided(output.shape, output.stride())  # the same strides, so that views of it stay views


def near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    largest = a[a.isfinite()].abs().amax() if a.isfinite().any() else 0
    return torch.allclose(a, b, rtol=0, atol=ROUNDING * float(largest))


def memory(x: Any) -> int:
    """The address of a tensor's storage; 0 for anything else."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0


def copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
