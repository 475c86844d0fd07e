"""Ledger: what happened since the model was first given, in order, by site name.

An entry is one event of one step. Digests chain step by step over what was decided and done (settings, edits,
cuts, which notes), not over what was measured: two honest runs of one recipe agree on it, and so do one run
of two steps and two runs of one. Old steps may become a line each, with the digest that the chain had there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tersor.forms.form import DIGEST
from tersor.record.events import Cut, Edit, Group, Note, Set
from tersor.record.relation import HOW

START = "start"  # in place of a step's name: what is told of the model before the first step
# What a recipe says of all its steps or of each, and what goes without saying.
EACH: Mapping[str, Any] = {"seed": 0, "zeros": "*"}


@dataclass(frozen=True)
class Entry:
    """One event. Edits and cuts have `how` and two digests; sets and replacements `how` and data, their site
    is a module; notes have a kind and a text."""

    step: int  # position among all steps since the model was first given, from 0
    name: str  # the step's name
    site: str
    how: str = ""
    before: str = ""
    after: str = ""
    kind: str = ""
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = False

    @property
    def is_edit(self) -> bool:
        return self.how in HOW

    @property
    def changes(self) -> bool:
        """Whether it changed anything."""
        return bool(self.how)


@dataclass
class Ledger:
    """The entries of all runs. Of the steps in `past` only names and digests are left."""

    base: str  # digest of the model as it was first given
    recipe: dict[str, Any] = field(default_factory=dict)  # of the steps that are not past
    entries: list[Entry] = field(default_factory=list)
    past: tuple[tuple[str, str], ...] = ()  # (name, digest of the ledger after it) of the oldest steps
    seconds: dict[int, float] = field(default_factory=dict)  # what each step took, where it ran here

    def follow(self, recipe: Mapping[str, Any]) -> Ledger:
        """A ledger that goes on with the steps of another recipe: seeds and the like stay with their
        steps."""
        steps = [*self.recipe.get("steps", []), *recipe["steps"]]
        each = {key: [*each_of(self.recipe, key), *each_of(recipe, key)] for key in EACH}
        joined = {**self.recipe, **recipe, "steps": steps}
        joined = {key: value for key, value in joined.items() if key not in EACH} | briefly(each)
        return replace(self, recipe=joined, entries=list(self.entries), seconds=dict(self.seconds))

    def record(self, step: int, name: str, group: Group, digests: Sequence[tuple[str, str]]) -> None:
        """Append a group of events. `digests`: of what each event changed, before and after."""
        for event, (before, after) in zip(group.events, digests, strict=True):
            if isinstance(event, Note):
                words = "", "", "", event.kind, event.text
                entry = Entry(step, name, event.site, *words, dict(event.data), event.timed)
            elif isinstance(event, Edit):
                entry = Entry(step, name, event.site, event.how, before, after)
            elif isinstance(event, Cut):
                kept = hashlib.sha256(json.dumps(event.kept).encode()).hexdigest()[:DIGEST]
                data: dict[str, Any] = {"axis": event.axis, "count": len(event.kept), "kept": kept}
                entry = Entry(step, name, event.site, "cut", before, after, data=data)
            elif isinstance(event, Set):
                data = {"attribute": event.attribute, "value": event.value}
                entry = Entry(step, name, event.module, "set", data=data)
            else:
                data = {"stock": event.stock, "settings": dict(event.settings)}
                entry = Entry(step, name, event.module, "replace", data=data)
            self.entries.append(entry)

    @property
    def count(self) -> int:
        """Steps since the model was first given."""
        return len(self.past) + len(self.recipe.get("steps", []))

    @property
    def digest(self) -> str:
        """The same for the same decisions: texts and measured numbers of notes do not count."""
        return self.chain()[-1]

    def chain(self) -> list[str]:
        """The digest after each step that is not past, behind that of what came before them."""
        digests = [self.past[-1][1] if self.past else self.base]
        steps = zip(self.recipe.get("steps", []), each_of(self.recipe, "seed"), strict=True)
        for number, (step, seed) in enumerate(steps, len(self.past)):
            lines = [
                [e.name, e.site, e.how, e.before, e.after, e.kind, dict(e.data) if e.changes else {}]
                for e in self.entries
                if e.step == number and not e.timed
            ]
            body = json.dumps([digests[-1], seed, step, lines], sort_keys=True)
            digests.append(hashlib.sha256(body.encode()).hexdigest()[:DIGEST])
        return digests

    def brief(self, count: int) -> Ledger:
        """The same with the oldest `count` steps as a line each, and without seconds."""
        count = max(count, len(self.past))
        here = count - len(self.past)
        names, recipe = self.step_names(), self.recipe
        lines = zip(names[len(self.past) : count], self.chain()[1 : here + 1], strict=True)
        if here:
            recipe = part_of(recipe, slice(here, None)) if names[count:] else {}
        entries = [entry for entry in self.entries if entry.step >= count and not entry.timed]
        return Ledger(self.base, recipe, entries, (*self.past, *lines))

    def until(self, count: int) -> Ledger:
        """The ledger as it was after so many steps, of which none of the last is past."""
        if count <= len(self.past):
            return Ledger(self.base, past=self.past[:count])
        here = count - len(self.past)
        recipe = part_of(self.recipe, slice(here))
        entries = [entry for entry in self.entries if entry.step < count or entry.name == START]
        seconds = {step: took for step, took in self.seconds.items() if step < count}
        return Ledger(self.base, recipe, entries, self.past, seconds)

    def ending(self, site: str, digest: str) -> Ledger:
        """The same, where the last change of a site came to this digest."""
        places = [n for n, entry in enumerate(self.entries) if entry.site == site and entry.after]
        entries = list(self.entries)
        for last in places[-1:]:
            entries[last] = replace(entries[last], after=digest)
        return replace(self, entries=entries)

    def edits(self, first: int = 0) -> Iterator[Entry]:
        """The edits of this step and later ones; -1 is the last step."""
        return (entry for entry in self._since(first) if entry.is_edit)

    def notes(self, kind: str | None = None, first: int = 0) -> Iterator[Entry]:
        """The notes of a kind, of this step and later ones; -1 is the last step."""
        return (entry for entry in self._since(first) if not entry.changes and kind in (None, entry.kind))

    def _since(self, first: int) -> Iterator[Entry]:
        first += self.count if first < 0 else 0
        return (entry for entry in self.entries if entry.step >= first)

    def step_names(self) -> list[str]:
        return [
            *(name for name, _ in self.past),
            *(next(iter(step)) for step in self.recipe.get("steps", [])),
        ]


def each_of(recipe: Mapping[str, Any], key: str) -> list[Any]:
    """What a recipe as JSON says of each step: one value for all, or one for each."""
    value, count = recipe.get(key, EACH[key]), len(recipe.get("steps", []))
    return list(value) if isinstance(value, list) else [value] * count


def briefly(each: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The same the other way: one where all agree, and of "zeros" none where all are as usual."""
    told = {key: values[0] if len(set(values)) == 1 else values for key, values in each.items()}
    return {key: value for key, value in told.items() if key == "seed" or value not in (EACH[key], [])}


def part_of(recipe: Mapping[str, Any], steps: slice) -> dict[str, Any]:
    """The recipe of some of its steps."""
    each = {key: each_of(recipe, key)[steps] for key in EACH}
    rest = {key: value for key, value in recipe.items() if key not in EACH}
    return {**rest, "steps": recipe.get("steps", [])[steps], **briefly(each)}
