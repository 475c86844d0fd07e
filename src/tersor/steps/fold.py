"""Fold: the same function with fewer operations: batch norms go into layers, units that change nothing go.

norms    W' = f W,  b' = f b + shift       f = gamma / sqrt(var + eps)      the norm becomes an identity;
         W' = W f,  b' = b + W shift       if it is before its layers; a LayerScale too: steps/norm_folding.py
dead     a constant unit goes into the bias of what reads it, a unit that nothing reads goes; both are cut
equalize    rescale the channels between two layers, so that their ranges agree: steps/equalize.py
merge    where a convolution pads, constant channels cannot go into its bias: one of them stands for all
After unstructured pruning many units are dead, and the network becomes smaller, not only sparser. Exact for
every input, up to rounding: nothing is trained and no data decides, only the graph. Constants are found with
NaN for "depends on the input" (model/nan_propagation.py). A folded net cannot train its batch norms any more.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError, SettingError
from tersor.model.channels.dead_channels import LEAST
from tersor.model.channels.groups import Family, Groups
from tersor.model.channels.own_module import OwnModule, Plan
from tersor.record.events import Cut, Event, Group, Note
from tersor.setting_effects import Only, check_effect
from tersor.settings import check_settings
from tersor.steps.dead_units import Emptied, anything_empty, emptied
from tersor.steps.equalize import equalized
from tersor.steps.norm_folding import fold_norms, how, needing_a_graph
from tersor.steps.units import OUTSIDE, own_module

TRIES = 8  # cuts of dead units, each after more of the module's code was found to be fixed
Yields = Generator[Group, None, View]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Fold batch norms into layers, and cut units that change no output."""

    name: ClassVar[str] = "fold"
    only: ClassVar[Only] = {"merge": {"dead": (True,)}}
    norms: bool = True  # batch norms into the layers before or after them, scales into the layers before
    dead: bool = True  # constant units into biases; cut them, and units that nothing reads
    merge: bool = True  # one constant channel for all of them, where padding keeps them out of the bias
    equalize: bool = False  # channels between two layers get scales with which both have equal ranges
    where: str | tuple[str, ...] = "*"  # which sites, as a glob; "!" excludes

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.norms and not self.dead and not self.equalize:
            raise SettingError("fold: norms=False and dead=False leave nothing to do; leave out one of them")
        check_effect(self)

    @property
    def needs(self) -> Needs:
        return Needs.MODEL | Needs.TASK | Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        chosen = {site.name for site in view.weights(self.where)}
        report, now = Report(), view
        if self.norms:
            now, folded = yield from fold_norms(now, chosen)
            report.norms, report.scales = folded.norms, folded.scales
            report.told |= folded.told
            report.notes += folded.notes
        if self.dead:
            now = yield from self.remove_dead(now, chosen, report)
        if self.equalize:
            now = yield from equalized(now, chosen)
        was, left = parameters(view), parameters(now)
        scales = f"{report.scales} scales folded, " if report.scales else ""
        text = f"{report.norms} batch norms folded, {scales}{report.units} units cut: "
        text += f"{was - left} of {was} parameters gone ({1 - left / max(was, 1):.1%})"
        facts = {"norms": report.norms, "scales": report.scales, "units": report.units}
        facts |= {"before": was, "after": left}
        yield Group("notes", (Note("", "folded", text, facts), *report.notes, *report.silent(now, chosen)))

    def remove_dead(self, view: View, chosen: set[str], report: Report) -> Yields:
        """The groups that fold and cut dead units; the view after them."""
        if not anything_empty(view):
            report.why = "no unit is dead: no weight has an empty row or column"
            return view
        with needing_a_graph():
            own = own_module(view, exact=True)
        if own.walk.trains_more:
            text = "dead units are not looked for: training reads tensors that eval mode does not"
            report.notes.append(Note("", "skipped", text))
            return view
        groups, gone, found = self.found(view, own, chosen)
        report.groups = groups
        if isinstance(found, str):
            report.notes.append(Note("", "skipped", f"dead units are not looked for: {found}"))
            return view
        now, forms, zeros = view, found.forms, found.zeros
        if forms:
            count = sum(zeros.values())
            text = f"{count} weights and biases of dead units set to zero"
            note = Note("", "cleared", text, {"count": count})
            told = [
                Note(name, "done", f"dead units folded: {zeros[name]} zeros")
                for name in forms if view.sites[name].is_weight
            ]  # fmt: skip
            edits = [replace(edit, how=how(edit)) for edit in now.edits(forms)]
            group = Group("dead units", (*edits, *told, note), "same")
            yield group
            if group.key in view.refused:
                report.why = "folding the dead units changed the outputs"
                return view
            now = now.after(group)
            report.told |= set(forms)
        report.notes += found.unread(groups, now, gone)
        if not gone.any():
            return now
        units = int(gone.sum())
        note = Note("", "cut", f"{units} dead units", {"units": units})
        group = cut_group("cut", now, own.plan(groups, gone), note)
        yield group
        if group.key in view.refused:
            report.why = "cutting the dead units changed the outputs"
            return now
        report.told |= {event.site for event in group.events if isinstance(event, Note)}
        report.units = units
        return now.after(group)

    def found(
        self, view: View, own: OwnModule, chosen: set[str]
    ) -> tuple[Groups, NDArray[np.bool_], Emptied | str]:
        """(groups, units that can be cut, the weights without dead units or why they are unknown)."""
        groups = own.fit()
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
    scales: int = 0
    units: int = 0
    told: set[str] = field(default_factory=set)  # sites with a note of their own
    notes: list[Note] = field(default_factory=list)
    groups: Groups | None = None
    why: str = ""  # nothing was cut

    def silent(self, view: View, chosen: set[str]) -> Iterator[Note]:
        """Notes on the weights that stay as they are."""
        for name in view.sites:
            if name in chosen - self.told:
                why = (self.why or self.reason(view, name)) if view.inside(name) else OUTSIDE
                yield Note(name, "skipped", f"unchanged: {why}")

    def reason(self, view: View, name: str) -> str:
        if self.groups is None:
            return "no batch norm beside it can be folded"
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


def cut_group(key: str, view: View, plan: Plan, note: Note) -> Group:
    """The events of a cut, with given indices. Its proof moves all weights at random, so no unit is dead."""
    events: list[Event] = []
    shapes: dict[str, list[int]] = {}
    for (name, axis), kept in plan.cuts.items():
        present, reads = view.present(name, axis), view.sites[name].kind != "buffer"
        events.append(Cut(name, axis, tuple(present[int(at)] for at in kept), reads))
        shapes.setdefault(name, list(view.shape(name)))[axis] = len(kept)
    for name, shape in shapes.items():
        if view.sites[name].is_weight:
            events.append(Note(name, "done", f"{list(view.shape(name))} -> {shape}", {"shape": shape}))
    return Group(key, (*events, *plan.sets, note), "masked")
