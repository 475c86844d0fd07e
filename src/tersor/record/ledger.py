"""Ledger: what happened since the model was first given, in order, by site name.

An entry is one event of one step. The digest is a chain over the steps: it covers decisions (settings, edits,
cuts, kinds of notes), not measurements. Two runs of one recipe have the same digest, and so have two steps in
one run and the same steps in two runs. Old steps may be shortened to a line: name and chain digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tersor.forms.form import DIGEST
from tersor.record.brief import BriefLedger
from tersor.record.events import Cut, Edit, Group, Note, Set
from tersor.record.relation import HOW

START = "start"  # in place of a step's name: notes about the model before the first step
# Keys of a recipe with one value for all steps or one for each, and their defaults.
EACH: Mapping[str, Any] = {"seed": 0, "zeros": "*"}


@dataclass(frozen=True)
class Entry:
    """One event. Edits and cuts have `how` and two digests. Sets and replacements have `how` and data, and a
    module as their site. Notes have a kind and a text."""

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
        """Whether the event changed anything; notes do not."""
        return bool(self.how)


@dataclass(repr=False)
class Ledger(BriefLedger):
    """The entries of all runs. For the steps in `past` only names and digests are kept."""

    base: str  # digest of the model as it was first given
    recipe: dict[str, Any] = field(default_factory=dict)  # of the steps after `past`
    entries: list[Entry] = field(default_factory=list)
    past: tuple[tuple[str, str], ...] = ()  # (name, digest of the ledger after it) of the oldest steps
    seconds: dict[int, float] = field(default_factory=dict)  # duration of each step, if it ran here

    def follow(self, recipe: Mapping[str, Any]) -> Ledger:
        """This ledger continued with the steps of another recipe. Each step keeps its seed and `zeros`."""
        steps = [*self.recipe.get("steps", []), *recipe["steps"]]
        each = {key: [*each_of(self.recipe, key), *each_of(recipe, key)] for key in EACH}
        joined = {**self.recipe, **recipe, "steps": steps}
        joined = {key: value for key, value in joined.items() if key not in EACH} | briefly(each)
        return replace(self, recipe=joined, entries=list(self.entries), seconds=dict(self.seconds))

    def record(self, step: int, name: str, group: Group, digests: Sequence[tuple[str, str]]) -> None:
        """Append a group of events. `digests`: (before, after) for each event."""
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
        """Equal for equal decisions. It does not cover texts and measured numbers of notes."""
        return self.chain()[-1]

    def chain(self) -> list[str]:
        """The digest before the first step that is not past, then the digest after each step."""
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
        """This ledger with the oldest `count` steps shortened to a line each, and without seconds."""
        count = max(count, len(self.past))
        here = count - len(self.past)
        names, recipe = self.step_names(), self.recipe
        lines = zip(names[len(self.past) : count], self.chain()[1 : here + 1], strict=True)
        if here:
            recipe = part_of(recipe, slice(here, None)) if names[count:] else {}
        entries = [entry for entry in self.entries if entry.step >= count and not entry.timed]
        return Ledger(self.base, recipe, entries, (*self.past, *lines))

    def until(self, count: int) -> Ledger:
        """The ledger as it was after `count` steps."""
        if count <= len(self.past):
            return Ledger(self.base, past=self.past[:count])
        here = count - len(self.past)
        recipe = part_of(self.recipe, slice(here))
        entries = [entry for entry in self.entries if entry.step < count or entry.name == START]
        seconds = {step: took for step, took in self.seconds.items() if step < count}
        return Ledger(self.base, recipe, entries, self.past, seconds)

    def ending(self, site: str, digest: str) -> Ledger:
        """This ledger with the last digest of a site replaced by `digest`."""
        places = [n for n, entry in enumerate(self.entries) if entry.site == site and entry.after]
        entries = list(self.entries)
        for last in places[-1:]:
            entries[last] = replace(entries[last], after=digest)
        return replace(self, entries=entries)

    def edits(self, first: int = 0) -> Iterator[Entry]:
        """The edits of step `first` and later ones; -1 is the last step."""
        return (entry for entry in self._since(first) if entry.is_edit)

    def notes(self, kind: str | None = None, first: int = 0) -> Iterator[Entry]:
        """The notes of a kind (None: all), of step `first` and later ones; -1 is the last step."""
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
    """The values of a key of a recipe (JSON), one per step. The recipe has one for all, or a list."""
    value, count = recipe.get(key, EACH[key]), len(recipe.get("steps", []))
    return list(value) if isinstance(value, list) else [value] * count


def briefly(each: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The inverse of each_of: one value if all are equal; `zeros` is left out if it is the default."""
    shortened = {key: values[0] if len(set(values)) == 1 else values for key, values in each.items()}
    return {key: value for key, value in shortened.items() if key == "seed" or value not in (EACH[key], [])}


def part_of(recipe: Mapping[str, Any], steps: slice) -> dict[str, Any]:
    """The recipe with these of its steps."""
    each = {key: each_of(recipe, key)[steps] for key in EACH}
    rest = {key: value for key, value in recipe.items() if key not in EACH}
    return {**rest, "steps": recipe.get("steps", [])[steps], **briefly(each)}
