"""Norm pairs: batch norms that alone read the output of one linear layer or convolution, from the graph.

y = gamma * (W x + b - mean) / sqrt(var + eps) + beta
  = (f W) x + f b + shift          f = gamma / sqrt(var + eps), shift = beta - f * mean, one for each output
A pair holds f and shift, in float64. Statistics are those of eval mode. A norm that cannot be folded has a
reason. Cost: none beyond the trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.model.graph import Graph, arguments, op_name, value

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# By name, so that timm is not imported: a batch norm, and then its children in a row, dropout and activation.
WITH_CHILDREN = ("timm.layers.norm_act.BatchNormAct2d",)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NormPair(NamedTuple):
    """A layer and the norm after it."""

    layer: str  # module paths
    norm: str
    weight: str  # the layer's tensors; bias "" if it has none
    bias: str
    factor: Tensor  # [O], float64
    shift: Tensor  # [O], float64
    turned: int = 0  # groups of a transposed convolution, whose weight is [I, O / G, ...]; 0 for others


def norm_pairs(
    model: nn.Module, graph: Graph, tied: Collection[str]
) -> tuple[list[NormPair], dict[str, str]]:
    """(the pairs in the order of the graph, norm -> why it cannot be folded). `tied`: tensors with several
    names."""
    finder = Finder(model, graph, tied)
    pairs, left = [], {}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if op_name(node) == "batch_norm":
            calls.setdefault(graph.path(node), []).append(node)
    for path, nodes in calls.items():
        found = finder.shared(nodes)
        if isinstance(found, NormPair):
            pairs.append(found)
        else:
            left[path] = found
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and path not in calls:
            left[path] = "the trace does not show it"
    return pairs, left


class Finder:
    """What is known of the model's modules and of how often its tensors are read."""

    def __init__(self, model: nn.Module, graph: Graph, tied: Collection[str]):
        self.graph, self.tied = graph, tied
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.reads = Counter(name for node, name in graph.tensors.items() for _ in node.users)
        self.tensors = dict((*model.named_parameters(), *model.named_buffers()))

    def shared(self, nodes: list[fx.Node]) -> NormPair | str:
        """The pair of a norm that is called at these nodes, or the reason why there is none. A head that all
        levels of a pyramid share is called several times: each time after the same layer."""
        layers = {self.graph.path(arguments(node)["input"]) for node in nodes}
        if len(layers) > 1:
            return f"it is called {len(nodes)} times, not always after the same layer"
        found = [self.pair(node, len(nodes)) for node in nodes]
        return next((why for why in found if isinstance(why, str)), found[0])

    def pair(self, node: fx.Node, calls: int) -> NormPair | str:
        """The pair of this norm, which is called so many times, or the reason why there is none."""
        given, path = arguments(node), self.graph.path(node)
        before = given["input"]
        layer = self.graph.path(before)
        kind = type(self.modules.get(path))
        if kind not in NORMS and f"{kind.__module__}.{kind.__qualname__}" not in WITH_CHILDREN:
            return f"a {kind.__name__} may do more than normalize"
        if given["running_mean"] is None or given["training"]:
            return "it normalizes with the statistics of the batch"
        if not isinstance(self.modules.get(layer), LAYERS):
            return f"it reads {op_name(before)}, and not a linear layer or a convolution"
        if len(before.users) > 1:
            return f"the output of {layer} is read elsewhere too"
        if why := self.unsafe(path) or self.unsafe(layer) or self.other(before, layer):
            return why
        own = arguments(before)
        weight, bias = (self.name(own.get(key)) for key in ("weight", "bias"))
        if weight != f"{layer}.weight" or bias not in ("", f"{layer}.bias"):
            return f"the weight of {layer} is computed"
        if not bias and self.modules[layer]._parameters.get("bias") is not None:
            return f"{layer} does not use its bias"
        at, wide = 1, value(before).ndim
        if value(node).dtype != value(before).dtype:
            return "it changes the dtype"
        if wide != (2 if isinstance(self.modules[layer], nn.Linear) else self.tensors[weight].ndim):
            return f"axis {at} of its input holds no outputs of {layer}"
        keys = ("weight", "bias", "running_mean", "running_var")
        for name in (weight, bias, *(self.name(given[key]) for key in keys)):
            if name and (self.reads[name] != calls or name in self.tied):
                return f"{name} is used elsewhere too"
        factor, shift = self.numbers(given)
        return NormPair(layer, path, weight, bias, factor, shift, turned(before))

    def other(self, node: fx.Node, layer: str) -> str:
        """Why this is not the operator of the layer's class, as in a subclass; "" if it is."""
        module = self.modules[layer]
        own = "linear"
        if not isinstance(module, nn.Linear):
            own = f"conv{'_transpose' * module.transposed}{len(module.kernel_size)}d"
        return "" if op_name(node) == own else f"{layer} calls {op_name(node)}, and not {own}"

    def unsafe(self, path: str) -> str:
        module = self.modules[path]
        if self.names[id(module)] > 1:
            return f"{path} has several names"
        if any(getattr(module, key, None) for key in HOOKS):
            return f"{path} has a hook, which may see other values"
        return ""

    def name(self, node: Any) -> str:
        return self.graph.tensors.get(node, "computed") if isinstance(node, fx.Node) else ""

    def numbers(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        def number(key: str, missing: float) -> Tensor:
            name = self.name(given[key])
            return self.tensors[name].detach().double().cpu() if name else torch.full((1,), missing).double()

        factor = number("weight", 1.0) / (number("running_var", 1.0) + given["eps"]).sqrt()
        return factor, number("bias", 0.0) - factor * number("running_mean", 0.0)


def turned(node: fx.Node) -> int:
    """The groups of a transposed convolution; 0 for others. A subclass may call it with its own."""
    return int(arguments(node)["groups"]) if op_name(node).startswith("conv_transpose") else 0


def spread(factor: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """The factors of a transposed convolution's outputs as [I, O / G, 1, ...]: group g has I / G inputs."""
    each = factor.reshape(groups, shape[1]).repeat_interleave(shape[0] // groups, 0)
    return each.reshape(*shape[:2], *[1] * (len(shape) - 2))
