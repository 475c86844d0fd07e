"""Observer: who is told what an executor does: progress on a terminal, the dry check, tests."""

from __future__ import annotations

from tersor.record.events import Group


class Observer:
    """Told of everything; this one keeps silent."""

    def step(self, number: int, total: int, name: str) -> None:
        """A step begins; `number` counts from 1 in this run."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Something long has come this far."""

    def said(self, text: str) -> None:
        """A word that is of use to the user and changes nothing."""

    def applied(self, group: Group) -> None:
        """A group was checked and applied."""

    def ended(self, name: str, seconds: float) -> None:
        """A step has ended."""
