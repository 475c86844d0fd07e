"""Call: one call of an operator, with labels in place of its tensors, for rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.model.channels.atoms import Array, Atoms, Label, alive

Labels = Label | list[Label] | None  # of a tensor, of a tuple of tensors, of something else


class NoRuleError(Exception):
    """This call of an operator is not covered by its rule."""


@dataclass
class Call:
    """One call of an operator, with labels in place of tensors."""

    atoms: Atoms
    name: str  # without the underscore of in-place operators
    given: dict[str, Any]  # arguments by name, defaults included
    shape: Any  # of the result: a tuple, or a list of tuples
    groups: Array | None = None  # a rule puts the atoms of the operator's axis of groups here

    @property
    def x(self) -> Label:
        """The first argument."""
        first = next(iter(self.given.values()))
        if not is_label(first):
            raise NoRuleError(self.name)
        return first

    def dim(self, key: str = "dim", default: int = 0, of: int | None = None) -> int:
        found = self.given.get(key)
        return int(default if found is None else found) % max(len(self.x) if of is None else of, 1)

    def dims(self, key: str = "dim") -> list[int]:
        found = self.given.get(key)
        every = range(len(self.x)) if found is None or found == [] else found
        return [int(d) % len(self.x) for d in ([every] if isinstance(every, int) else every)]

    def other(self, sizes: Sequence[int]) -> Label:
        """Dimensions that are no channels."""
        return [self.atoms.dead("space", size) for size in sizes]


def is_label(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value)


def tensors(value: Any) -> list[Label]:
    """All labels among an argument's items."""
    if is_label(value):
        return [value]
    return [label for item in value for label in tensors(item)] if isinstance(value, (list, tuple)) else []


def elementwise(atoms: Atoms, labels: Sequence[Label], shape: Sequence[int]) -> Label:
    """The label of a broadcast result: of each dimension the array that may still be cut."""
    found: Label = []
    for back in range(1, len(shape) + 1):
        size = shape[-back]
        here = [label[-back] for label in labels if len(label) >= back and len(label[-back]) == size != 1]
        if not here:
            found.append(atoms.dead("size 1" if size == 1 else "made", size))
            continue
        first = next(filter(alive, here), here[0])
        for array in here:
            if array is not first:
                atoms.tie(first, array)
        found.append(first)
    return found[::-1]
