"""Norm folding: batch norms into the layers before or after them, scales into the layers before them.

before   W' = f W,  b' = f b + shift               model/norm_pairs.py
after    W' = W f,  b' = b + W shift               model/norms_ahead.py
scale    W' = g W,  b' = g b                       a LayerScale: norms_ahead.py
All of a kind go in one group, proved as one; if the weights' dtype is too coarse for all, one by one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError
from tersor.forms import Dense, Form, uncoded
from tersor.model.batches import device_of, move
from tersor.model.changes import Replace
from tersor.model.example import example_inputs
from tersor.model.graph import traced
from tersor.model.norm_pairs import Finder, NormPair, norm_pairs, spread
from tersor.model.norms_ahead import NormAhead, Reader, columns, norms_ahead, scale_pairs
from tersor.model.scaled_rows import multiplied, scaled, widened
from tersor.record.events import Edit, Event, Group, Note
from tersor.steps.same_function import same_function
from tersor.steps.units import OUTSIDE

Fold = NormPair | NormAhead


@dataclass
class Folded:
    """What was folded, for the notes at the end."""

    norms: int = 0
    scales: int = 0
    told: set[str] = field(default_factory=set)  # sites with a note of their own
    notes: list[Note] = field(default_factory=list)


@contextmanager
def needing_a_graph() -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"fold: it needs the graph of the forward: {error}") from error


def fold_norms(view: View, chosen: set[str]) -> Generator[Group, None, tuple[View, Folded]]:
    """The groups that fold norms and scales among the chosen weights; (the view after them, what was
    folded)."""
    part = view.part
    model = part.plain()
    inputs = move(example_inputs(part.task, model), device_of(model))
    with needing_a_graph():
        graph = traced(model, inputs)
    tied = {*view.state.aliases, *view.state.aliases.values()}
    pairs, left = norm_pairs(model, graph, tied)
    left = {path: why if view.inside(path) else OUTSIDE for path, why in left.items()}
    finder = Finder(model, graph, tied)
    ahead, why = norms_ahead(finder, left)
    for norm in ahead:
        del left[norm.norm]
    for path, reason in why.items():
        left[path] += f"; after it: {reason}"
    folded, now = Folded(), view
    every: dict[str, Sequence[Fold]] = {"norms": pairs, "norms ahead": ahead, "scales": scale_pairs(finder)}
    for kind, some in every.items():
        fits = []
        for one in some:
            if outside := [name for name in weights_of(one) if name not in chosen]:
                left[one.norm] = f"where leaves out {outside[0]}"
            elif any(form is None for form in scaled_weights(view, one).values()):
                left[one.norm] = f"the form of {', '.join(weights_of(one))} cannot be scaled"
            else:
                fits.append(one)
        now = yield from in_groups(now, kind, fits, folded, left)
    scales = {one.norm for one in every["scales"]}
    for what, key, stay in (
        ("batch norms", "norms", {path: why for path, why in left.items() if path not in scales}),
        ("scales", "scales", {path: why for path, why in left.items() if path in scales}),
    ):
        if stay:
            text = "; ".join(f"{path}: {why}" for path, why in stay.items())
            folded.notes.append(Note("", "left", f"{len(stay)} {what} stay: {text}", {key: len(stay)}))
    return now, folded


def in_groups(
    now: View, kind: str, fits: Sequence[Fold], folded: Folded, left: dict[str, str]
) -> Generator[Group, None, View]:
    """Fold all of one kind at once; if the weights' dtype is too coarse for that, one by one."""
    groups = [(kind, fits)] if fits else []
    for key, some in groups:
        after, rounding = yield from same_function(now, group_of(key, now, some), f"{key}: folded")
        if after is not None:
            now = after
            if kind == "scales":
                folded.scales += len(some)
            else:
                folded.norms += len(some)
            folded.told |= {name for one in some for name in weights_of(one)}
        elif len(some) > 1:
            groups += [(f"norm {one.norm}", [one]) for one in some]
        else:
            left[some[0].norm] = f"its rounding changes the outputs by {rounding:.1g} of the largest"
    return now


def how(edit: Edit) -> str:
    """ "absorb" where a structure is lost: a grid's scale that was a product of two."""
    both = (form for form in (edit.before, edit.after) if isinstance(form, Form))
    before, after = ({(path, node.name) for path, node in form.walk()} for form in both)
    return "refine" if {p for p in before if p[1] == "lowrank"} <= after else "absorb"


def weights_of(one: Fold) -> list[str]:
    return [one.weight] if isinstance(one, NormPair) else [reader.weight for reader in one.readers]


def group_of(key: str, view: View, some: Sequence[Fold]) -> Group:
    """Events that fold these."""
    biases = [Replace(layer, "bias") for one in some for layer in new_biases(view, one)]
    now = view.after(Group("biases", tuple(biases))) if biases else view
    events: list[Event] = list(biases)
    for one in some:
        for name, weight in scaled_weights(now, one).items():
            if weight is None:
                raise RefusedError(f"fold: {name} cannot be scaled")
            before, dtype = uncoded(view.form(name)), view.sites[name].torch_dtype
            wide = f", in {dtype}".replace("torch.", "") if widened(before, dtype) is not before else ""
            events += [
                Edit(name, view.form(name), weight, "refine"),
                Note(name, "done", f"{one.norm} folded into it{wide}"),
            ]
        for name, value in new_values(now, one).items():
            form = now.form(name)
            how = "refine" if isinstance(uncoded(form), Dense) else "absorb"
            events.append(Edit(name, form, Dense(value.to(now.sites[name].torch_dtype)), how))
        events.append(Replace(one.norm, "identity"))
    return Group(key, tuple(events), "same")


def new_biases(view: View, one: Fold) -> list[str]:
    """The layers that need a bias and have none; another norm may have given them one."""
    if not bool((one.shift != 0).any()):
        return []
    layers: tuple[NormPair | Reader, ...] = (one,) if isinstance(one, NormPair) else one.readers
    return [each.layer for each in layers if f"{each.layer}.bias" not in view.forms]


def scaled_weights(view: View, one: Fold) -> dict[str, Form | None]:
    """The weights' forms times the factors; None if one cannot hold them."""
    found: dict[str, Form | None] = {}
    if isinstance(one, NormPair):
        form, site = view.form(one.weight), view.sites[one.weight]
        plain = widened(uncoded(form), site.torch_dtype)
        if one.turned > 1:
            after = multiplied(plain, spread(one.factor, one.turned, tuple(form.shape)))
        else:
            after = scaled(plain, one.factor, site.axis)
        return {one.weight: None if after is None else coded_like(after, form)}
    for reader in one.readers:
        form = view.form(reader.weight)
        plain = widened(uncoded(form), view.sites[reader.weight].torch_dtype)
        if reader.groups > 1:
            after = multiplied(plain, columns(one.factor, reader, tuple(form.shape)))
        else:
            after = scaled(plain, one.factor, 1)
        found[reader.weight] = None if after is None else coded_like(after, form)
    return found


def new_values(view: View, one: Fold) -> dict[str, torch.Tensor]:
    """The biases that change, in float64. `view` has a bias wherever one is needed."""
    if isinstance(one, NormPair):
        name = f"{one.layer}.bias"
        if name not in view.forms:
            return {}
        return {name: one.factor * view.form(name).decode().double() + one.shift}
    found = {}
    for reader in one.readers:
        name = f"{reader.layer}.bias"
        if name in view.forms and bool((one.shift != 0).any()):
            weight = view.form(reader.weight).decode().double()
            moved = (weight * columns(one.shift, reader, tuple(weight.shape))).flatten(1).sum(1)  # [O]
            found[name] = view.form(name).decode().double() + moved
    return found
