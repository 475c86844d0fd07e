"""Step: one technique with its settings, and the only two things it may yield.

    class Quantize:                                   a frozen dataclass; its fields are the settings
        name = "quantize"                             its word in YAML and on the command line
        def run(self, view) -> Iterator[Group]   looks at the view, yields groups of events; changes nothing

An edit says how it treats the old form:
    wrap      the old form is a child of the new          refine   leaves replaced, the rest stands
    lossless  decodes to the same bits   absorb   decoded and encoded anew: earlier structure is gone
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tersor.forms import Form

if TYPE_CHECKING:
    from tersor.core.view import View

HOW = ("wrap", "refine", "lossless", "absorb")


@dataclass(frozen=True, eq=False)
class Edit:
    """This site's form becomes that."""

    site: str
    before: Form
    after: Form
    how: str


@dataclass(frozen=True, eq=False)
class Note:
    """A fact about a site, or about the whole model (site ""). `data` is JSON: numbers and text."""

    site: str
    kind: str  # one word: "skipped", "done", "measured", "trained", "written", ...
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


Group = tuple[Edit | Note, ...]


class Step(Protocol):
    """One technique."""

    name: ClassVar[str]

    def run(self, view: View) -> Iterator[Group]:
        """Look at the view; yield groups of events. Each group is applied whole, at once."""
