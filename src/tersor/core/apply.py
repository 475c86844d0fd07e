"""Apply: a group of events on a state, checked, all or none.

An edit must start from the current form and change it as its `how` states (record/relation.py). A cut names
given indices that are still present. An event that can change an output makes the grids of edges stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from tersor.core.state import State
from tersor.errors import RefusedError
from tersor.forms import Form, Grid
from tersor.model.changed_copy import changed_in_place, changed_structure
from tersor.model.changes import Replace, Set
from tersor.model.grid_part import outdated
from tersor.model.replaced_sites import edge_gone, site_changes
from tersor.record.events import CURRENT, Cut, Edit, Group, Note
from tersor.record.relation import relation_error

T = TypeVar("T")
Digests = tuple[str, str]  # before and after


def apply(state: State, group: Group, who: str) -> tuple[State, list[Digests]]:
    """The state after a group, and for each event the digests before and after it."""
    digests, structure = [], None
    for event in group.events:
        if isinstance(event, Note):
            digests.append(("", ""))
            continue
        if isinstance(event, Edit):
            state, found = edited(state, event, who)
        elif isinstance(event, Cut):
            state, found = cut(state, event, who)
        else:
            if isinstance(event, Replace) and structure is None and state.given is not None:
                structure = changed_structure(state.given, state.changes)
            state, found = restructured(state, event, who, structure), ("", "")
            # A copy for each change would take a square of their number.
            structure = None if structure is None else changed_in_place(structure, event)
        digests.append(found)
        if not (isinstance(event, Edit) and (event.how == "lossless" or isinstance(event.after, Grid))):
            # Without a graph, the edges downstream of this weight are unknown: all grids become stale.
            state = replace(state, grids={edge: outdated(grid) for edge, grid in state.grids.items()})
    return state, digests


def edited(state: State, edit: Edit, who: str) -> tuple[State, Digests]:
    given = state.nodes.get(edit.site) if edit.before is CURRENT else edit.before
    before = "" if given is None else given.digest
    if isinstance(edit.after, Grid):
        grid = state.grids.get(edit.site)
        if before != ("" if grid is None else grid.digest):
            raise RefusedError(f"{who}: {edit.site}: the edit starts from another grid than the current one")
        return replace(state, grids={**state.grids, edit.site: edit.after}), (before, edit.after.digest)
    after, current = edit.after, state.forms.get(edit.site)
    if current is None or not isinstance(after, Form) or current.digest != before:
        raise RefusedError(f"{who}: {edit.site}: the edit starts from another form than the current one")
    if why := relation_error(edit.how, current, after, state.sites[edit.site].torch_dtype):
        raise RefusedError(f"{who}: {edit.site}: {why}")
    return replace(state, forms={**state.forms, edit.site: after}), (before, after.digest)


def cut(state: State, event: Cut, who: str) -> tuple[State, Digests]:
    """Keep some indices of the current form along one axis. The event names indices of the given tensor."""
    if event.site not in state.forms:
        tied = f"; it is tied to {state.aliases[event.site]}" if event.site in state.aliases else ""
        raise RefusedError(f"{who}: {event.site}: no such weight to cut{tied}")
    before, axes = state.forms[event.site], len(state.sites[event.site].shape)
    if not 0 <= event.axis < axes:
        raise RefusedError(f"{who}: {event.site}: axis {event.axis} of {axes} cannot be cut")
    place = {index: at for at, index in enumerate(state.present(event.site, event.axis))}
    gone = [index for index in event.kept if index not in place]
    if gone or not event.kept or len(set(event.kept)) < len(event.kept):
        what = f"index {gone[0]}, which is not present" if gone else "no index, or one twice"
        raise RefusedError(f"{who}: {event.site}: a cut of axis {event.axis} keeps {what}")
    after = before.take(event.axis, torch.tensor([place[index] for index in event.kept]))
    kept = {**state.kept, event.site: {**state.kept.get(event.site, {}), event.axis: event.kept}}
    return replace(state, forms={**state.forms, event.site: after}, kept=kept), (before.digest, after.digest)


def restructured(state: State, event: Set | Replace, who: str, module: nn.Module | None) -> State:
    """Set a module's integer, or replace a module: its sites are removed, and new ones are made from them.
    `module`: the structure before a replacement."""
    if isinstance(event, Set):
        return replace(state, changes=(*state.changes, event))
    if module is None:
        raise RefusedError(f"{who}: {event.module}: replacing a module needs the model, not only its weights")
    removed, added, aliases = site_changes(event, state.sites, state.forms, state.aliases, module)

    def rest(table: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in table.items() if name not in removed}

    sites = {**rest(state.sites), **{name: site for name, (site, _) in added.items()}}
    forms = {**rest(state.forms), **{name: form for name, (_, form) in added.items()}}
    state = replace(state, sites=sites, forms=forms, aliases=aliases, kept=rest(state.kept))
    grids = {edge: grid for edge, grid in state.grids.items() if not edge_gone(event, edge, grid)}
    return replace(state, grids=grids, changes=(*state.changes, event))
