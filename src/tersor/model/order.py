"""Order: hidden units in an order in which each is like the one before: the same function, fewer bytes.

W2 f(W1 x) = W2[:, p] f(W1[p] x)     for every permutation p of hidden units and every f that treats all alike
p     from the densest unit always on to the likest that is left, by the cosine of their weights: what a coder
      has just seen of the row above then tells most of the next; empty units come last
Cost: U^2 numbers for U units and U^2 N multiplications for their likeness. About 6 % of a sparse network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersor.forms import Form
from tersor.model.idle import LAYERS, asks_shape, own_layers, recorded
from tersor.model.task import MISFIT

NEXT = 0.3  # weight of the columns that read a unit, beside 1 for the row that makes it; found best
# What does the same to every unit, with no parameter of its own for any.
ALIKE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
    nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.MaxPool1d,
    nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
ALIKE_FUNCTIONS = frozenset((
    torch.relu, torch.tanh, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish,
    F.softplus, F.dropout, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
))  # fmt: skip
ALIKE_METHODS = frozenset(("relu", "tanh", "sigmoid", "contiguous"))
FLAT = frozenset((torch.flatten, torch.reshape, "flatten", "view", "reshape"))
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # each unit has its own numbers there


class Link(NamedTuple):
    """Units that one layer makes and only one other reads."""

    first: str  # the layer whose rows they are
    norms: tuple[str, ...]  # on the way
    second: str  # the layer whose columns read them
    block: int  # columns for each unit: more than 1 where images were made flat


def links(model: nn.Module, inputs: tuple | dict[str, Any]) -> list[Link]:
    """The links of a model, in the order of its layers; none where torch.fx cannot follow it."""
    try:
        graph = fx.symbolic_trace(model)
        plain = recorded(graph, inputs)
    except MISFIT:
        return []
    names = {name for name, _ in model.named_parameters()}
    own = {name for name, layer in own_layers(model, graph, names).items() if type(layer) in LAYERS}
    found = (link(graph, plain, n, own) for n in graph.graph.nodes if str(n.target) in own)
    return [one for one in found if one is not None]


def link(graph: fx.GraphModule, plain: Mapping[fx.Node, Any], first: fx.Node, own: set[str]) -> Link | None:
    """Follow the units of a layer to the one that reads them."""
    if isinstance(graph.get_submodule(str(first.target)), nn.Linear) and plain[first].ndim != 2:
        return None  # its units do not lie along axis 1
    count, node = plain[first].shape[1], first
    norms: list[str] = []
    while len(users := [n for n in node.users if not asks_shape(n)]) == 1:
        n = users[0]
        module = graph.get_submodule(str(n.target)) if n.op == "call_module" else None
        width = plain[node].shape[1]
        if str(n.target) in own and module is not None:
            fits = plain[node].ndim == 2 if isinstance(module, nn.Linear) else module.groups == 1
            return Link(str(first.target), tuple(norms), str(n.target), width // count) if fits else None
        if type(module) in NORMS and width == count:
            norms.append(str(n.target))
        elif not (alike(n, module) or flattened(n, module, plain[node], plain[n])):
            return None
        node = n
    return None


def alike(n: fx.Node, module: nn.Module | None) -> bool:
    if n.op == "call_module":
        return type(module) in ALIKE_MODULES
    return n.target in (ALIKE_FUNCTIONS if n.op == "call_function" else ALIKE_METHODS)


def flattened(n: fx.Node, module: nn.Module | None, before: Any, after: Any) -> bool:
    """Whether this makes [B, U * ...] of [B, U, ...]."""
    known = type(module) is nn.Flatten if n.op == "call_module" else n.target in FLAT
    return known and tuple(after.shape) == (len(before), before[0].numel())


def arranged(forms: Mapping[str, Form], found: list[Link]) -> dict[str, Form]:
    """The forms that change where the units of these links are put in order."""
    new: dict[str, Form] = {}
    for one in found:
        now = {**forms, **new}
        first, second = (now[f"{name}.weight"] for name in (one.first, one.second))
        columns = second.decode().float().unflatten(1, (-1, one.block)).transpose(0, 1).flatten(1)
        index = order(first.decode().float().flatten(1), columns)
        if torch.equal(index, torch.arange(len(index))):
            continue
        for layer in (one.first, *one.norms):
            for name in (f"{layer}.{key}" for key in ("weight", "bias", "running_mean", "running_var")):
                if name in now:
                    new[name] = now[name].take(0, index)
        block = index[:, None] * one.block + torch.arange(one.block)
        new[f"{one.second}.weight"] = second.take(1, block.flatten())
    return new


def order(rows: Tensor, columns: Tensor) -> Tensor:
    """A permutation of units, from what makes them [U, N] and what reads them [U, M]."""
    units = torch.cat([scaled(rows), NEXT * scaled(columns)], 1)
    size = units.norm(dim=1, keepdim=True)
    units = units / size.clamp_min(1e-12)
    likeness = units @ units.T
    likeness[:, size[:, 0] == 0] = -2.0  # less than any cosine: the empty come last
    index = torch.empty(len(units), dtype=torch.int64)
    at = int((rows != 0).sum(1).argmax()) if len(units) else 0
    for k in range(len(units)):
        index[k] = at
        likeness[:, at] = -3.0
        at = int(likeness[at].argmax())
    return index


def scaled(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(1e-12)
