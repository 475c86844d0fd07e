"""Idle: units of a trained network that say nothing are folded away or cleared.

constant   all weights into a unit are 0: what it passes on, c, is known without an input
           bias of the next layer += W[:, i] * c[i],  W[:, i] = 0         the network computes the same
unread     no output depends on a unit: its own weights and bias = 0      so it does
repeated until nothing changes: clearing one unit can make another idle

Both follow from one evaluation in which NaN means "depends": model/known.py. Shapes stay, and c is that of
the example's shape. Cost: one pass of one batch a round for constants; one for every B units for the unread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.errors import RefusedError
from tersor.model.graph import Inputs, arguments, floating, value
from tersor.model.known import DEPENDS, Followed, depending, followed
from tersor.model.passing import LAYERS, base


class HiddenLayer(NamedTuple):
    """A product with a weight that nothing else reads, and its bias."""

    node: fx.Node
    names: tuple[str, ...]  # of the weight and, where there is one, the bias
    tensors: tuple[Tensor, ...]

    @property
    def weight(self) -> Tensor:
        return self.tensors[0]  # [O, I, ...]

    @property
    def bias(self) -> Tensor | None:
        return self.tensors[1] if len(self.tensors) > 1 else None


def layers_of(model: Followed) -> dict[fx.Node, HiddenLayer]:
    """The layers of a model whose tensors nothing else reads."""
    found = {}
    for n in model.graph.nodes:
        given = arguments(n) if base(n) in LAYERS else {}
        read = [given[key] for key in ("weight", "bias") if given.get(key) is not None]
        if read and floating(value(n)) and all(one in model.own for one in read):
            names = tuple(model.own[one] for one in read)
            found[n] = HiddenLayer(n, names, tuple(model.tensors[name] for name in names))
    return found


def units_axis(n: fx.Node, x: Any, weight: Tensor) -> int:
    """Along which axis units lie in what a layer reads or makes: a convolution may be given no batch."""
    return int(x.ndim) - 1 if base(n) == "linear" else int(x.ndim - weight.ndim) + 1


@torch.no_grad()
def clear(
    model: nn.Module, inputs: Inputs, names: Collection[str], movable: Collection[str] = ()
) -> dict[str, Tensor]:
    """Clear what is idle in the model, in place; returns the parameters that changed, by name.

    `names` are the parameters that may change: a layer is left alone unless all of its own are among them.
    `movable` are the biases that can take up any constant; into others only zeros are folded. RefusedError
    says why a model cannot be looked through.
    """
    seen = followed(model, inputs)
    layers = {n: one for n, one in layers_of(seen).items() if set(one.names) <= set(names)}
    before = {name: value.clone() for name, value in model.named_parameters()}
    moved = True
    while moved:
        constants, moved = constants_of(seen, layers), False
        for n, one in layers.items():
            moved |= fold(one, constants[n], movable)
        for one in layers.values():
            moved |= drop(seen, one)
    after = dict(model.named_parameters())
    return {
        name: after[name].detach() for name, value in before.items() if not torch.equal(after[name], value)
    }


def constants_of(model: Followed, layers: dict[fx.Node, HiddenLayer]) -> dict[fx.Node, Tensor]:
    """What every layer reads from each of its inputs without an input of the model; NaN where it depends."""
    found: dict[fx.Node, Tensor] = {}

    def look(n: fx.Node, x: Tensor, out: Tensor) -> Tensor:
        if n in layers:
            columns = x.movedim(units_axis(n, x, layers[n].weight), 0).flatten(1)  # [I, everything else]
            same = (columns == columns[:, :1]).all(1)  # NaN equals nothing
            found[n] = columns[:, 0].double().masked_fill(~same, torch.nan)
        return out

    model.answers([depending(x) for x in model.leaves], look)
    return found


def fold(layer: HiddenLayer, constant: Tensor, movable: Collection[str]) -> bool:
    """Fold the constants among a layer's inputs into its bias; whether anything changed."""
    given, weight = arguments(layer.node), layer.weight
    if given.get("groups", 1) > 1:
        return False
    padding = given.get("padding", 0)
    padded = padding == "same" if isinstance(padding, str) else padding != 0 and any(padding)
    foldable = ~constant.isnan()
    if padded or layer.bias is None or layer.names[1] not in movable:
        foldable &= constant == 0
    foldable &= (weight != 0).transpose(0, 1).flatten(1).any(1)
    if not foldable.any():
        return False
    by_input = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()  # [O, I]
    if layer.bias is not None:
        layer.bias.add_((by_input[:, foldable] @ constant[foldable]).to(layer.bias.dtype))
    weight[:, foldable] = 0
    return True


def drop(model: Followed, layer: HiddenLayer) -> bool:
    """Clear the units of this layer that no output depends on; whether anything changed."""
    alive = torch.stack([(p != 0).reshape(len(p), -1).any(1) for p in layer.tensors]).any(0)
    units, found = torch.nonzero(alive).flatten(), False
    made = value(layer.node)
    axis, batch = units_axis(layer.node, made, layer.weight), samples_of(model)
    rest = [size for k, size in enumerate(made.shape) if k != axis]

    def reached(some: Tensor, at: Tensor | slice, inner: int) -> Tensor:
        """Which samples of the answer depend on these units of these samples, one each; all, where an answer
        has none."""
        asked = torch.zeros(made.shape[axis], math.prod(rest), dtype=torch.bool)
        asked.unflatten(1, (-1, batch, inner)).movedim(2, 1)[some, at] = True
        mask = asked.unflatten(1, rest).movedim(0, axis)

        def look(n: fx.Node, x: Tensor, out: Tensor) -> Tensor:
            return out.masked_fill(mask, torch.nan) if n is layer.node else out

        out = torch.zeros(batch, dtype=torch.bool)
        for x in model.answers(model.leaves, look, layer.node):
            if floating(x) and x.ndim and len(x) == batch:
                out |= x.isnan().reshape(batch, -1).any(1)
            elif x is DEPENDS or (floating(x) and x.isnan().any()):
                out[:] = True
        return out

    choices = list(inner_sizes(rest, batch))
    if not choices:
        raise RefusedError(f"{layer.names[0]}: its layer is given no batch")
    first = torch.arange(batch) == 0
    right = (k for k in choices if torch.equal(reached(units, torch.zeros(1, dtype=torch.int64), k), first))
    inner = next(right, choices[0]) if len(units) and len(choices) > 1 else choices[0]
    for some in units.split(batch):
        unread = some[~reached(some, torch.arange(len(some)), inner)[: len(some)]]
        if len(unread) and reached(unread, slice(None), inner).any():
            raise RefusedError("its samples depend on each other")
        for p in layer.tensors:
            p[unread] = 0
        found |= len(unread) > 0
    return found


def samples_of(model: Followed) -> int:
    """How many samples the example has."""
    sizes = [len(x) for x in model.leaves if isinstance(x, Tensor) and x.ndim]
    if not sizes:
        raise RefusedError("it is given no batch")
    return sizes[0]


def inner_sizes(shape: list[int], batch: int) -> Iterator[int]:
    """Where samples may lie among numbers of this shape: how many numbers of one lie side by side."""
    for k, size in enumerate(shape):
        inner = math.prod(shape[k + 1 :])
        if size and size % batch == 0:
            yield size // batch * inner
            if size > batch:
                yield inner
