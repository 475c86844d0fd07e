"""Scaling streams: layers between which each channel can have another scale, residual streams included.

makers      layers whose outputs the channels are:           rows of their weights and biases times s
readers     layers that read them:                            columns of their weights over s
f(s x) = s f(x) for s > 0: relu, leaky_relu, pools, means over positions, zero padding, views, and sums of
tensors that have the same scales. relu6 and clamp(0, top) do so for s >= 1 where s x <= top: channels that
stay below the top can use all of it. What anything else makes or reads keeps its scale, and so do the model's
inputs and outputs. Convolutions of any groups and linear layers, whose weights and biases nothing else reads.
Read from the traced graph. Used by steps/balance.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, fx, nn

from tersor.model.channel_order import reshaped, treats_alike
from tersor.model.dead_units import HiddenLayer, layers_of, units_axis
from tersor.model.graph import Inputs, arguments, floating, value, values
from tersor.model.nan_propagation import Followed, followed
from tersor.model.nan_rules import POOLS, RESHAPES, base

SAMPLES = 2  # more say nothing about a graph, and all its values are kept
HOMOGENEOUS = ("relu", "leaky_relu", "dropout", "feature_dropout", "clone", "contiguous", "detach")
CLIPS = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max"), "relu6": ()}


class Read(NamedTuple):
    """A layer that reads a stream, by the name of its weight."""

    weight: str
    groups: int
    block: int  # adjacent inputs for each channel: more than 1 after a flatten of feature maps

    def columns(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What multiplies the weight, of this shape, for scales [C] of the channels."""
        each = scale.repeat_interleave(self.block).view(self.groups, 1, -1)  # [G, 1, I / G]
        rows = each.expand(-1, shape[0] // self.groups, -1).flatten(0, 1)  # [O, I / G]
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


@dataclass
class Stream:
    """Tensors whose channels have the same scales."""

    makers: list[tuple[str, ...]] = field(default_factory=list)  # weight and bias
    readers: list[Read] = field(default_factory=list)
    edges: dict[str, int] = field(default_factory=dict)  # name -> the axis of the channels
    top: float = math.inf  # the least value at which something clips
    fixed: str = ""  # why its scales are what they are


class Streams:
    """The streams of one graph, joined operator by operator."""

    def __init__(self, model: Followed):
        self.model, self.layers = model, layers_of(model)
        self.parent: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, tuple[int, int]] = {}  # (axis of the channels, block)
        self.found: dict[fx.Node, Stream] = {}
        for node in (*model.graph.inputs, *model.graph.nodes):
            if node in model.graph.inputs or node not in model.graph.constant:
                self.add(node)
        for node in model.graph.output.all_input_nodes:
            self.fix(node, "it is an output")

    def add(self, node: fx.Node) -> None:
        self.parent[node], self.found[node] = node, Stream()
        if node.op != "call_function":
            self.fix(node, "it is an input")
        elif node in self.layers:
            self.layer(node, self.layers[node])
        elif (place := self.passed(node)) is not None:
            for before in node.all_input_nodes:
                self.join(before, node)
            self.places[node] = place
        else:
            why = f"{base(node) or node.name} depends on the scale"
            for each in (node, *node.all_input_nodes):
                self.fix(each, why)
        if node in self.places and len(values(node)) == 1 and self.places[node][1] == 1:
            name = self.model.graph.made.get((node, None))
            if name is not None:
                self.of(node).edges.setdefault(name, self.places[node][0])

    def layer(self, node: fx.Node, layer: HiddenLayer) -> None:
        before = node.args[0]
        axis = units_axis(node, value(node), layer.weight)
        if isinstance(before, fx.Node) and before in self.places:
            at, block = self.places[before]
            if at == axis:
                read = Read(layer.names[0], int(arguments(node).get("groups", 1)), block)
                self.of(before).readers.append(read)
            else:
                self.fix(before, f"{layer.names[0]} reads another axis")
        elif isinstance(before, fx.Node):
            self.fix(before, "its channels are split up")
        self.places[node] = axis, 1
        self.of(node).makers.append(layer.names)

    def passed(self, node: fx.Node) -> tuple[int, int] | None:
        """Where the channels are in the output of an operator that keeps their scales; None for others."""
        given, op = list(node.all_input_nodes), base(node)
        if not given or any(x not in self.places for x in given) or not floating(value(node)):
            return None
        (axis, block), shape = self.places[given[0]], tuple(value(given[0]).shape)
        if op in ("add", "sub") and len(given) == 2:
            alike = all(
                self.places[x] == (axis, block) and value(x).shape == value(node).shape for x in given
            )
            return (axis, block) if alike else None
        if len(given) > 1:
            return None
        if op in RESHAPES:
            at, wide = reshaped(shape, tuple(value(node).shape), axis, block)
            return None if at is None else (at, wide)
        if op in POOLS:
            return (axis, block) if treats_alike(node, axis, value(given[0])) else None
        if op == "mean":
            return self.averaged(node, axis, block, len(shape))
        if op in CLIPS:
            top = clipped(node)
            if top is not None:
                self.of(given[0]).top = min(self.of(given[0]).top, top)
            return None if top is None else (axis, block)
        if op in ("pad", "constant_pad_nd"):
            own = arguments(node)
            inner = axis < len(shape) - len(own["pad"]) // 2
            zero = own.get("mode", "constant") != "constant" or not own.get("value")
            return (axis, block) if inner and zero else None
        return (axis, block) if op in HOMOGENEOUS else None

    def averaged(self, node: fx.Node, axis: int, block: int, ndim: int) -> tuple[int, int] | None:
        own = arguments(node)
        axes = [at % ndim for at in own["dim"]] if own.get("dim") else []
        if not axes or axis in axes:
            return None
        return (axis if own.get("keepdim") else axis - sum(at < axis for at in axes)), block

    def of(self, node: fx.Node) -> Stream:
        return self.found[self.root(node)]

    def root(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def fix(self, node: fx.Node, why: str) -> None:
        if node in self.parent:
            stream = self.of(node)
            stream.fixed = stream.fixed or why

    def join(self, a: fx.Node, b: fx.Node) -> None:
        one, two = self.root(a), self.root(b)
        if one is two:
            return
        kept, other = self.found[one], self.found.pop(two)
        self.parent[two] = one
        kept.makers += other.makers
        kept.readers += other.readers
        kept.edges |= other.edges
        kept.top, kept.fixed = min(kept.top, other.top), kept.fixed or other.fixed


def clipped(node: fx.Node) -> float | None:
    """The upper end of an operator that clips at 0 and there; None for others."""
    if base(node) == "relu6":
        return 6.0
    low, high = (arguments(node).get(key) for key in CLIPS[base(node)])
    if low != 0 or isinstance(high, fx.Node) or isinstance(low, fx.Node):
        return None
    return math.inf if high is None else float(high) if high > 0 else None


def scaling_streams(model: nn.Module, inputs: Inputs) -> tuple[list[Stream], dict[str, str]]:
    """The streams in the order of the layers, and for the weights whose outputs are in none why. RefusedError
    if the graph cannot be followed."""
    streams, left = list[Stream](), dict[str, str]()
    for stream in Streams(followed(model, inputs, SAMPLES)).found.values():
        why = stream.fixed or ("" if stream.readers else "nothing reads it")
        if why:
            left |= {names[0]: why for names in stream.makers}
        elif stream.makers:
            streams.append(stream)
    return streams, left
