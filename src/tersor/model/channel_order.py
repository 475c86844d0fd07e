"""Order: hidden units in an order in which each is like the one before: the same function, fewer bytes.

W2 f(W1 x) = W2[:, p] f(W1[p] x)     for every permutation p of hidden units and every f that treats all alike
p     from the densest unit always on to the most similar one left, by the cosine of their weights: what a
      coder has just seen of the row above then tells most of the next; empty units come last
Cost: U^2 numbers for U units and U^2 N multiplications for their likeness. About 6 % of a sparse network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.forms import Form
from tersor.model.dead_units import HiddenLayer, layers_of, units_axis
from tersor.model.graph import Inputs, arguments, value
from tersor.model.known import Followed, followed
from tersor.model.passing import EACH, POOLS, RESHAPES, base

NEXT = 0.3  # weight of the columns that read a unit, beside 1 for the row that makes it; found best


class Link(NamedTuple):
    """Units that one layer makes and only one other reads."""

    rows: tuple[str, ...]  # tensors with a row for each unit: the weight first, its bias, those of norms
    columns: str  # the weight whose columns read them
    block: int  # columns for each unit: more than 1 where images were made flat


def links(model: nn.Module, inputs: Inputs) -> list[Link]:
    """The links of a model, in the order of its layers. RefusedError says why it cannot be followed."""
    seen = followed(model, inputs)
    layers = layers_of(seen)
    found = (link(seen, layers, one) for one in layers.values())
    return [one for one in found if one is not None]


def link(model: Followed, layers: Mapping[fx.Node, HiddenLayer], first: HiddenLayer) -> Link | None:
    """Follow the units of a layer to the one that reads them."""
    node, rows, block = first.node, list(first.names), 1
    axis = whole(node, value(node), first.weight)
    while axis is not None and len(node.users) == 1:
        (n,) = node.users
        if n in layers:
            fits = n.args[0] is node and axis == whole(n, value(node), layers[n].weight)
            return Link(tuple(rows), layers[n].names[0], block) if fits else None
        if base(n) == "batch_norm":  # each unit has its own numbers there
            read = [one for one in n.args[1:5] if one is not None]
            if axis != 1 or block > 1 or n.args[0] is not node or not all(one in model.own for one in read):
                return None
            rows += [model.own[one] for one in read if isinstance(one, fx.Node)]
        elif base(n) in RESHAPES:
            axis, block = reshaped(tuple(value(node).shape), tuple(value(n).shape), axis, block)
        elif not alike(n, axis, value(node)):
            return None
        node = n
    return None


def whole(n: fx.Node, x: Tensor, weight: Tensor) -> int | None:
    """The axis of units of what this layer reads or makes, if any may take any other's place: those of a
    group may not leave it."""
    axis = units_axis(n, x, weight)
    return axis if axis and arguments(n).get("groups", 1) == 1 else None


def alike(n: fx.Node, axis: int, x: Tensor) -> bool:
    """Whether this operator treats all units along this axis alike."""
    if base(n) in EACH:
        return len(n.all_input_nodes) == 1
    return base(n) in POOLS and axis < x.ndim - POOLS[base(n)] and isinstance(value(n), Tensor)


def reshaped(
    before: tuple[int, ...], after: tuple[int, ...], axis: int, block: int
) -> tuple[int | None, int]:
    """(the axis, numbers side by side for each unit) of units in the new shape; None where they part."""
    units = before[axis] // block
    for k, size in enumerate(after):
        if math.prod(after[:k]) == math.prod(before[:axis]) and size and units and size % units == 0:
            return k, size // units
    return None, block


def arranged(forms: Mapping[str, Form], found: list[Link]) -> dict[str, Form]:
    """The forms that change where the units of these links are put in order."""
    new: dict[str, Form] = {}
    for one in found:
        now = {**forms, **new}
        first, second = now[one.rows[0]], now[one.columns]
        columns = second.decode().float().unflatten(1, (-1, one.block)).transpose(0, 1).flatten(1)
        index = order(first.decode().float().flatten(1), columns)
        if torch.equal(index, torch.arange(len(index))):
            continue
        new |= {name: now[name].take(0, index) for name in one.rows}
        block = index[:, None] * one.block + torch.arange(one.block)
        new[one.columns] = second.take(1, block.flatten())
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
