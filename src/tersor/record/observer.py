"""Observer: callbacks for what an executor does. Used by the terminal, the dry check and tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tersor.errors import TersorError
from tersor.record.events import Group

NO_CHANGE = ("export", "measure")  # if only such steps are left, the network is as it will be


class Observer:
    """Base class; every callback does nothing."""

    def step(self, number: int, total: int, name: str) -> None:
        """A step begins. `number` counts from 1 in this run."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Progress of a long operation: `done` of `total` units."""

    def batch(self, number: int, total: int | None) -> None:
        """A step uses a calibration batch, the `number`th of a pass over `total`."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def applied(self, group: Group) -> None:
        """A group was checked and applied."""

    def ended(self, name: str, seconds: float) -> None:
        """A step has ended."""


@contextmanager
def keeping(state: Any, left: Iterable[Any]) -> Iterator[None]:
    """Give an error the state of the run if the steps that are `left` change nothing of it."""
    try:
        yield
    except TersorError as error:
        if all(step.name in NO_CHANGE for step in left):
            error.done = state
        raise
