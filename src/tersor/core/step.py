"""Step: one technique with its settings.

class Quantize                          a frozen dataclass; its fields are the settings
name = "quantize"                       its word in YAML and on the command line
where = "*"                             which sites, as a glob
needs, lossless, loops                  what it requires; True if it changes no weight; modules it compiles
run(self, view) -> Iterator[Group]      reads the view, yields groups; changes nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

from tersor.core.view import View
from tersor.model.needs import Needs
from tersor.record.events import Group

__all__ = ["Needs", "Step"]


@runtime_checkable
class Step(Protocol):
    """One technique."""

    name: ClassVar[str]

    @property
    def where(self) -> str | tuple[str, ...]: ...

    @property
    def needs(self) -> Needs: ...

    def run(self, view: View) -> Iterator[Group]:
        """Read the view and yield keyed groups of events. Each group is applied as a whole, at once."""
