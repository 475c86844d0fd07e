"""Dead units: hidden units with a constant output, or that no output depends on, are folded or cleared.

constant   all weights into unit i are 0, so its output c[i] does not depend on the input
           bias of the next layer += W[:, i] * c[i],  W[:, i] = 0         the network computes the same
unread     no output depends on the unit: its own weights and bias = 0    the network computes the same
repeated until nothing changes, because clearing one unit can make another one dead

Both are found by an evaluation in which NaN means "depends on the input": model/nan_propagation.py. Shapes do
not change. c is computed for the shape of the example. What has a gradient is read, so only units without one
are tried with NaN.
Cost per round: one pass of one batch for the constants, two for the gradients; one for every B units without.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tersor.errors import RefusedError
from tersor.model.graph import Inputs, arguments, floating, value
from tersor.model.nan_propagation import DEPENDS, Followed, depending, followed, runnable
from tersor.model.nan_rules import EACH, LAYERS, base
from tersor.model.task import MISFIT


class HiddenLayer(NamedTuple):
    """A layer whose weight and bias no other operator reads."""

    node: fx.Node
    names: tuple[str, ...]  # of the weight and the bias, if it has one
    tensors: tuple[Tensor, ...]

    @property
    def weight(self) -> Tensor:
        return self.tensors[0]  # [O, I, ...]

    @property
    def bias(self) -> Tensor | None:
        return self.tensors[1] if len(self.tensors) > 1 else None


def layers_of(model: Followed) -> dict[fx.Node, HiddenLayer]:
    """The layers of a model whose weight and bias no other operator reads."""
    found = {}
    for n in model.graph.nodes:
        given = arguments(n) if base(n) in LAYERS else {}
        read = [given[key] for key in ("weight", "bias") if given.get(key) is not None]
        if read and floating(value(n)) and all(arg in model.own for arg in read):
            names = tuple(model.own[arg] for arg in read)
            found[n] = HiddenLayer(n, names, tuple(model.tensors[name] for name in names))
    return found


def units_axis(n: fx.Node, x: Any, weight: Tensor) -> int:
    """The axis of units in a layer's input or output x. A convolution's input may have no batch axis."""
    return int(x.ndim) - 1 if base(n) == "linear" else int(x.ndim - weight.ndim) + 1


@torch.no_grad()
def clear(
    model: nn.Module, inputs: Inputs, names: Collection[str], movable: Collection[str] = ()
) -> dict[str, Tensor]:
    """Fold and clear the dead units of `model`, in place; returns the parameters that changed, by name.

    `names` are the parameters that may change: only layers with all their parameters among them are changed.
    `movable` are the biases that can take any value; into other biases only constants of 0 are folded.
    RefusedError if the model cannot be traced or evaluated.
    """
    seen = followed(model, inputs)
    layers = {n: layer for n, layer in layers_of(seen).items() if set(layer.names) <= set(names)}
    before = {name: value.clone() for name, value in model.named_parameters()}
    changed = True
    while changed:
        constants, changed = constants_of(seen, layers), False
        for n, layer in layers.items():
            changed |= fold(layer, constants[n], movable)
        moving = units_with_gradients(seen, layers)
        for n, layer in layers.items():
            changed |= clear_unread(seen, layer, moving[n])
    after = dict(model.named_parameters())
    return {
        name: after[name].detach() for name, value in before.items() if not torch.equal(after[name], value)
    }


def constants_of(model: Followed, layers: dict[fx.Node, HiddenLayer]) -> dict[fx.Node, Tensor]:
    """For each layer the constant value of each of its input units, [I]; NaN if it depends on the input."""
    found: dict[fx.Node, Tensor] = {}

    def collect(n: fx.Node, x: Tensor, out: Tensor) -> Tensor:
        if n in layers:
            columns = x.movedim(units_axis(n, x, layers[n].weight), 0).flatten(1)  # [I, everything else]
            same = (columns == columns[:, :1]).all(1)  # NaN equals nothing
            found[n] = columns[:, 0].double().masked_fill(~same, torch.nan)
        return out

    model.outputs([depending(x) for x in model.leaves], collect)
    return found


def fold(layer: HiddenLayer, constant: Tensor, movable: Collection[str]) -> bool:
    """Fold the constants among a layer's inputs into its bias. Returns whether anything changed."""
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


class Gradients(fx.Interpreter):
    """An evaluation of the example that finds units of layers with a gradient in any sample and place. What
    treats all elements alike is left out, because a value that it clips would have no gradient."""

    def __init__(self, model: Followed, layers: dict[fx.Node, HiddenLayer]):
        super().__init__(model.graph.program.graph_module)
        self.layers = layers
        self.units = {n: torch.zeros(len(layer.weight), dtype=torch.bool) for n, layer in layers.items()}

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        alike = base(n) in EACH and len(n.all_input_nodes) == 1 and same_kind(args[0], value(n))
        out = args[0] if alike else super().run_node(n)
        if n in self.layers and out.requires_grad:
            axis = units_axis(n, out, self.layers[n].weight)

            def see(gradient: Tensor) -> None:
                flows = gradient.isfinite() & (gradient != 0)
                self.units[n] |= flows.movedim(axis, 0).flatten(1).any(1)

            out.register_hook(see)
        return out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(runnable(target), args, kwargs)


def same_kind(x: Any, y: Any) -> bool:
    return floating(x) and floating(y) and x.shape == y.shape and x.dtype == y.dtype


def units_with_gradients(model: Followed, layers: dict[fx.Node, HiddenLayer]) -> dict[fx.Node, Tensor]:
    """For each layer which of its units an output certainly depends on, bool [O]. It may depend on a unit
    without a gradient too: where a pool takes another value, and in a graph that writes in place."""
    run = Gradients(model, layers)
    if model.plain:
        draw = torch.Generator().manual_seed(0)
        still = {name: x.detach() for name, x in model.tensors.items()}
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() if floating(x) else x for x in model.leaves]
            with suppress(*MISFIT):  # of an operator without a derivative: what was found until then holds
                outputs = run.run(*model.graph.feed(still, leaves).values())
                moved = [x for x in tree_leaves(outputs) if floating(x) and x.requires_grad]
                if moved:
                    some = [torch.rand(x.shape, generator=draw, dtype=torch.float64).to(x) for x in moved]
                    torch.autograd.backward(moved, some)
    return run.units


def clear_unread(model: Followed, layer: HiddenLayer, moving: Tensor) -> bool:
    """Clear the units of this layer that no output depends on. Returns whether anything changed. `moving`:
    units that one does depend on, bool [O]."""
    nonzero = torch.stack([(p != 0).reshape(len(p), -1).any(1) for p in layer.tensors]).any(0)
    every, units, found = torch.nonzero(nonzero).flatten(), torch.nonzero(nonzero & ~moving).flatten(), False
    if not len(units):
        return False
    output = value(layer.node)
    axis, batch = units_axis(layer.node, output, layer.weight), samples_of(model)
    rest = [size for k, size in enumerate(output.shape) if k != axis]

    def reached(some: Tensor, at: Tensor | slice, inner: int) -> Tensor:
        """Which samples of the outputs depend on unit some[k] in sample at[k]; all, if an output without a
        batch axis does."""
        mask = torch.zeros(output.shape[axis], math.prod(rest), dtype=torch.bool)
        mask.unflatten(1, (-1, batch, inner)).movedim(2, 1)[some, at] = True
        mask = mask.unflatten(1, rest).movedim(0, axis)

        def mark(n: fx.Node, x: Tensor, out: Tensor) -> Tensor:
            return out.masked_fill(mask, torch.nan) if n is layer.node else out

        out = torch.zeros(batch, dtype=torch.bool)
        for x in model.outputs(model.leaves, mark, layer.node):
            if floating(x) and x.ndim and len(x) == batch:
                out |= x.isnan().reshape(batch, -1).any(1)
            elif x is DEPENDS or (floating(x) and x.isnan().any()):
                out[:] = True
        return out

    choices = list(inner_sizes(rest, batch))
    if not choices:
        raise RefusedError(f"{layer.names[0]}: the input of its layer has no batch axis")
    first = torch.arange(batch) == 0
    right = (k for k in choices if torch.equal(reached(every, torch.zeros(1, dtype=torch.int64), k), first))
    inner = next(right, choices[0]) if len(choices) > 1 else choices[0]
    for some in units.split(batch):
        unread = some[~reached(some, torch.arange(len(some)), inner)[: len(some)]]
        if len(unread) and reached(unread, slice(None), inner).any():
            raise RefusedError("its samples depend on each other")
        for p in layer.tensors:
            p[unread] = 0
        found |= len(unread) > 0
    return found


def samples_of(model: Followed) -> int:
    """The number of samples in the example."""
    sizes = [len(x) for x in model.leaves if isinstance(x, Tensor) and x.ndim]
    if not sizes:
        raise RefusedError("its inputs have no batch axis")
    return sizes[0]


def inner_sizes(shape: list[int], batch: int) -> Iterator[int]:
    """The possible layouts of samples in a tensor of this shape, each as the number of adjacent elements that
    one sample has."""
    for k, size in enumerate(shape):
        inner = math.prod(shape[k + 1 :])
        if size and size % batch == 0:
            yield size // batch * inner
            if size > batch:
                yield inner
