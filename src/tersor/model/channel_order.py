"""Channel order: sort hidden units so that neighbors are similar; the same function, in fewer bytes.

W2 f(W1 x) = W2[:, p] f(W1[p] x)     for any permutation p of hidden units, if f treats all units alike
p     start at the densest unit, then take the most similar remaining unit each time, by the cosine of their
      weights, so that a coder predicts each row well from the row above; units with zero weights come last
Cost: U^2 numbers for U units, and U^2 N multiplications for the similarities. Saves about 6 % of the bytes of
a sparse network.
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
from tersor.model.nan_propagation import Followed, followed
from tersor.model.nan_rules import EACH, POOLS, RESHAPES, base

NEXT = 0.3  # weight of the columns that read a unit, against 1 for the row that makes it; best in experiments


class Link(NamedTuple):
    """Hidden units that one layer makes and exactly one other layer reads."""

    rows: tuple[str, ...]  # tensors with a row per unit: the weight first, then its bias and norm parameters
    columns: str  # the weight whose columns read the units
    block: int  # columns per unit: more than 1 after a flatten of feature maps


def links(model: nn.Module, inputs: Inputs) -> list[Link]:
    """The links of a model, in the order of its layers. RefusedError if its graph cannot be followed."""
    traced = followed(model, inputs)
    layers = layers_of(traced)
    found = (link_from(traced, layers, layer) for layer in layers.values())
    return [link for link in found if link is not None]


def link_from(model: Followed, layers: Mapping[fx.Node, HiddenLayer], first: HiddenLayer) -> Link | None:
    """The link from this layer to the layer that reads its units; None if there is none."""
    node, rows, block = first.node, list(first.names), 1
    axis = free_axis(node, value(node), first.weight)
    while axis is not None and len(node.users) == 1:
        (n,) = node.users
        if n in layers:
            fits = n.args[0] is node and axis == free_axis(n, value(node), layers[n].weight)
            return Link(tuple(rows), layers[n].names[0], block) if fits else None
        if base(n) == "batch_norm":  # has parameters per unit, which must be permuted too
            read = [arg for arg in n.args[1:5] if arg is not None]
            if axis != 1 or block > 1 or n.args[0] is not node or not all(arg in model.own for arg in read):
                return None
            rows += [model.own[arg] for arg in read if isinstance(arg, fx.Node)]
        elif base(n) in RESHAPES:
            axis, block = reshaped(tuple(value(node).shape), tuple(value(n).shape), axis, block)
        elif not treats_alike(n, axis, value(node)):
            return None
        node = n
    return None


def free_axis(n: fx.Node, x: Tensor, weight: Tensor) -> int | None:
    """The axis of units of this layer's input or output, if its units may be permuted freely; None for a
    grouped convolution, whose units must stay in their group."""
    axis = units_axis(n, x, weight)
    return axis if axis and arguments(n).get("groups", 1) == 1 else None


def treats_alike(n: fx.Node, axis: int, x: Tensor) -> bool:
    """Whether this operator treats all units along this axis alike."""
    if base(n) in EACH:
        return len(n.all_input_nodes) == 1
    return base(n) in POOLS and axis < x.ndim - POOLS[base(n)] and isinstance(value(n), Tensor)


def reshaped(
    before: tuple[int, ...], after: tuple[int, ...], axis: int, block: int
) -> tuple[int | None, int]:
    """(axis of units, adjacent elements per unit) in the new shape; axis None if units are split up."""
    units = before[axis] // block
    for k, size in enumerate(after):
        if math.prod(after[:k]) == math.prod(before[:axis]) and size and units and size % units == 0:
            return k, size // units
    return None, block


def arranged(forms: Mapping[str, Form], found: list[Link]) -> dict[str, Form]:
    """The forms that change when the units of these links are sorted."""
    new: dict[str, Form] = {}
    for link in found:
        now = {**forms, **new}
        first, second = now[link.rows[0]], now[link.columns]
        columns = second.decode().float().unflatten(1, (-1, link.block)).transpose(0, 1).flatten(1)
        index = order(first.decode().float().flatten(1), columns)
        if torch.equal(index, torch.arange(len(index))):
            continue
        new |= {name: now[name].take(0, index) for name in link.rows}
        block = index[:, None] * link.block + torch.arange(link.block)
        new[link.columns] = second.take(1, block.flatten())
    return new


def order(rows: Tensor, columns: Tensor) -> Tensor:
    """The permutation that sorts U units, from the weights that make them [U, N] and read them [U, M]."""
    units = torch.cat([normalized(rows), NEXT * normalized(columns)], 1)
    size = units.norm(dim=1, keepdim=True)
    units = units / size.clamp_min(1e-12)
    similarity = units @ units.T
    similarity[:, size[:, 0] == 0] = -2.0  # less than any cosine, so that zero units come last
    index = torch.empty(len(units), dtype=torch.int64)
    at = int((rows != 0).sum(1).argmax()) if len(units) else 0
    for k in range(len(units)):
        index[k] = at
        similarity[:, at] = -3.0
        at = int(similarity[at].argmax())
    return index


def normalized(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(1e-12)
