"""Scaling links: pairs of layers between which each channel can have another scale, and none other reads it.

f(x / s) = f(x) / s for s > 0      relu, leaky_relu, pools, views, nothing
Not what clips at a fixed value (relu6), saturates or adds. Convolutions of any groups and linear layers,
whose weights and biases nothing else reads. Found on the traced graph. Used by steps/equalize.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.model.channel_order import reshaped, treats_alike
from tersor.model.dead_units import HiddenLayer, layers_of, units_axis
from tersor.model.graph import Inputs, arguments, value
from tersor.model.nan_propagation import Followed, followed
from tersor.model.nan_rules import POOLS, RESHAPES, base

HOMOGENEOUS = ("relu", "leaky_relu", "dropout", "feature_dropout", "clone", "contiguous", "detach", *POOLS)


class ScalingLink(NamedTuple):
    """Two layers by the names of their weights."""

    first: str
    bias: str | None  # of the first
    second: str
    groups: int  # of the second
    block: int  # adjacent inputs of the second for each channel: more than 1 after a flatten of feature maps

    def columns(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What multiplies the second weight, of this shape, for scales [C] of the channels."""
        each = scale.repeat_interleave(self.block).view(self.groups, 1, -1)  # [G, 1, I / G]
        rows = each.expand(-1, shape[0] // self.groups, -1).flatten(0, 1)  # [O, I / G]
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


def scaling_links(model: nn.Module, inputs: Inputs) -> tuple[list[ScalingLink], dict[str, str]]:
    """The links in the order of the layers, and for the other layers' weights why they have none.
    RefusedError if the graph cannot be followed."""
    traced = followed(model, inputs)
    layers, found, left = layers_of(traced), [], {}
    for layer in layers.values():
        link = link_from(traced, layers, layer)
        if isinstance(link, str):
            left[layer.names[0]] = link
        else:
            found.append(link)
    return found, left


def link_from(model: Followed, layers: dict[fx.Node, HiddenLayer], first: HiddenLayer) -> ScalingLink | str:
    """The link from this layer to the one that reads it, or why there is none."""
    node, block = first.node, 1
    axis: int | None = units_axis(node, value(node), first.weight)
    while len(node.users) == 1:
        (n,) = node.users
        if n.op == "output":
            return "it is an output"
        if axis is None:
            return "its channels are split up"
        if n in layers and n.args[0] is node:
            if axis != units_axis(n, value(node), layers[n].weight):
                return f"{layers[n].names[0]} reads another axis"
            bias = first.names[1] if first.bias is not None else None
            groups = int(arguments(n).get("groups", 1))
            return ScalingLink(first.names[0], bias, layers[n].names[0], groups, block)
        if base(n) in RESHAPES:
            axis, block = reshaped(tuple(value(node).shape), tuple(value(n).shape), axis, block)
        elif base(n) not in HOMOGENEOUS or (base(n) in POOLS and not treats_alike(n, axis, value(node))):
            return f"{base(n) or n.name} depends on the scale"
        node = n
    return "several operators read it" if node.users else "nothing reads it"


def cells(weight: Tensor, groups: int, block: int) -> Tensor:
    """The largest |weight| between each output and each channel read [O, C], 0 across groups."""
    flat = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()  # [O, I / G]
    parts = flat.double().chunk(groups)
    return torch.block_diag(*parts).unflatten(1, (-1, block)).amax(2)
