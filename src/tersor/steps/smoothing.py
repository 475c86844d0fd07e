"""Smoothing: linear layers get factors of their inputs where outliers would need coarse steps.

A layer is replaced by one that multiplies its inputs (model/scaled_inputs.py), its weight by the inverse.
That computes the same; what changes is how well integers fit: maths/smoothing.py. Layers that read the same
values share their factors, so a runtime multiplies once. Layers whose rounding noise does not shrink to WORTH
are left alone. Cost: one or two passes over the calibration batches.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn

from tersor.core.view import View
from tersor.errors import counted
from tersor.forms import Dense, uncoded
from tersor.maths.smoothing import smoothing
from tersor.model.changes import Replace
from tersor.model.integer_ops import IntegerLayer
from tersor.model.observe import Range, values_of
from tersor.model.scaled_inputs import LINEAR
from tersor.record.events import Edit, Event, Group, Note
from tersor.steps.same_function import same_function

WORTH = 0.7  # of the noise: less must be left, or a layer is not worth another multiplication


def smoothed(
    view: View, layers: list[IntegerLayer], bits: int, input_bits: int, *, dynamic: bool
) -> Generator[Group, None, View]:
    """The groups that smooth these layers; the view after them. Dynamic ranges clip nothing."""
    shared: dict[str, list[IntegerLayer]] = {}
    for layer in fitting(view, layers):
        shared.setdefault(layer.source, []).append(layer)
    ranges = channel_ranges(view, [layer for some in shared.values() for layer in some])
    events: list[Event] = []
    gains = {}
    for some in shared.values():
        some = [layer for layer in some if layer.read in ranges]
        gram = view.gram(view.sites[some[0].weight]) if some else None
        if gram is None:
            continue
        weights = [view.form(layer.weight).decode() for layer in some]
        halves, samples = ranges[some[0].read]
        clips = math.inf if dynamic else samples
        s, gain = smoothing(
            torch.cat(weights), halves, gram.diagonal(), clips, bits=bits, input_bits=input_bits
        )
        if gain < WORTH:
            for layer, weight in zip(some, weights, strict=True):
                events += scaled(view, layer, weight, s)
                gains[view.sites[layer.weight].layer] = round(gain, 4)
    if not events:
        return view
    text = f"{counted(len(gains), 'layer')} with multiplied inputs, so that outliers need no coarser steps"
    group = Group("smoothed", (*events, Note("", "smoothed", text, {"noise": gains})))
    after, _ = yield from same_function(view, group, "smoothed")
    return view if after is None else after


def fitting(view: View, layers: list[IntegerLayer]) -> list[IntegerLayer]:
    """The layers that can be replaced: plain linear ones with a weight of their own, read once."""
    modules = dict(view.plain().named_modules())
    tied = {*view.state.aliases, *view.state.aliases.values()}
    inside = {
        name for path, module in modules.items() if isinstance(module, nn.MultiheadAttention)
        for name in (f"{path}.out_proj".lstrip("."), path)
    }  # fmt: skip
    count: dict[str, int] = {}
    for layer in layers:
        count[layer.weight] = count.get(layer.weight, 0) + 1
    return [
        layer for layer in layers
        if layer.op == "linear" and type(modules.get(path := view.sites[layer.weight].layer)) in LINEAR
        and path not in inside and layer.weight not in tied and count[layer.weight] == 1
        and isinstance(uncoded(view.form(layer.weight)), Dense)
    ]  # fmt: skip


def channel_ranges(view: View, layers: list[IntegerLayer]) -> Mapping[str, tuple[tuple[Range, Range], int]]:
    """(the ranges of each input of the layers in two halves of the samples, how many samples), by the name of
    what they read. What calibration shows a single time has no halves, and is left out."""
    found: dict[str, tuple[tuple[Range, Range], int]] = {}
    model, task = view.part.plain(), view.part.task
    for ndim in sorted({layer.ndim for layer in layers}):
        names = dict.fromkeys(layer.read for layer in layers if layer.ndim == ndim)
        refused: dict[str, str] = {}
        seen = values_of(model, task, names, axis=ndim - 1, refused=refused)
        for name, values in seen.items():
            if name not in refused and not values.masked and (halves := values.halves) is not None:
                found[name] = halves, values.count // len(halves[0][0])
    return found


def scaled(view: View, layer: IntegerLayer, weight: Tensor, s: Tensor) -> list[Event]:
    """The events that give one layer its factors."""
    path, dtype = view.sites[layer.weight].layer, view.sites[layer.weight].torch_dtype
    change = Replace(path, "scaled")
    factor = f"{path}.factor".lstrip(".")
    ones = view.after(Group("factor", (change,))).form(factor)
    return [
        change,
        Edit(factor, ones, Dense((1 / s).to(dtype)), "refine"),
        Edit(layer.weight, view.form(layer.weight), Dense((weight.double() * s).to(dtype)), "refine"),
    ]
