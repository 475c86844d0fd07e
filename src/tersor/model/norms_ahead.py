"""Norms ahead: batch norms whose output only linear layers and convolutions read, and scales after a layer.

W (f x + s) + b = (W f) x + (b + W s)      the norm before a layer; f, s one for each input (norm_pairs.py)
g (W x + b)     = (g W) x + g b            a module that only multiplies by a parameter, such as a LayerScale
A convolution that pads with zeros reads s inside of the image and 0 around it: then only a norm without a
shift can go into it. Dropout may be between, since it does nothing in eval mode. Cost: none beyond the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.model.graph import arguments, op_name, value
from tersor.model.norm_pairs import LAYERS, NORMS, Finder, NormPair, turned

BETWEEN = ("dropout", "feature_dropout", "clone", "contiguous", "alias")
VIEWS = ("view", "reshape", "unsqueeze", "expand", "alias")  # of a scale, on its way to the product


class Reader(NamedTuple):
    """A layer that reads a norm's output."""

    layer: str
    weight: str
    bias: str  # "" if it has none
    groups: int


class NormAhead(NamedTuple):
    """A norm and all that reads it."""

    norm: str
    readers: tuple[Reader, ...]
    factor: Tensor  # [I], float64
    shift: Tensor  # [I], float64


def columns(each: Tensor, reader: Reader, shape: tuple[int, ...]) -> Tensor:
    """One number for each input, [I], as it multiplies a weight [O, I / G, ...] of this shape."""
    rows = each.view(reader.groups, 1, -1).expand(-1, shape[0] // reader.groups, -1).flatten(0, 1)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


def norms_ahead(finder: Finder, left: Mapping[str, str]) -> tuple[list[NormAhead], dict[str, str]]:
    """(the norms that can go into what reads them, of those that `left` names; why the others cannot)."""
    calls: dict[str, list[fx.Node]] = {}
    for node in finder.graph.nodes:
        if op_name(node) == "batch_norm" and finder.graph.path(node) in left:
            calls.setdefault(finder.graph.path(node), []).append(node)
    found, why = [], {}
    for path, nodes in calls.items():
        one = ahead(finder, path, nodes)
        if isinstance(one, str):
            why[path] = one
        else:
            found.append(one)
    return found, why


def ahead(finder: Finder, path: str, nodes: list[fx.Node]) -> NormAhead | str:
    """The norm with its readers, or why it cannot go into them."""
    given = arguments(nodes[0])
    if type(finder.modules.get(path)) not in NORMS or len(nodes) > 1:
        return "it is called several times, or may do more than normalize"
    if given["running_mean"] is None or given["training"]:
        return "it normalizes with the statistics of the batch"
    for key in ("weight", "bias", "running_mean", "running_var"):
        if (name := finder.name(given[key])) and (finder.reads[name] != 1 or name in finder.tied):
            return f"{name} is used elsewhere too"
    if why := finder.unsafe(path):
        return why
    factor, shift = finder.numbers(given)
    width = value(nodes[0]).shape[1]
    factor, shift = factor.expand(width), shift.expand(width)
    readers = []
    for source, user in users(nodes[0]):
        reader = reader_of(finder, source, user, bool((shift != 0).any()))
        if isinstance(reader, str):
            return reader
        readers.append(reader)
    return NormAhead(path, tuple(readers), factor, shift) if readers else "nothing reads it"


def users(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(what is read, the operator that reads it), across operators that do nothing in eval mode."""
    found = []
    for user in node.users:
        through = op_name(user) in BETWEEN or (op_name(user) == "pad" and repeats(user))
        found += users(user) if through else [(node, user)]
    return found


def repeats(node: fx.Node) -> bool:
    """Whether a convolution's own padding repeats what is inside of the image, as all modes but zeros do."""
    return arguments(node)["mode"] in ("reflect", "replicate", "circular")


def reader_of(finder: Finder, source: fx.Node, node: fx.Node, shifts: bool) -> Reader | str:
    """The layer that this operator is, or why a norm cannot go into it. `shifts`: the norm has a shift."""
    if node.op == "output":
        return "it is an output"
    if op_name(node) == "pad":
        return "a constant around the image has no norm"
    path, given = finder.graph.path(node), arguments(node)
    module: Any = finder.modules.get(path)
    if not isinstance(module, LAYERS) or given.get("input") is not source:
        return f"{op_name(node)} reads it, and not only linear layers and convolutions"
    if why := finder.unsafe(path) or finder.other(node, path):
        return why
    weight, bias = (finder.name(given.get(key)) for key in ("weight", "bias"))
    if weight != f"{path}.weight" or bias not in ("", f"{path}.bias"):
        return f"the weight of {path} is computed"
    if not bias and module._parameters.get("bias") is not None:
        return f"{path} does not use its bias"
    if any(name and (finder.reads[name] != 1 or name in finder.tied) for name in (weight, bias)):
        return f"{weight} is used elsewhere too"
    if isinstance(module, nn.Linear):
        return Reader(path, weight, bias, 1) if value(source).ndim == 2 else f"{path} reads another axis"
    if module.transposed:
        return f"{path} is a transposed convolution"
    if shifts and pads(given["padding"], finder.tensors[weight].shape[2:]):
        return f"{path} pads with zeros, and the norm has a shift"
    return Reader(path, weight, bias, given["groups"])


def pads(padding: Any, kernel: Sequence[int]) -> bool:
    """Whether a call of a convolution pads with zeros. Other modes are an operator of their own."""
    return padding == "same" and max(kernel) > 1 if isinstance(padding, str) else any(padding)


def scale_pairs(finder: Finder) -> list[NormPair]:
    """Modules that only multiply the output of a layer by a parameter of theirs, one number an output."""
    inside: dict[str, list[fx.Node]] = {}
    for node in finder.graph.nodes:
        inside.setdefault(finder.graph.path(node), []).append(node)
    found = [scale_pair(finder, path, nodes) for path, nodes in inside.items()]
    return [pair for pair in found if pair is not None]


def scale_pair(finder: Finder, path: str, nodes: list[fx.Node]) -> NormPair | None:
    *views, product = nodes
    module = finder.modules.get(path)
    if not path or module is None or op_name(product).removesuffix("_") != "mul":
        return None
    if any(op_name(view) not in VIEWS for view in views) or any(module.children()):
        return None
    parameters = dict(module.named_parameters())
    if len(parameters) != 1 or any(module.buffers()) or finder.unsafe(path):
        return None
    (name,) = (f"{path}.{key}" for key in parameters)
    given = [item for item in product.args if isinstance(item, fx.Node)]
    sources = [scale_in(finder, item, set(views)) for item in given]
    if len(given) != 2 or sources.count(name) != 1 or finder.reads[name] != 1 or name in finder.tied:
        return None
    scale, before = given if sources[0] == name else given[::-1]
    while op_name(before) in BETWEEN and len(before.users) == 1:
        before = before.args[0]  # type: ignore[assignment]
    layer = finder.graph.path(before)
    maker: Any = finder.modules.get(layer)
    if not isinstance(maker, LAYERS) or len(before.users) != 1 or finder.unsafe(layer):
        return None
    if finder.other(before, layer) or value(product).dtype != value(before).dtype:
        return None
    own, out = arguments(before), value(before)
    weight, bias = (finder.name(own.get(key)) for key in ("weight", "bias"))
    if weight != f"{layer}.weight" or bias not in ("", f"{layer}.bias"):
        return None
    if any(each and (finder.reads[each] != 1 or each in finder.tied) for each in (weight, bias)):
        return None
    at = out.ndim - 1 if isinstance(maker, nn.Linear) else out.ndim - finder.tensors[weight].ndim + 1
    shape = (1,) * (out.ndim - value(scale).ndim) + tuple(value(scale).shape)
    factor = finder.tensors[name].detach().double().cpu().flatten()
    if any(size != (out.shape[at] if k == at else 1) for k, size in enumerate(shape)):
        return None
    return NormPair(layer, path, weight, bias, factor, torch.zeros_like(factor), turned(before))


def scale_in(finder: Finder, node: fx.Node, views: set[fx.Node]) -> str:
    """The parameter that this value is a view of; "" for any other."""
    while node in views:
        node = node.args[0]  # type: ignore[assignment]
    return finder.graph.tensors.get(node, "")
