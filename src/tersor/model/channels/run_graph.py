"""Run graph: evaluate a traced graph with units cut, or with the same units set to zero. The reference.

cut      tensors without the removed slices; literals (shapes, bounds, numbers of groups) from the labels
masked   tensors with zeros there; normalizers that count channels see the kept ones only
Both must give the same outputs: that proves the labels, and what the cut model has to compute. Attention
keeps the scale of its original width. With `wide` all runs in float64, also where the code asks for float32.
Cost: one evaluation of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tersor.model.channels.atoms import Array, Label
from tersor.model.channels.groups import Groups
from tersor.model.channels.walk import inside
from tersor.model.graph import arguments, first, op_name, placeholders, value

See = Callable[[fx.Node, Any], None]
NARROW = (torch.float32, torch.float16, torch.bfloat16)
RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
COUNTING = ("layer_norm", "rms_norm", "group_norm", "mean", "var", "std", "amax", "amin", "softmax",
            "log_softmax", "_softmax", "logsumexp", "batch_norm", "instance_norm", "max", "min", "prod",
            "var_mean", "all", "any")  # fmt: skip


class GraphRun:
    """One evaluation."""

    def __init__(self, groups: Groups, gone: NDArray[np.bool_], *, cut: bool, wide: bool = False):
        self.groups, self.gone, self.cut, self.wide = groups, gone, cut, wide
        self.labels = groups.walk.labels

    @torch.no_grad()
    def outputs(
        self, tensors: Mapping[str, Tensor], leaves: Iterable[Any], see: See | None = None
    ) -> list[Tensor]:
        """The output tensors. `tensors`: all of the model, by first name, uncut. `leaves`: its arguments.
        `see(node, value)` is called after each operator."""
        feed = self.groups.graph.feed(tensors, leaves)
        env = {node: self.widened(self.placed(node, item)) for node, item in feed.items()}
        found = self.run(self.groups.graph.program.graph, env, see)
        return [item for item in flat(found) if isinstance(item, Tensor)]

    def widened(self, item: Any) -> Any:
        narrow = isinstance(item, Tensor) and item.is_floating_point() and self.wide
        return item.double() if narrow else item

    def placed(self, node: fx.Node, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        item = item.detach().clone()  # the graph may write to it
        name = self.groups.graph.tensors.get(node)
        if name not in self.groups.walk.tensors:
            return item
        for axis, kept in enumerate(self.keeps(self.groups.walk.tensors[name])):
            if kept.all():
                continue
            if self.cut:
                item = item.index_select(axis, places(kept, item))
            elif item.is_floating_point():
                item.index_fill_(axis, places(~kept, item), 0)
        return item

    def keeps(self, label: Label) -> list[NDArray[np.bool_]]:
        return [self.groups.kept(atoms, self.gone) for atoms in label]

    def sizes(self, label: Label) -> list[int]:
        return [int(kept.sum()) for kept in self.keeps(label)]

    def count(self, atoms: Array) -> int:
        return int(self.groups.kept(atoms, self.gone).sum())

    def run(self, graph: fx.Graph, env: dict[fx.Node, Any], see: See | None) -> Any:
        last = last_uses(graph)
        for node in graph.nodes:
            if node.op == "output":
                return fetch(node.args[0], env)
            if node.op == "call_function":
                inner, given = inside(node, graph.owning_module)
                if inner is not None:
                    values = (fetch(arg, env) for arg in given)
                    with self.region(node):
                        env[node] = self.run(inner, dict(zip(placeholders(inner), values, strict=True)), see)
                else:
                    found = self.call(node, env)
                    made = not node.all_input_nodes and self.wide  # a constant of the code, in its own dtype
                    env[node] = self.widened(found) if made else found
                if see is not None:
                    see(node, env[node])
            elif node.op == "get_attr":
                env[node] = getattr(graph.owning_module, str(node.target))
            for used in last.get(node, ()):
                env.pop(used, None)
        return None

    def region(self, node: fx.Node) -> AbstractContextManager[Any]:
        """What a wrapper of a region switches on; everything is in float64 if `wide`."""
        if op_name(node) != "wrap_with_autocast" or self.wide:
            return nullcontext()
        device, dtype, enabled, cached = cast(Any, node.args[:4])
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if op_name(node).startswith("_assert"):
            return None  # of the dtypes and layouts of the trace
        given = {key: fetch(item, env) for key, item in arguments(node).items()}
        for key, item in given.items():
            if self.wide and isinstance(item, torch.dtype) and item in NARROW:
                given[key] = torch.float64
        name = op_name(node).removesuffix("_")
        if not self.cut:
            if name in COUNTING and (found := self.counted(node, name, given)) is not None:
                return found
            return called(node, given)
        return called(node, self.narrowed(node, name, given))

    def label(self, node: Any) -> Any:
        return self.labels.get(node) if isinstance(node, fx.Node) else None

    def narrowed(self, node: fx.Node, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments with literals for the cut tensors."""
        mine = self.label(node)
        source: Label = (self.label(node.args[0]) or []) if node.args else []
        if name in RESHAPES:
            return {"self": given["self"], "__reshape__": self.sizes(mine)}
        if name in ("expand", "broadcast_to"):
            given["size"] = self.sizes(mine)
        elif name in ("repeat", "tile"):
            key = "repeats" if "repeats" in given else "dims"
            have = list(given["self"].shape)
            have = [1] * (len(mine) - len(have)) + have
            given[key] = [new // max(old, 1) for new, old in zip(self.sizes(mine), have, strict=True)]
        elif name == "repeat_interleave" and isinstance(given.get("repeats"), int):
            at = int(given["dim"]) % len(mine)
            given["repeats"] = self.sizes(mine)[at] // max(given["self"].shape[at], 1)
        elif name in ("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_full", "new_empty"):
            given["size"] = self.sizes(mine)
        elif name in ("slice", "narrow"):
            self.bounded(name, given, source)
        elif name in ("split", "chunk", "split_with_sizes", "tensor_split"):
            at = int(given.get("dim") or 0) % len(source)
            return {"self": given["self"], "__split__": [self.count(label[at]) for label in mine], "dim": at}
        elif name in ("layer_norm", "rms_norm"):
            given["normalized_shape"] = self.sizes(mine)[-len(given["normalized_shape"]) :]
        elif name == "scaled_dot_product_attention" and given.get("scale") is None:
            given["scale"] = value(first(node)).shape[-1] ** -0.5
        if node in self.groups.walk.groups:
            key = "num_groups" if name == "group_norm" else "groups"
            given[key] = self.count(self.groups.walk.groups[node])
        return given

    def bounded(self, name: str, given: dict[str, Any], label: Label) -> None:
        at = int(given.get("dim") or 0) % len(label)
        kept = self.groups.kept(label[at], self.gone)
        if kept.all():
            return
        size, start = len(kept), given.get("start") or 0
        start = start + size if start < 0 else start
        if name == "narrow":
            stop = start + given["length"]
        else:
            stop = size if given.get("end") is None else given["end"]
            stop = stop + size if stop < 0 else min(stop, size)
        before, inside_ = int(kept[:start].sum()), int(kept[:stop].sum())
        given["start"] = before
        given.update({"length": inside_ - before} if name == "narrow" else {"end": inside_})

    def counted(self, node: fx.Node, name: str, given: dict[str, Any]) -> Any:
        """A normalizer that sees only what is kept, with zeros at the rest; None if nothing is removed."""
        label, mine = self.label(first(node)), self.label(node)
        if not label or "other" in given:  # the larger of two tensors counts nothing
            return None
        if name == "batch_norm" and given["running_mean"] is not None and not given["training"]:
            return None
        keeps = self.keeps(label)
        if all(kept.all() for kept in keeps):
            return None
        key = next(iter(given))
        index = [places(kept, given[key]) for kept in keeps]

        def some(item: Tensor, index: list[Tensor]) -> Tensor:
            for axis, at in enumerate(index):
                item = item.index_select(axis, at)
            return item

        given[key] = x = some(given[key], index)
        if "normalized_shape" in given:
            k = len(given["normalized_shape"])
            given["normalized_shape"] = list(x.shape[-k:])
            own = index[-k:]
        else:
            own = index[1:2]
        for word in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(given.get(word), Tensor):
                given[word] = some(given[word], own)
        if node in self.groups.walk.groups:
            given["num_groups"] = self.count(self.groups.walk.groups[node])
        found = called(node, given)
        if isinstance(found, (tuple, list)):
            return [self.spread(each, own) for each, own in zip(found, mine, strict=True)]
        return self.spread(found, mine)

    def spread(self, found: Tensor, label: Label) -> Tensor:
        """What was made of the kept indices at their places, with zeros at the rest."""
        whole = found.new_zeros([len(atoms) for atoms in label])
        index = [places(kept, found) for kept in self.keeps(label)]
        if not index:
            return found
        whole[torch.meshgrid(*index, indexing="ij")] = found
        return whole


def places(kept: NDArray[np.bool_], like: Tensor) -> Tensor:
    """The indices that are kept, on the tensor's device."""
    return torch.from_numpy(np.flatnonzero(kept)).to(like.device)


def called(node: fx.Node, given: dict[str, Any]) -> Any:
    """The operator with these arguments by name."""
    target: Any = node.target
    if "__reshape__" in given:
        return given["self"].reshape(given["__reshape__"])
    if "__split__" in given:
        return list(torch.split(given["self"], given["__split__"], given["dim"]))
    schema = getattr(target, "_schema", None)
    if target is torch.ops.aten.view.default:
        return given["self"].reshape(given["size"])  # real strides may differ from those in the trace
    if schema is None:
        return target(*given.values())
    only = {a.name for a in schema.arguments if a.kwarg_only}
    args = [given[a.name] for a in schema.arguments if not a.kwarg_only and a.name in given]
    return target(*args, **{key: item for key, item in given.items() if key in only})


def fetch(item: Any, env: Mapping[fx.Node, Any]) -> Any:
    if isinstance(item, fx.Node):
        return env[item]
    if isinstance(item, (tuple, list)):
        return type(item)(fetch(each, env) for each in item) if type(item) in (tuple, list) else [
            fetch(each, env) for each in item
        ]  # fmt: skip
    if isinstance(item, slice):
        return slice(*(fetch(each, env) for each in (item.start, item.stop, item.step)))
    return item


def flat(item: Any) -> list[Any]:
    return [one for each in item for one in flat(each)] if isinstance(item, (tuple, list)) else [item]


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nothing after it reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        found.setdefault(node, []).append(used)
    return found
