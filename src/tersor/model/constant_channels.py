"""Constant channels: channels with one value for every input, gone from what reads them, padding or not.

zero       W[:, i] = 0                                     for every product
c[i]       W[:, k] = sum_i W[:, i] c[i] / c[k], others 0   if several are constant
one c[i]   into a bias, only where nothing is padded       in model/dead_units.py
The network computes the same. At a border a padded convolution reads zeros in place of a constant, so its
bias cannot take the constant; but all constant channels change together there, and one can stand for all.
Which channels are constant is found with NaN for "depends on the input". Cost: one pass of one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.model.dead_units import clear
from tersor.model.graph import Inputs, arguments
from tersor.model.nan_propagation import Followed, depending, followed
from tersor.model.nan_rules import base

READERS = frozenset(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)) | {"linear"}


class Reader(NamedTuple):
    """A product with a weight that nothing else reads."""

    node: fx.Node
    name: str
    weight: Tensor  # the model's own
    groups: int

    @property
    def turned(self) -> bool:
        """Whether the weight is [I, O / G, ...]."""
        return "transpose" in base(self.node)

    def axis(self, x: Tensor) -> int:
        """The axis of channels of its input, which may have no batch axis."""
        return x.ndim - 1 if base(self.node) == "linear" else x.ndim - self.weight.ndim + 1

    def columns(self, channel: int) -> Tensor:
        """The weights that read a channel: a view."""
        if self.turned:
            return self.weight[channel]
        each = self.weight.shape[1]  # channels of a group
        rows = len(self.weight) // self.groups
        group, at = divmod(channel, each)
        return self.weight[group * rows : (group + 1) * rows, at]


@torch.no_grad()
def without_constants(
    model: nn.Module, inputs: Inputs, names: Collection[str], movable: Collection[str],
    mergeable: Collection[str],
) -> None:  # fmt: skip
    """Clear dead units and constant channels, in place, until nothing changes.

    `names`: parameters that may get zeros. `movable`: biases, and `mergeable`: weights, that may get any
    value. RefusedError as in dead_units.clear.
    """
    changed = True
    while changed:
        clear(model, inputs, names, movable)
        seen = followed(model, inputs)
        found = constants_of(seen, [reader for reader in readers(seen) if reader.name in names])
        changed = False
        for reader, values in found:
            changed |= cleared(reader, values, reader.name in mergeable)


def readers(model: Followed) -> Iterator[Reader]:
    for node in model.graph.nodes:
        given = arguments(node) if base(node) in READERS else {}
        if given.get("weight") in model.own:
            name = model.own[given["weight"]]
            yield Reader(node, name, model.tensors[name], int(given.get("groups") or 1))


def constants_of(model: Followed, found: list[Reader]) -> list[tuple[Reader, Tensor]]:
    """For each reader the constant value of each input channel, [I]; NaN if it depends on the input."""
    by_node, values = {reader.node: reader for reader in found}, {}

    def collect(node: fx.Node, x: Tensor, out: Tensor) -> Tensor:
        if node in by_node:
            rows = x.movedim(by_node[node].axis(x), 0).flatten(1)  # [I, everything else]
            same = (rows == rows[:, :1]).all(1)  # NaN equals nothing
            values[node] = rows[:, 0].double().masked_fill(~same, torch.nan)
        return out

    model.outputs([depending(x) for x in model.leaves], collect)
    return [(by_node[node], constants) for node, constants in values.items()]


def cleared(reader: Reader, constants: Tensor, mergeable: bool) -> bool:
    """Clear what reads a zero, and merge what reads other constants. Returns whether anything changed."""
    at = torch.nonzero(~constants.isnan()).flatten().tolist()
    read = {i: float(constants[i]) for i in at if bool(reader.columns(i).any())}
    for i in (i for i, c in read.items() if c == 0):
        reader.columns(i).zero_()
    others = {i: c for i, c in read.items() if c != 0}
    if mergeable and reader.groups == 1 and len(others) > 1:
        merge(reader, others)
        return True
    return len(others) < len(read)


def merge(reader: Reader, constants: dict[int, float]) -> None:
    """One of these channels, with the largest constant, stands for all of them."""
    keep = max(constants, key=lambda i: (abs(constants[i]), -i))
    total: Any = sum(reader.columns(i).double() * (c / constants[keep]) for i, c in constants.items())
    for i in constants:
        reader.columns(i).zero_()
    reader.columns(keep).copy_(total)
