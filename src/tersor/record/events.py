"""Events: what a step may yield, in groups with keys. Nothing changes until the executor applies a group.

Edit(site, before, after, how)     replace a site's form or an edge's grid
Cut(site, axis, kept)              keep these indices of an axis, in this order, for any form
Set, Replace                       set an integer attribute of a module; replace a module by a stock one
Note(site, kind, text)             a fact
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.errors import SettingError, did_you_mean
from tersor.forms import Node
from tersor.model.changes import Replace, Set

PROOFS = ("masked", "counted", "zeroed", "same", "runs")


class Current(Node):
    """As `before` of an edit: the current form, unchecked. Edits that are read from a journal have it."""

    name = "standing"


CURRENT = Current()


@dataclass(frozen=True, eq=False)
class Edit:
    """Replace a site's form, or the grid of an edge; for an edge's first grid `before` is None."""

    site: str
    before: Node | None
    after: Node
    how: str


@dataclass(frozen=True)
class Cut:
    """Keep these indices of one axis of a site, in this order. They are *given* indices: of the tensor as
    it was first given. So cuts of one site along different axes commute. A reordering is a cut too.

    `reads`: along this axis the weight reads outputs of other layers (inputs of a product, of a convolution).
    The proof puts zeros there in the model that the cut one is compared with. A cut of whole units has it in
    every slice: their zeros must be everywhere.
    """

    site: str
    axis: int
    kept: tuple[int, ...]
    reads: bool = False

    def __post_init__(self) -> None:
        if any(type(index) is bool for index in (self.axis, *self.kept)):
            raise SettingError(f"cut {self.site}: indices are whole numbers, not true or false")
        object.__setattr__(self, "axis", operator.index(self.axis))
        object.__setattr__(self, "kept", tuple(operator.index(index) for index in self.kept))


@dataclass(frozen=True, eq=False)
class Note:
    """A fact about a site, or about the whole model (site ""). `data` is JSON: numbers and text."""

    site: str
    kind: str  # one word: "skipped", "done", "measured", "trained", "written", ...
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = False  # holds seconds: stored in the report, not in the file

    def __post_init__(self) -> None:
        try:
            json.dumps(dict(self.data))
        except (TypeError, ValueError) as error:
            raise SettingError(f"note {self.kind!r} of {self.site!r}: data must be JSON: {error}") from None


Event = Edit | Cut | Set | Replace | Note


@dataclass(frozen=True, eq=False)
class Group:
    """Events that are applied together or rolled back together.

    `key` is unique in its step and the same when the step runs again, so a resumed run skips groups that are
    in its journal. `proof` is the check of a group that changes a module's structure:
        masked   outputs equal those before with zeros where cut units are read (default for cuts)
        counted  the same, and normalizers count only what is kept; evaluated in the traced graph
        zeroed   outputs equal those before with zeros on the edges that `zeros` names
        same     outputs equal those before (default for sets and replacements)
        runs     outputs may change; they have the same shape and are finite
    """

    key: str
    events: tuple[Event, ...]
    proof: str = ""
    zeros: tuple[str, ...] = ()  # only the proof needs them, so a journal leaves them out

    def __post_init__(self) -> None:
        if self.proof not in ("", *PROOFS):
            raise SettingError(
                f"group {self.key!r}: proof={self.proof!r}; {did_you_mean(self.proof, PROOFS)}"
            )
        object.__setattr__(self, "events", tuple(self.events))
        if not self.proof and any(isinstance(event, (Cut, Set, Replace)) for event in self.events):
            cuts = any(isinstance(event, Cut) for event in self.events)
            object.__setattr__(self, "proof", "masked" if cuts else "same")


def site_group(site: str, *events: Event) -> Group:
    """A group about one site, with the site's name as its key."""
    return Group(site, events)
