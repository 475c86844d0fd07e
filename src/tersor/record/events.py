"""Events: what a step may yield, in keyed groups. Nothing is changed until the executor applies a group.

Edit(site, before, after, how)     this site's form, or this edge's grid, becomes that
Cut(site, axis, kept)              keep these indices of that axis, in this order, whatever form stands
Set, Replace                       this module's integer becomes that; this module becomes a stock one
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

PROOFS = ("masked", "same", "runs")


class Standing(Node):
    """In place of a form before: whatever stands. A journal says so of edits that were checked already."""

    name = "standing"


STANDING = Standing()


@dataclass(frozen=True, eq=False)
class Edit:
    """This site's form becomes that; at an edge of the graph a grid, where `before` may be None."""

    site: str
    before: Node | None
    after: Node
    how: str


@dataclass(frozen=True)
class Cut:
    """Of an axis of a site keep these indices, in this order. They are *given* indices, those of the tensor
    as it was first given: so cuts of one site along different axes commute, and a reordering is a cut too.

    `reads`: along this axis the weight reads what other layers make (inputs of a product, of a convolution):
    the proof puts zeros there in the model that the cut one is compared with.
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
    timed: bool = False  # it tells seconds: the report has it, the file does not

    def __post_init__(self) -> None:
        try:
            json.dumps(dict(self.data))
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"note {self.kind!r} of {self.site!r}: data is JSON, and this is not: {error}"
            ) from None


Event = Edit | Cut | Set | Replace | Note


@dataclass(frozen=True, eq=False)
class Group:
    """Events that are applied whole, at once, or taken back whole.

    `key` is unique in its step, and the same when the step runs again: a resumed run passes over the groups
    that it has. The proof of a group that changes a module's structure:
        masked   its answers are those before, with zeros where the cut units are read (what cuts default to)
        same     its answers are those before (what sets and replacements default to)
        runs     its answers change on purpose: they have the same shape and are finite
    """

    key: str
    events: tuple[Event, ...]
    proof: str = ""

    def __post_init__(self) -> None:
        if self.proof not in ("", *PROOFS):
            raise SettingError(
                f"group {self.key!r}: proof={self.proof!r}; {did_you_mean(self.proof, PROOFS)}"
            )
        object.__setattr__(self, "events", tuple(self.events))
        if not self.proof and any(isinstance(event, (Cut, Set, Replace)) for event in self.events):
            cuts = any(isinstance(event, Cut) for event in self.events)
            object.__setattr__(self, "proof", "masked" if cuts else "same")


def of(site: str, *events: Event) -> Group:
    """The group of one site that is done by itself: its key is the site's name."""
    return Group(site, events)
