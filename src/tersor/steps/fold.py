"""Fold: the same function with fewer operations: batch norms go into layers, units that change nothing go.

norms    W' = f W,  b' = f b + shift       f = gamma / sqrt(var + eps)      the norm becomes an identity
dead     a constant unit goes into the bias of what reads it, a unit that nothing reads goes; both are cut
merge    where a convolution pads, constant channels cannot go into its bias: one of them stands for all
After unstructured pruning many units are dead, and the network becomes smaller, not only sparser. Exact for
every input, up to rounding: nothing is trained and no data decides, only the graph. Constants are found with
NaN for "depends on the input" (model/nan_propagation.py). A folded net cannot train its batch norms any more.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.encode import coded_like
from tersor.errors import RefusedError, SettingError, few
from tersor.forms import Dense, Form, uncoded
from tersor.model.batches import move
from tersor.model.changes import Replace
from tersor.model.channels.dead_channels import LEAST
from tersor.model.channels.groups import Family, Groups
from tersor.model.channels.own_module import OwnModule
from tersor.model.example import example_inputs
from tersor.model.graph import traced
from tersor.model.norm_pairs import NormPair, norm_pairs, spread
from tersor.model.scaled_rows import multiplied, scaled
from tersor.record.events import Edit, Event, Group, Note
from tersor.setting_effects import Only, check_effect
from tersor.settings import check_settings
from tersor.steps.dead_units import Emptied, emptied
from tersor.steps.slim import cut_group
from tersor.steps.slim_layers import own_module

TRIES = 8  # cuts of dead units, each after more of the module's code was found to be fixed
Yields = Generator[Group, None, View]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Fold batch norms into layers, and cut units that change no output."""

    name: ClassVar[str] = "fold"
    only: ClassVar[Only] = {"merge": {"dead": (True,)}}
    norms: bool = True  # batch norms into the layers before them
    dead: bool = True  # constant units into biases; cut them, and units that nothing reads
    merge: bool = True  # one constant channel for all of them, where padding keeps them out of the bias
    where: str | tuple[str, ...] = "*"  # which sites, as a glob; "!" excludes

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.norms and not self.dead:
            raise SettingError("fold: norms=False and dead=False leave nothing to do; leave out one of them")
        check_effect(self)

    @property
    def needs(self) -> Needs:
        return Needs.MODEL | Needs.TASK | Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        chosen = {site.name for site in view.weights(self.where)}
        report, now = Report(), view
        if self.norms:
            now = yield from fold_norms(now, chosen, report)
        if self.dead:
            now = yield from self.remove_dead(now, chosen, report)
        was, left = parameters(view), parameters(now)
        text = f"{report.norms} batch norms folded, {report.units} units cut: "
        text += f"{was - left} of {was} parameters gone ({1 - left / max(was, 1):.1%})"
        facts = {"norms": report.norms, "units": report.units, "before": was, "after": left}
        yield Group("notes", (Note("", "folded", text, facts), *report.notes, *report.silent(now, chosen)))

    def remove_dead(self, view: View, chosen: set[str], report: Report) -> Yields:
        """The groups that fold and cut dead units; the view after them."""
        own = own_module(view, exact=True)
        own.fit()
        groups, gone, found = self.found(view, own, chosen)
        report.groups = groups
        if isinstance(found, str):
            report.notes.append(Note("", "skipped", f"dead units are not looked for: {found}"))
            return view
        now = view
        if found.forms:
            count = sum(found.zeros.values())
            note = Note("", "cleared", f"{count} weights and biases of dead units set to zero", {"count": count})
            told = [Note(n, "done", f"dead units folded: {k} zeros") for n, k in found.zeros.items()]
            group = Group("dead units", (*now.edits(found.forms), *told, note), "same")
            yield group
            if group.key in view.refused:
                report.why = "the fold of dead units was taken back"
                return view
            now = now.after(group)
            report.told |= set(found.forms)
        report.notes += found.unread(groups, now, gone)
        if not gone.any():
            return now
        units = int(gone.sum())
        note = Note("", "cut", f"{units} dead units", {"units": units})
        group = cut_group("cut", now, own.plan(groups, gone), groups, note)
        yield group
        if group.key in view.refused:
            report.why = "the cut of dead units was taken back"
            return now
        report.told |= {event.site for event in group.events if isinstance(event, Note)}
        report.units = units
        return now.after(group)

    def found(
        self, view: View, own: OwnModule, chosen: set[str]
    ) -> tuple[Groups, NDArray[np.bool_], Emptied | str]:
        """(groups, the mask of units that can be cut, the weights without dead units or why there are none)."""
        groups = own.groups()
        gone = groups.removed([])
        try:
            work = emptied(view, chosen, self.merge)
            for _ in range(TRIES):
                gone = work.dead(groups, eligible(groups, view, chosen))
                fault = own.check(groups, gone, own.plan(groups, gone)) if gone.any() else None
                if fault is None:
                    return groups, gone, work
                if not own.stiffen(groups, gone, fault):
                    break
                groups = own.groups()
        except RefusedError as error:
            return groups, groups.removed([]), str(error)
        return groups, groups.removed([]), work


@dataclass
class Report:
    """What the notes say at the end."""

    norms: int = 0
    units: int = 0
    told: set[str] = field(default_factory=set)  # sites with a note of their own
    notes: list[Note] = field(default_factory=list)
    groups: Groups | None = None
    why: str = ""  # nothing was cut

    def silent(self, view: View, chosen: set[str]) -> Iterator[Note]:
        """Notes on the weights that stay as they are."""
        for name in view.sites:
            if name in chosen - self.told:
                yield Note(name, "skipped", f"unchanged: {self.why or self.reason(view, name)}")

    def reason(self, view: View, name: str) -> str:
        if self.groups is None:
            return "no batch norm after it can be folded"
        if name not in self.groups.walk.tensors:
            return "the trace does not show it"
        frozen = self.groups.why_frozen(name, view.sites[name].axis)
        kept = max(frozen, key=lambda reason: frozen[reason]) if frozen else ""
        return f"its outputs cannot be cut ({kept})" if kept else "no unit of it is dead"


def parameters(view: View) -> int:
    return sum(int(np.prod(view.shape(site))) for site in view.sites.values() if site.kind != "buffer")


def eligible(groups: Groups, view: View, chosen: set[str]) -> list[Family]:
    """Families that may be cut: `where` chooses all of their weights."""
    found = []
    for family in groups.families:
        weights = {s.tensor for s in family.slices if view.sites[s.tensor].is_weight}
        if family.size > LEAST and chosen >= weights:
            found.append(family)
    return found


# Batch norms


def fold_norms(view: View, chosen: set[str], report: Report) -> Yields:
    """Fold all norms at once. If that is refused, one by one: rounding adds up over layers."""
    model = view.plain()
    graph = traced(model, move(example_inputs(view.task, model), device(model)))
    pairs, left = norm_pairs(model, graph, {*view.state.aliases, *view.state.aliases.values()})
    fits, now = [], view
    for pair in pairs:
        if pair.weight not in chosen:
            left[pair.norm] = f"where leaves out {pair.weight}"
        elif scaled_weight(view, pair) is None:
            left[pair.norm] = f"the form of {pair.weight} cannot be scaled for each output"
        else:
            fits.append(pair)
    if fits:
        group = norm_group("norms", view, fits)
        yield group
        if group.key not in view.refused:
            now, report.norms = view.after(group), len(fits)
            report.told |= {pair.weight for pair in fits}
        else:
            for pair in fits:
                group = norm_group(f"norm {pair.norm}", now, [pair])
                yield group
                if group.key in view.refused:
                    left[pair.norm] = "its proof failed"
                    continue
                now, report.norms = now.after(group), report.norms + 1
                report.told.add(pair.weight)
    if left:
        text = "; ".join(f"{path}: {why}" for path, why in left.items())
        report.notes.append(Note("", "left", f"{len(left)} batch norms stay: {text}", {"norms": len(left)}))
    return now


def norm_group(key: str, view: View, pairs: list[NormPair]) -> Group:
    """Events that fold these norms."""
    biases = [Replace(pair.layer, "bias") for pair in pairs if not pair.bias]
    now = view.after(Group("biases", tuple(biases))) if biases else view
    events: list[Event] = list(biases)
    for pair in pairs:
        name = f"{pair.layer}.bias"
        weight, bias = scaled_weight(view, pair), now.form(name)
        if weight is None:
            raise RefusedError(f"fold: {pair.weight} cannot be scaled for each output")
        value = pair.factor * bias.decode().double() + pair.shift
        plain = isinstance(uncoded(bias), Dense)
        events += [
            Edit(pair.weight, view.form(pair.weight), weight, "refine"),
            Edit(name, bias, Dense(value.to(now.sites[name].torch_dtype)), "refine" if plain else "absorb"),
            Replace(pair.norm, "identity"),
            Note(pair.weight, "done", f"{pair.norm} folded into it"),
        ]
    return Group(key, tuple(events), "same")


def scaled_weight(view: View, pair: NormPair) -> Form | None:
    """The weight's form times the norm's factors; None if it cannot hold them."""
    form, site = view.form(pair.weight), view.sites[pair.weight]
    plain = uncoded(form)
    if pair.turned > 1:
        after = multiplied(plain, spread(pair.factor, pair.turned, tuple(form.shape)))
    else:
        after = scaled(plain, pair.factor, site.axis)
    return None if after is None else coded_like(after, form)


def device(model: Any) -> torch.device:
    return next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
