"""Idle: units of a trained network that say nothing are folded away or cleared.

constant   all weights into a unit are 0: what it passes on, c, is known without an input
           bias of the next layer += W[:, i] * c[i],  W[:, i] = 0         the network computes the same
unread     no output depends on a unit: its own weights and bias = 0      so it does
repeated until nothing changes: clearing one unit can make another idle

Both follow from one evaluation in which NaN means "depends": it spreads through every operation that keeps it
(PASSING), not past a weight of 0, and fills the output of every operation that is not known. Shapes stay.
Cost: one pass of one batch a round for constants; one for every B units, from their layer on, for the unread.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map

from tersor.errors import RefusedError
from tersor.model.task import MISFIT

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH = 128  # units asked about at once, at most
# What keeps every NaN that it is given: an element that comes out as a number depends on numbers only.
PASSING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU,
    nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm,
)  # fmt: skip
PASSING_FUNCTIONS = frozenset((
    torch.relu, torch.tanh, torch.sigmoid, torch.flatten, torch.add, torch.sub, torch.mul, torch.cat, F.relu,
    F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.softplus, F.softmax, F.log_softmax,
    F.dropout, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, operator.add, operator.sub, operator.mul,
    operator.truediv, operator.neg,
))  # fmt: skip
PASSING_METHODS = frozenset((
    "relu", "tanh", "sigmoid", "softmax", "flatten", "view", "reshape", "transpose", "permute", "contiguous",
    "squeeze", "unsqueeze", "unflatten", "mean", "sum", "add", "sub", "mul", "div", "neg",
))  # fmt: skip
SHAPE = frozenset(("size", "dim", "numel"))
IN_PLACE = frozenset((operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow))
ROUNDING = 1e-5  # of the largest number: what two passes over one model may differ by


class Known(fx.Interpreter):
    """An evaluation in which NaN means "depends". `plain` holds what each node gives on an example.

    blind: every input and every operation that is not known depends. Else only what is given a NaN does.
    """

    def __init__(self, graph: fx.GraphModule, plain: Mapping[fx.Node, Any], *, blind: bool):
        super().__init__(graph, garbage_collect_values=False)
        self.plain, self.blind = plain, blind
        self.seen: dict[str, Tensor] = {}  # inputs of layers

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        floats = all(item.is_floating_point() for item in given)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if n.op == "placeholder":
            return unknown(self.plain[n], n) if self.blind and is_float(self.plain[n]) else self.plain[n]
        if n.op in ("get_attr", "output"):
            return super().run_node(n)
        if module is not None and type(module) in LAYERS and not overridden(module) and floats:
            self.seen[str(n.target)] = given[0]
            return through(module, given[0])
        if floats and passing(n, module):
            return super().run_node(n)
        if asks_shape(n):
            return self.plain[n]
        if self.blind or any(bool(item.isnan().any()) for item in given if item.is_floating_point()):
            return unknown(self.plain[n], n)
        return super().run_node(n)


def asks_shape(n: fx.Node) -> bool:
    """Whether no value is read here, only how they lie."""
    if n.op == "call_method":
        return n.target in SHAPE
    return n.target is getattr and n.args[1] in ("shape", "ndim", "dtype", "device")


def overridden(module: nn.Module | None) -> bool:
    """Whether a module computes something else than its class says."""
    if module is None:
        return False
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def writes(n: fx.Node, module: nn.Module | None) -> bool:
    """Whether this changes what it is given, or what that is a view of."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or n.target in IN_PLACE
    return in_place or bool(n.kwargs.get("inplace")) or n.kwargs.get("out") is not None


def passing(n: fx.Node, module: nn.Module | None) -> bool:
    """Whether this operation keeps every NaN."""
    if overridden(module):
        return False
    if n.op == "call_module":
        return type(module) in PASSING_MODULES
    return n.target in (PASSING_FUNCTIONS if n.op == "call_function" else PASSING_METHODS)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's output; NaN where a weight that is not 0 meets a NaN."""
    weights = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    weights["weight"] = (module.get_parameter("weight") != 0).to(x.dtype)
    depends = functional_call(module, weights, (x.isnan().to(x.dtype),)) > 0
    return module(x.nan_to_num(0)).masked_fill(depends, torch.nan)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def unknown(value: Any, n: fx.Node) -> Any:
    """The same, all NaN; refused where what depends on the input could not say so."""
    if not all(item is None or is_float(item) for item in tree_flatten(value)[0]):
        raise RefusedError(f"{n.name} gives something that is no float and may depend on the input")
    return tree_map(lambda item: None if item is None else torch.full_like(item, torch.nan), value)


@torch.no_grad()
def clear(
    model: nn.Module, inputs: tuple | dict[str, Any], names: Collection[str], movable: Collection[str] = ()
) -> dict[str, Tensor]:  # fmt: skip
    """Clear what is idle in the model, in place; returns the parameters that changed, by name.

    `names` are the parameters that may change: a layer is left alone unless all of its own are among them.
    `movable` are the biases that can take up any constant; into others only zeros are folded. RefusedError
    says why a model cannot be looked through.
    """
    try:
        graph, plain = followed(model, inputs, fx.Tracer())
    except MISFIT as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedError(f"torch.fx cannot follow it: {text}") from error
    for n in graph.graph.nodes:
        module = graph.get_submodule(str(n.target)) if n.op == "call_module" else None
        if n.op.startswith("call_") and writes(n, module) and not passing(n, module):
            raise RefusedError(f"{n.name} writes to its input, which others may read")
    before = {name: value.clone() for name, value in model.named_parameters()}
    layers = own_layers(model, graph, names)
    nodes = [n for n in graph.graph.nodes if n.op == "call_module" and n.target in layers]
    moved = True
    while moved:
        seen, moved = blind_inputs(graph, plain), False
        for n in nodes:
            name = str(n.target)
            moved |= fold(layers[name], name, seen[name], movable) if name in seen else False
        for n in nodes:
            moved |= drop(graph, plain, n, layers[str(n.target)])
    after = dict(model.named_parameters())
    return {
        name: after[name].detach() for name, value in before.items() if not torch.equal(after[name], value)
    }


@torch.no_grad()
def followed(
    model: nn.Module, inputs: tuple | dict[str, Any], tracer: fx.Tracer
) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """(the model's graph, what every node gives on a batch of at most BATCH). One of MISFIT where torch.fx
    cannot follow it, RefusedError where the graph computes something else than the model."""
    graph = fx.GraphModule(model, tracer.trace(model))
    given: Any = tree_map(
        lambda item: item[:BATCH].clone() if isinstance(item, Tensor) and item.ndim else item, inputs
    )
    out = model(**given) if isinstance(given, dict) else model(*given)
    outs = [item.clone() for item in tree_flatten(out)[0] if isinstance(item, Tensor)]
    names = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if isinstance(given, dict):
        given = [given[str(n.target)] if n.target in given else n.args[0] for n in names]
    else:
        given = [*given, *(n.args[0] for n in names[len(given) :])]
    plain = fx.Interpreter(graph, garbage_collect_values=False)
    again = [item for item in tree_flatten(plain.run(*given))[0] if isinstance(item, Tensor)]
    if len(outs) != len(again) or not all(map(near, outs, again)):
        raise RefusedError("what torch.fx follows does not compute the same: by chance, in place, or a hook")
    return graph, dict(plain.env)


def near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= ROUNDING * a.abs().max())


def own_layers(
    model: nn.Module, graph: fx.GraphModule, names: Collection[str], kinds: Collection[type] = LAYERS
) -> dict[str, Any]:
    """Layers of these kinds that are called once, do as their class says, and whose tensors are nobody
    else's."""
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    loose = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    free = set(names) - loose
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    shared = Counter(id(value) for _, value in every)

    def own(name: str, module: nn.Module) -> bool:
        fine = all(shared[id(p)] == 1 and f"{name}.{key}" in free for key, p in module.named_parameters())
        return fine and all(
            shared[id(b)] == 1 and f"{name}.{key}" not in loose for key, b in module.named_buffers()
        )

    return {
        name: module for name, module in graph.named_modules()
        if type(module) in kinds and not overridden(module) and calls[name] == 1 and own(name, module)
    }  # fmt: skip


def blind_inputs(graph: fx.GraphModule, plain: Mapping[fx.Node, Any]) -> dict[str, Tensor]:
    """What is known of every layer's input without an input of the model."""
    known = Known(graph, plain, blind=True)
    known.run()
    return known.seen


def fold(layer: Any, name: str, x: Tensor, movable: Collection[str]) -> bool:
    """Fold the constants among a layer's inputs into its bias; whether anything changed."""
    if getattr(layer, "groups", 1) > 1:
        return False
    columns = x.movedim(units_axis(layer, x), 0).flatten(1)  # [I, everything else]
    constant = columns[:, 0].double()
    foldable = (columns == columns[:, :1]).all(1)  # NaN equals nothing
    padded = getattr(layer, "padding", 0) not in (0, "valid", (0,), (0, 0), (0, 0, 0))
    if padded or layer.bias is None or f"{name}.bias" not in movable:
        foldable &= constant == 0
    weight = layer.weight
    foldable &= (weight != 0).transpose(0, 1).flatten(1).any(1)
    if not foldable.any():
        return False
    by_input = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()  # [O, I]
    if layer.bias is not None:
        layer.bias += (by_input[:, foldable] @ constant[foldable]).to(layer.bias.dtype)
    weight[:, foldable] = 0
    return True


def units_axis(layer: Any, x: Tensor) -> int:
    """Along which axis units lie in what a layer reads or makes: a convolution may be given no batch."""
    return int(x.ndim - layer.weight.ndim) + 1


def drop(graph: fx.GraphModule, plain: Mapping[fx.Node, Any], node: fx.Node, layer: Any) -> bool:
    """Clear the units of this layer that no output depends on; whether anything changed."""
    parameters = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
    alive = sum((p != 0).flatten(1).any(1) if p.ndim > 1 else p != 0 for p in parameters)
    units, found = torch.nonzero(alive).flatten(), False
    nodes = list(graph.graph.nodes)
    earlier = {n: plain[n] for n in nodes[: nodes.index(node)] if n in plain}
    axis, batch = units_axis(layer, plain[node]), len(plain[node])
    if axis == 0:
        raise RefusedError(f"{node.target} is given no batch")

    def reached(at: Tensor | slice, some: Tensor) -> Tensor:
        """Which samples of the output depend on these units of these samples."""
        asked = plain[node].clone()
        asked.movedim(axis, 1)[at, some] = torch.nan
        out = Known(graph, plain, blind=False).run(initial_env={**earlier, node: asked})
        if not is_float(out) or len(out) != batch:
            raise RefusedError("its output is not one tensor with samples first")
        return out.flatten(1).isnan().any(1)

    for some in units.split(batch):
        unread = some[~reached(torch.arange(len(some)), some)[: len(some)]]
        if len(unread) and reached(slice(None), unread).any():
            raise RefusedError("its samples depend on each other")
        for p in parameters:
            p[unread] = 0
        found |= len(unread) > 0
    return found
