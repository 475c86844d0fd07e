"""AWQ: factors of the inputs of linear layers before their weights alone are rounded.

y = (W s) (x / s)        s by the error of outputs on the step's own grids: maths/activation_aware.py
1 / s goes exactly into what comes before, where these layers alone read it: the weight and bias of a layer
norm or RMS norm, the rows of a linear layer. Elsewhere the layer multiplies its inputs, as with `smooth`:
smoothing.py, whose rules say which layers can be scaled. The network in float stays the same: it is proved.
Cost: the second moments of the inputs, and 21 roundings of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError, few
from tersor.forms import Dense, Form, uncoded
from tersor.maths.activation_aware import aware_scales
from tersor.model.graph import op_name
from tersor.model.integer_edges import IntegerEdges
from tersor.model.integer_ops import IntegerLayer
from tersor.model.scaled_rows import scaled as scaled_form
from tersor.record.events import Edit, Event, Group, Note
from tersor.steps.activations import choice
from tersor.steps.layerwise import frozen
from tersor.steps.same_function import same_function
from tersor.steps.smoothing import fitting, scaled

WORTH = 0.95  # of the error: less must be left, or a layer is not worth another multiplication
NORMS = ("layer_norm", "rms_norm")


def activation_aware(
    view: View, chosen: set[str], rounded: Callable[[Tensor], Tensor]
) -> Generator[Group, None, View]:
    """The groups that scale the inputs of chosen layers; the view after them. `rounded`: a weight as it is
    decoded from its grid."""
    try:
        edges = choice(view, chosen, dynamic=True)
    except RefusedError as error:
        raise RefusedError(f"quantize: awq needs the graph of the forward: {error}") from error
    shared: dict[str, list[IntegerLayer]] = {}
    for layer in fitting(view, edges.layers):
        shared.setdefault(layer.source, []).append(layer)
    model = view.plain()
    modules, fixed = dict(model.named_modules()), frozen(model, view)
    events: list[Event] = []
    gains: dict[str, float] = {}
    folded: list[str] = []
    blind: list[str] = []  # layers whose inputs say nothing
    for some in shared.values():
        gram = view.gram(view.sites[some[0].weight])
        if gram is None or not bool(gram.isfinite().all()):
            blind += [view.sites[layer.weight].layer for layer in some]
            continue
        weights = [view.form(layer.weight).decode() for layer in some]
        s, gain = aware_scales(weights, gram, rounded)
        before = made_by(view, edges, modules, some, fixed)
        if gain >= (1.0 if before else WORTH):
            continue
        gains |= {view.sites[layer.weight].layer: round(gain, 4) for layer in some}
        if before:
            folded.append(before[0].rpartition(".")[0])
            events += [edit(view, name, 1 / s, 0) for name in before]
            events += [dense(view, layer.weight, s) for layer in some]
        else:
            for layer, weight in zip(some, weights, strict=True):
                events += scaled(view, layer, weight, s)
    text = (
        f"factors of the inputs of {len(gains)} layer{'s' * (len(gains) != 1)}, by the error of their outputs"
    )
    text += f"; {len(folded)} of what they read is scaled itself" if folded else ""
    text += f"; not observed, or NaN or infinite: inputs of {few(blind)}" if blind else ""
    note = Note("", "awq", text, {"error": gains, "folded": folded} | ({"blind": blind} if blind else {}))
    if not events:
        yield Group("awq", (note,))
        return view
    after, _ = yield from same_function(view, Group("awq", (*events, note), "same"), "scaled")
    return view if after is None else after


def made_by(
    view: View, edges: IntegerEdges, modules: Mapping[str, nn.Module], some: list[IntegerLayer],
    fixed: Collection[str],
) -> list[str]:  # fmt: skip
    """The tensors of the norm or linear layer whose output these layers read and nothing else does; none if
    there is no such layer, if its tensors are read elsewhere too, or if one is frozen."""
    graph = edges.graph
    item = next(node for node in graph.program.graph.nodes if node.name == some[0].source)
    node = edges.source(item)
    mine = {layer.weight for layer in some}
    readers = edges.readers.get(node, [])
    others = [reader for reader in readers if not set(edges.multiplied(reader)) & mine]
    if node.op != "call_function" or others or len(readers) != len(some) or item is not node:
        return []
    path = graph.path(node)
    module: Any = modules.get(path)
    plain = (nn.LayerNorm, nn.RMSNorm) if op_name(node) in NORMS else (nn.Linear,)
    if type(module) not in plain or op_name(node) not in (*NORMS, "linear"):
        return []
    names = [f"{path}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
    tied = {*view.state.aliases, *view.state.aliases.values()}
    fits = names and names[0] == f"{path}.weight".lstrip(".") and not {*tied, *fixed} & {*names}
    fits = fits and all(name in view.forms and uses(graph.tensors, name) == 1 for name in names)
    one = isinstance(module, nn.Linear) or len(module.normalized_shape) == 1
    held = all(scaled_form(uncoded(view.form(name)), torch.ones(view.shape(name)[0]), 0) for name in names)
    return names if fits and one and held else []


def uses(tensors: Mapping[fx.Node, str], name: str) -> int:
    return sum(len(node.users) for node, other in tensors.items() if other == name)


def edit(view: View, name: str, factor: Tensor, axis: int) -> Edit:
    """A tensor times a factor for each index of its first axis."""
    form = view.form(name)
    made = scaled_form(uncoded(form), factor, axis)
    if made is None:
        raise RefusedError(f"quantize: awq: {name} cannot be scaled")
    return Edit(name, form, coded_like(made, form), "refine")


def dense(view: View, name: str, s: Tensor) -> Edit:
    form: Form = view.form(name)
    return Edit(name, form, Dense((form.decode().double() * s).to(view.sites[name].torch_dtype)), "refine")
