"""Activations: grids on the edges that integer kernels read and write, from calibration batches.

edges    where a runtime reads or writes integers                          model/integer_edges.py
ranges   of the values on each edge, of the model with its new weights     model/observe.py
biases   multiples of input scale * weight scale, as accumulators are: 32 bits
Batch norms are folded first. An edge that no grid can hold, and a layer whose weight is not integers, stay in
float and are named. Cost: two passes over the calibration batches, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.view import View
from tersor.errors import RefusedError, SettingError, counted, few
from tersor.forms import Affine, Dense, Form, uncoded
from tersor.forms.at import At
from tersor.forms.form import from_rows, to_rows
from tersor.forms.grid import Grid
from tersor.maths.uniform_grid import requantize
from tersor.model.batches import device_of, move
from tersor.model.example import example_inputs
from tersor.model.graph import traced
from tersor.model.grid_part import outdated
from tersor.model.integer_edges import IntegerEdges
from tersor.model.integer_ops import IntegerLayer
from tersor.model.integer_weights import integer_weight
from tersor.model.observe import Range, grid_of, symmetric_grid, values_of
from tersor.model.task import Task
from tersor.model.watch import input_names, made_at
from tersor.record.events import Edit, Event, Group, Note
from tersor.steps.norm_folding import fold_norms
from tersor.steps.units import OUTSIDE

NO_KERNELS = "ONNX Runtime and OpenVINO have no kernels for 16-bit activations and compute these in float"
ACCUMULATOR = 2**30  # largest code of a bias: half of what 32 bits hold, the rest is for the sum


def check_weights(step: Any) -> None:
    """Refuse weights that integer kernels do not take beside integer activations."""
    wanted = {
        "scheme": ("uniform",),
        "symmetric": (True,),
        "per": ("channel", "tensor"),
        "bits": range(2, 9),
    }
    for key, values in wanted.items():
        if (value := getattr(step, key)) not in values:
            raise SettingError(
                f"quantize: {key}={value!r} with activations={step.activations}, but integer kernels "
                f"take weights with scheme=uniform, symmetric=true, per=channel or tensor, bits=2 to 8"
            )


def folded(view: View, chosen: set[str]) -> Generator[Group, None, View]:
    """The groups that fold batch norms and scales into layers; the view after them."""
    now, found = yield from fold_norms(view, chosen)
    if found.notes:
        yield Group("norms that stay", tuple(found.notes))
    return now


def choice(view: View, chosen: set[str], *, dynamic: bool = False, products: bool = True) -> IntegerEdges:
    """The edges for grids and the layers for integers, among the layers with these weights. `products`: of
    two activations too."""
    part = view.part
    model = part.plain()
    inputs = move(example_inputs(part.task, model), device_of(model))
    # What a part reads is no edge of the whole model's arguments: only its readers can round it.
    names = input_names(model, inputs) if part is view else []
    graph = traced(model, inputs)
    return IntegerEdges(graph, names, frozenset(chosen), dynamic=dynamic, products=products)


def check_grids(view: View, dynamic: bool) -> None:
    """RefusedError if edges have grids of the other kind: a layer would round twice."""
    for edge, grid in view.state.grids.items():
        if (grid.scale is None) != dynamic:
            given = "dynamic" if grid.scale is None else "from calibration batches"
            raise RefusedError(
                f"quantize: the range of {edge} is {given} already, and all ranges are of one kind. Give "
                f"all layers the same activation_range, or undo the earlier step"
            )


def rounded_before(view: View, products: bool) -> set[str]:
    """The integer weights that read an edge with a grid of an earlier step."""
    if not view.state.grids:
        return set()
    integers = {name for name, form in view.forms.items() if not isinstance(integer_weight(form), str)}
    layers = choice(view, integers, products=products).layers
    return {layer.weight for layer in layers if layer.edge in view.state.grids}


class Calibration(NamedTuple):
    """How grids of activations are found."""

    bits: int
    range: str
    percentile: float
    products: bool  # of two activations are integers too


def calibrated(view: View, after: Mapping[str, Form], chosen: set[str], how: Calibration) -> Rounded:
    """Grids for the edges around the chosen layers. `after`: new forms of weights."""
    forms = {**view.forms, **after}
    names = [name for name in view.sites if name in chosen]
    left = {name: why for name in names if isinstance(why := integer_weight(forms[name]), str)}
    found = choice(view, chosen - set(left) | rounded_before(view, how.products), products=how.products)
    task, model = view.part.task, view.part.plain(after)
    found, ranges, refused = edges_with_ranges(model, task, found, how)
    wanted = list(found.edges)
    if wanted:
        # What only an earlier step's layers need gets new ranges too, or it would stay stale.
        there = {*found.names.values()}
        old = [edge for edge in view.state.grids if edge not in wanted and made_at(edge) in there]
        more, out = ranges_or_refusals(model, task, old, how) if old else ({}, {})
        ranges, refused = ranges | more, refused | out
        wanted += [edge for edge in old if edge in more]
    grids = grids_of(found, ranges, wanted, bits_of(view, found, chosen - set(left), how))
    if not wanted:
        reasons = {**left, **refused}
        why = few(f"{name}: {why}" for name, why in reasons.items()) or "no layer reads an edge of the graph"
        way_out = " Calibrate with other batches, or" if refused else " To round weights alone,"
        raise RefusedError(
            f"quantize: no layer can compute with integers: {why}.{way_out} leave out activations"
        )
    reasons = in_float(view, found, names, left)
    possible = found.between if how.products else replace(found, products=True).between
    counts = (possible, 0) if how.products else (0, possible)
    return Rounded(view, dict(after), grids, found.layers, reasons, refused, *counts)


def edges_with_ranges(
    model: nn.Module, task: Task, found: IntegerEdges, how: Calibration
) -> tuple[IntegerEdges, dict[str, Range], dict[str, str]]:
    """(the edges for grids, without those that no grid can hold; their ranges; why the others have none)."""
    ranges, refused = dict[str, Range](), dict[str, str]()
    while missing := [edge for edge in found.edges if edge not in ranges]:
        more, out = ranges_or_refusals(model, task, missing, how)
        ranges, refused = ranges | more, refused | out
        found = replace(found, refused=frozenset(refused))  # other edges may be needed now
    return found, ranges, refused


def bits_of(view: View, found: IntegerEdges, chosen: set[str], how: Calibration) -> Callable[[str], int]:
    """The bits of an edge's grid. What layers of this step read or make has this step's, but no fewer than a
    layer of an earlier step reads it with; other edges keep theirs."""
    before = view.state.grids
    if not before:
        return lambda edge: how.bits
    mine, least = {*choice(view, chosen, products=how.products).edges}, dict[str, int]()
    for node, operands in found.weighted.items():
        read = {name for item in operands for name in found.places(node, item)}
        read |= {found.names[item] for item in operands if found.whole(item)}
        around = read | {found.names[item] for item in found.after(node) if item in found.names}
        if (found.beside(node) if node in found.pairs else {*found.multiplied(node)}) & chosen:
            mine |= around
            continue
        bits = max((before[name].bits for name in read if name in before), default=0)
        least |= {name: max(bits, least.get(name, 0)) for name in read}

    def bits_at(edge: str) -> int:
        own = how.bits if edge in mine or edge not in before else before[edge].bits
        return max(own, least.get(edge, 0))

    return bits_at


def grids_of(
    found: IntegerEdges, ranges: Mapping[str, Range], edges: Iterable[str], bits: Callable[[str], int]
) -> dict[str, Grid]:
    return {
        edge: (symmetric_grid if edge in found.symmetric else grid_of)(ranges[edge], bits=bits(edge))
        for edge in edges
    }


def expected_grids(view: View, chosen: set[str], how: Calibration | None) -> dict[str, Grid]:
    """The grids around the chosen layers with ranges from the float network: their weights are not rounded
    yet. `how`: None for dynamic ones."""
    if how is None:
        return {edge: Grid() for edge in choice(view, chosen, dynamic=True).edges}
    found = choice(view, chosen | rounded_before(view, how.products), products=how.products)
    found, ranges, _ = edges_with_ranges(view.part.plain(), view.part.task, found, how)
    return grids_of(found, ranges, found.edges, bits_of(view, found, chosen, how))


def dynamic(view: View, after: Mapping[str, Form], chosen: set[str]) -> Rounded:
    """Dynamic grids for what the chosen layers read. `after`: new forms of weights."""
    forms = {**view.forms, **after}
    names = [name for name in view.sites if name in chosen]
    left = {name: why for name in names if isinstance(why := integer_weight(forms[name]), str)}
    found = choice(view, chosen - set(left), dynamic=True)
    reasons = in_float(view, found, names, left)
    if not found.edges:
        why = few(f"{name}: {why}" for name, why in reasons.items())
        raise RefusedError(
            f"quantize: no layer can compute with integers: {why}. Dynamic ranges are for linear layers and "
            f"LSTMs: leave out activation_range=dynamic, or to round weights alone, leave out activations too"
        )
    return Rounded(view, dict(after), {edge: Grid() for edge in found.edges}, found.layers, reasons, {})


def in_float(view: View, found: IntegerEdges, names: list[str], left: dict[str, str]) -> dict[str, str]:
    """The weights that multiply no integers, and why. `left`: those whose form is not integers."""
    integers = {layer.weight for layer in found.layers}
    alone = [name for name in names if name not in integers and name not in left]
    return {name: found.why_float(name) if view.inside(name) else OUTSIDE for name in alone} | left


def ranges_or_refusals(
    model: nn.Module, task: Task, edges: Iterable[str], how: Calibration
) -> tuple[dict[str, Range], dict[str, str]]:
    """(the range of each edge, why the others have none). An attention mask in the values would be clipped
    by a grid, and then it would not mask any more. Zeros alone show no range."""
    refused: dict[str, str] = {}
    seen = values_of(model, task, edges, range=how.range, refused=refused, sound=True)
    ranges: dict[str, Range] = {}
    for edge, values in seen.items():
        found = values.range(bits=how.bits, percentile=how.percentile)
        if values.masked:
            refused[edge] = "it holds an additive attention mask"
        elif found is not None and not any(end.any() for end in found):
            refused[edge] = "all its values are 0 in the calibration batches"  # others would become 0 too
        elif edge not in refused and found is not None:
            ranges[edge] = found
    return ranges, refused


@dataclass
class Rounded:
    """Weights, biases and grids of a model that computes with integers."""

    view: View
    forms: dict[str, Form]  # new forms of weights, and then of biases
    grids: dict[str, Grid]
    layers: list[IntegerLayer]
    left: dict[str, str]  # weights whose layers stay in float: why
    refused: dict[str, str]  # edges that no grid can hold: why
    products: int = 0  # of two activations that are integers
    floats: int = 0  # of two activations that could be integers

    def after_training(self, view: View, forms: Mapping[str, Form]) -> Rounded:
        """The same with trained weights, on a view that has the grids."""
        return replace(self, view=view, forms=dict(forms))

    def notes(self) -> Iterator[Note]:
        count = len({layer.weight for layer in self.layers})  # a shared layer is listed once for each call
        whole = count + len(self.left)
        text = f"{count} of {whole} weights multiply integers"
        text += f", and {self.products} products of activations are integers" if self.products else ""
        text += f"; {counted(len(self.grids), 'edge')} with grids"
        text += f"; {self.floats} products of activations stay in float" if self.floats else ""
        if any(grid.scale is None for grid in self.grids.values()):
            text += ", with the range of each batch"
        if any(grid.bits > 8 for grid in self.grids.values()):
            text += f"; {NO_KERNELS}"
        if self.left:
            text += "; in float: " + few(f"{name} ({why})" for name, why in self.left.items())
        if self.refused:
            text += "; no grid on " + few(f"{edge} ({why})" for edge, why in self.refused.items())
        facts = {"layers": count, "edges": len(self.grids), "float": self.left, "refused": self.refused}
        facts |= {"products": self.products} if self.products else {}
        yield Note("", "integers", text, facts)

    def bias(self, layer: IntegerLayer) -> None:
        """Round a layer's bias to multiples of input scale * weight scale.

        Where the weights of an output are so small that its bias would overflow, or that the unit would be 0,
        their scale grows.
        """
        weight, name, grid = self.form(layer.weight), layer.bias, self.grids[layer.edge]
        integers = integer_weight(weight)
        if name is None or isinstance(integers, str) or not isinstance(uncoded(self.form(name)), Dense):
            return
        if grid.scale is None:  # the unit is not known before the model runs
            return
        bias, step = self.form(name).decode().double(), grid.scale.decode().double()
        least, scale = (bias.abs() / (ACCUMULATOR * step)).float(), integers.scale
        no_unit = (step.float() * scale).expand_as(least) == 0
        least = torch.where(no_unit, (torch.finfo(torch.float32).tiny / step).float(), least)
        small = scale.expand_as(least) < least
        if small.any():
            self.forms[layer.weight] = rescaled(weight, least)
            scale = torch.maximum(scale.expand_as(least), least)
        unit = (step.float() * scale).double()
        value = (bias / unit).round() * unit
        self.forms[name] = Dense(value.to(self.view.sites[name].torch_dtype))

    def form(self, name: str) -> Form:
        return self.forms.get(name) or self.view.form(name)

    def events(self, hows: Mapping[str, str], *, forms: bool = True) -> list[Event]:
        """Edits of weights and biases, then of grids: an edit of a weight makes older grids stale."""
        view, found = self.view, list[Event]()
        for name, form in self.forms.items() if forms else ():
            if form.digest != view.form(name).digest:
                found.append(Edit(name, view.form(name), form, hows.get(name, "absorb")))
        stale = any(isinstance(event, Edit) for event in found)
        for edge, grid in self.grids.items():
            before = view.state.grids.get(edge)
            before = outdated(before) if before and stale else before
            if before is None or before.digest != grid.digest:
                found.append(Edit(edge, before, grid, "refine"))
        return found


def rescaled(form: Form, least: Tensor) -> Form:
    """The integer weight with scales of at least `least` [O]."""

    def change(at: At) -> Form | None:
        grid = at.node
        if not isinstance(grid, Affine):
            return None
        scale = torch.maximum(grid.scale.decode().expand(len(least), 1), least[:, None])
        codes = requantize(to_rows(grid.decode(), grid.axis), scale, None, grid.bits, 0, True)
        codes = from_rows(codes, tuple(grid.shape), grid.axis).contiguous()
        return grid.replace(codes=Dense(codes), scale=Dense(scale))

    return At(uncoded(form)).rebuilt(change)
