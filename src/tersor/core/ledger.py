"""Ledger: what happened, in order, by site name; with the forms before and after, so that it can be undone.

An entry is one event of one step. The digest covers what was decided and done (recipe, edits, which notes),
not what was measured, so that two honest runs of one recipe on one machine agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.core.step import Edit, Group
from tersor.forms import Form


@dataclass(frozen=True)
class Entry:
    """One event. Edits have `how` and two digests; notes have a kind and a text."""

    step: int  # position in the recipe, from 0
    name: str  # the step's name
    site: str
    how: str = ""
    before: str = ""
    after: str = ""
    kind: str = ""
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_edit(self) -> bool:
        return bool(self.how)


@dataclass
class Ledger:
    """The entries of a run. `forms` holds every form an edit names, by digest; a file may leave them out."""

    base: str  # digest of the model that was given
    recipe: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    forms: dict[str, Form] = field(default_factory=dict)

    def record(self, step: int, name: str, group: Group) -> list[Entry]:
        """Append a group of events and return its entries."""
        added = []
        for event in group:
            if isinstance(event, Edit):
                before, after = event.before.digest, event.after.digest
                self.forms |= {before: event.before, after: event.after}
                added.append(Entry(step, name, event.site, event.how, before, after))
            else:
                added.append(
                    Entry(step, name, event.site, kind=event.kind, text=event.text, data=dict(event.data))
                )
        self.entries += added
        return added

    @property
    def digest(self) -> str:
        """The same for the same decisions: texts and measured numbers of notes do not count."""
        lines = [[e.step, e.name, e.site, e.how, e.before, e.after, e.kind] for e in self.entries]
        body = json.dumps([self.base, self.recipe, lines], sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()[:16]

    def edits(self) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.is_edit)

    def notes(self, kind: str | None = None) -> Iterator[Entry]:
        return (entry for entry in self.entries if not entry.is_edit and kind in (None, entry.kind))

    def step_names(self) -> list[str]:
        return [next(iter(step)) for step in self.recipe.get("steps", [])]
