"""Order: hidden units in an order in which each is like the one before: the same function, fewer bytes.

W2 f(W1 x) = W2[:, p] f(W1[p] x)     for every permutation p of hidden units and every f that treats all alike
p     from the densest unit always on to the most similar one left, by the cosine of their weights: what a
      coder has just seen of the row above then tells most of the next; empty units come last
Cost: U^2 numbers for U units and U^2 N multiplications for their likeness. About 6 % of a sparse network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersor.errors import RefusedError
from tersor.forms import Form
from tersor.model.idle import LAYERS, asks_shape, followed, overridden, own_layers
from tersor.model.task import MISFIT

NEXT = 0.3  # weight of the columns that read a unit, beside 1 for the row that makes it; found best
# What does the same to every unit, element by element, with no parameter of its own for any.
ALIKE = frozenset((
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
    nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softplus, torch.relu,
    torch.tanh, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.softplus,
    F.dropout, "relu", "tanh", "sigmoid", "contiguous",
))  # fmt: skip
# The same along the last axes, so many: of a tensor with fewer axes they pool units too.
POOLS: dict[Any, int] = {
    nn.MaxPool1d: 1, nn.AvgPool1d: 1, nn.AdaptiveAvgPool1d: 1, F.max_pool1d: 1, F.avg_pool1d: 1,
    F.adaptive_avg_pool1d: 1, nn.MaxPool2d: 2, nn.AvgPool2d: 2, nn.AdaptiveAvgPool2d: 2, F.max_pool2d: 2,
    F.avg_pool2d: 2, F.adaptive_avg_pool2d: 2,
}  # fmt: skip
FLAT = frozenset((nn.Flatten, torch.flatten, torch.reshape, "flatten", "view", "reshape"))
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # each unit has its own numbers there


class Link(NamedTuple):
    """Units that one layer makes and only one other reads."""

    first: str  # the layer whose rows they are
    norms: tuple[str, ...]  # on the way
    second: str  # the layer whose columns read them
    block: int  # columns for each unit: more than 1 where images were made flat


class Tracer(fx.Tracer):
    """Buffers are read where the model runs, not while it is followed: a norm's own may change places."""

    proxy_buffer_attributes = True


def links(model: nn.Module, inputs: tuple | dict[str, Any]) -> list[Link]:
    """The links of a model, in the order of its layers; none where torch.fx cannot follow it."""
    try:
        graph, plain = followed(model, inputs, Tracer())
    except (*MISFIT, RefusedError):
        return []
    own = own_layers(model, graph, {name for name, _ in model.named_parameters()}, (*LAYERS, *NORMS))
    nodes = [n for n in graph.graph.nodes if n.op == "call_module" and n.target in own]
    found = (link(graph, plain, n, own) for n in nodes if type(own[str(n.target)]) in LAYERS)
    return [one for one in found if one is not None]


def link(
    graph: fx.GraphModule, plain: Mapping[fx.Node, Any], first: fx.Node, own: Mapping[str, Any]
) -> Link | None:
    """Follow the units of a layer to the one that reads them."""
    if not whole(own[str(first.target)], plain[first]):
        return None
    count, node = plain[first].shape[1], first
    norms: list[str] = []
    while isinstance(plain[node], Tensor) and len(users := [n for n in node.users if not asks_shape(n)]) == 1:
        n = users[0]
        module = graph.get_submodule(str(n.target)) if n.op == "call_module" else None
        what = n.target if module is None else type(module)
        width = plain[node].shape[1]
        if overridden(module):
            return None
        if module is not None and what in LAYERS:
            fits = n.target in own and whole(module, plain[node])
            return Link(str(first.target), tuple(norms), str(n.target), width // count) if fits else None
        if what in NORMS:
            if n.target not in own or width != count:
                return None
            norms.append(str(n.target))
        elif not (alike(what, plain[node]) or flattened(what, plain[node], plain[n])):
            return None
        node = n
    return None


def whole(layer: Any, x: Tensor) -> bool:
    """Whether units lie along axis 1 of what this layer reads or makes, and any may take any other's place:
    those of a group may not leave it."""
    return x.ndim == layer.weight.ndim and getattr(layer, "groups", 1) == 1


def alike(what: Any, x: Tensor) -> bool:
    return what in ALIKE or (what in POOLS and x.ndim == POOLS[what] + 2)


def flattened(what: Any, before: Tensor, after: Any) -> bool:
    """Whether this makes [B, U * ...] of [B, U, ...]."""
    return what in FLAT and tuple(after.shape) == (len(before), before[0].numel())


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
