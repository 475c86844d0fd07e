"""Observer: callbacks for what an executor does. Used by the terminal, the dry check and tests."""

from __future__ import annotations

from tersor.record.events import Group


class Observer:
    """Base class; every callback does nothing."""

    def step(self, number: int, total: int, name: str) -> None:
        """A step begins. `number` counts from 1 in this run."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Progress of a long operation: `done` of `total` units."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def applied(self, group: Group) -> None:
        """A group was checked and applied."""

    def ended(self, name: str, seconds: float) -> None:
        """A step has ended."""
