"""Dead units: the weights of a view without its dead units, as forms, and which units can then be cut.

The model runs in float64 if it can. A parameter is changed only in ways that its form can hold:
Dense             any value
Masked            zeros by its mask; any value, with a wider mask, if its body is an array
other forms       zeros, if they can hold them
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError
from tersor.forms import Dense, Form, Masked, uncoded
from tersor.model.batches import move
from tersor.model.channels.dead_channels import dead_channels, nonzero, set_zero
from tersor.model.channels.groups import Family, Groups
from tersor.model.constant_channels import without_constants
from tersor.model.example import example_inputs
from tersor.model.graph import Inputs
from tersor.model.nan_propagation import followed
from tersor.model.output_comparison import float_caster
from tersor.record.events import Note
from tersor.steps.units import shortened

SAMPLES = 32  # of the example, each of which tries one unit in a pass


@dataclass
class Emptied:
    """A private copy of the model, without dead units."""

    view: View
    model: nn.Module
    inputs: Inputs
    names: frozenset[str]  # parameters that may get zeros
    movable: frozenset[str]  # biases that may get any value
    mergeable: frozenset[str]  # weights that may

    def clear(self) -> None:
        without_constants(self.model, self.inputs, self.names, self.movable, self.mergeable)

    def dead(self, groups: Groups, families: Collection[Family]) -> NDArray[np.bool_]:
        """The mask of units that can be cut. What they read is cleared too, which may make others dead."""
        seen = followed(self.model, shortened(self.inputs))
        while True:
            gone = dead_channels(groups, seen, families, self.view.sites)
            if not set_zero(groups, gone, seen.tensors, self.names):
                return gone
            self.clear()

    @property
    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, value before, value after) of each parameter that changed."""
        now = dict(self.model.named_parameters())
        for name in self.view.sites:
            if name in self.names:
                old, new = self.view.form(name).decode(), now[name].detach()
                if not torch.equal(old.to(new.dtype), new):
                    yield name, old, new.to(old.dtype)

    @property
    def forms(self) -> dict[str, Form]:
        """The forms that change."""
        found = {}
        for name, _, new in self.changes:
            before = self.view.form(name)
            after = stored(uncoded(before), new)
            if after is None:
                raise RefusedError(f"fold: the form of {name} cannot hold its new values")
            if after.digest != before.digest:
                found[name] = coded_like(after, before)
        return found

    @property
    def zeros(self) -> dict[str, int]:
        """How many elements became zero, for each parameter that changed."""
        return {name: int(((old != 0) & (new == 0)).sum()) for name, old, new in self.changes}

    def unread(self, groups: Groups, view: View, gone: NDArray[np.bool_]) -> Iterator[Note]:
        """Notes on inputs of the model that no unit reads: they are arguments, and stay."""
        tensors = dict(self.model.named_parameters())
        reasons = groups.walk.atoms.reasons
        for name, label in groups.walk.tensors.items():
            axis = view.sites[name].contracted
            if axis is None or "input" not in reasons:
                continue
            given = groups.solution.of(label[axis]) == reasons.index("input")
            count = int((given & ~nonzero(tensors[name], axis)).sum())
            if count:
                kept = groups.kept(label[view.sites[name].axis], gone)
                each = int(kept.sum()) * int(np.prod(view.shape(name))) // (len(kept) * len(given))
                text = f"{count} of {int(given.sum())} inputs are read by no unit; they stay, as arguments"
                yield Note(name, "unread", text, {"inputs": count, "parameters": count * each})


def emptied(view: View, chosen: Collection[str], merge: bool) -> Emptied:
    """The view's model without the dead units of these weights' layers. RefusedError if it cannot be
    followed."""
    part = view.part
    model = part.plain().cpu().eval()
    inputs = move(example_inputs(part.task, model), torch.device("cpu"))
    inputs = tree_map(lambda x: x[:SAMPLES] if isinstance(x, Tensor) and x.ndim else x, inputs)
    names, movable, mergeable = holding(view, chosen)
    work = Emptied(view, model, inputs, names, movable, mergeable if merge else frozenset())
    double = Emptied(
        view, part.plain().cpu().eval().double(), tree_map(float_caster(torch.float64), inputs),
        work.names, work.movable, work.mergeable,
    )  # fmt: skip
    try:
        double.clear()
        return double
    except RefusedError:  # its forward may use a fixed dtype
        work.clear()
        return work


def anything_empty(view: View) -> bool:
    """Whether any parameter has an empty row or column, or any norm a factor of 0. Else no unit is dead."""
    for site in view.sites.values():
        if not site.is_parameter or site.name.endswith("bias") or 0 in view.shape(site):
            continue
        live = view.form(site).decode() != 0
        axes = (live.movedim(k, 0).reshape(live.shape[k], -1).any(1) for k in range(min(live.ndim, 2)))
        if not all(bool(each.all()) for each in axes):
            return True
    return False


def holding(view: View, chosen: Collection[str]) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """(parameters that may get zeros, biases that may get any value, weights that may)."""
    layers = {view.sites[name].layer for name in chosen}
    weights = {site.name for site in view.sites.values() if site.is_weight}
    every = weights <= set(chosen)
    forms: Mapping[str, Form] = {
        name: uncoded(form) for name, form in view.forms.items()
        if view.sites[name].is_parameter and view.inside(name)
        and (every or name in chosen or (name not in weights and view.sites[name].layer in layers))
    }  # fmt: skip
    any_value = {n for n, form in forms.items() if isinstance(form, Dense)}
    wider = {n for n, form in forms.items() if isinstance(form, Masked) and isinstance(form.body, Dense)}
    zeros = {n for n, form in forms.items() if stored(form, torch.zeros_like(form.decode())) is not None}
    return frozenset(zeros), frozenset(any_value), frozenset((any_value | wider) & weights)


def stored(form: Form, value: Tensor) -> Form | None:
    """The form with these values; None if it cannot hold them."""
    if isinstance(form, Dense):
        return Dense(value.cpu().clone())
    old = form.decode()
    lost = (old != 0) & (value == 0)
    if isinstance(form, Masked):
        keep = (form.keep.decode() & ~lost) | (value != 0)
        if isinstance(form.body, Dense):
            return Masked(Dense(keep), Dense(value.cpu().clone()))
        return form.replace(keep=Dense(keep)) if torch.equal(value, old.masked_fill(lost, 0)) else None
    return form.zeroed(value == 0) if torch.equal(value, old.masked_fill(lost, 0)) else None
