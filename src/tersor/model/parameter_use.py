"""Use: one operator that is given a parameter, what it can say of it, and the form of a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from tersor.model.labels import Labels


@dataclass(frozen=True)
class Role:
    """What a parameter is for."""

    word: str  # listed in the header of roles.py
    axis: int = 0  # of outputs, or of a table's rows
    contracted: int | None = None  # the axis that is summed over; None where none is, or nobody knows
    groups: int = 1  # of a convolution
    why: str = ""  # the operators that decided, or what nobody understood


@dataclass(frozen=True)
class Use:
    """One operator that is given a parameter, or what was made of it."""

    name: str  # of the operator: "linear"
    node: fx.Node
    slot: str  # the argument that it is: "weight"
    labels: Labels  # of that argument
    given: Mapping[str, Any]  # all arguments by name
    shape: tuple[int, ...]  # of what the operator makes (the first, of several)
    constant: bool  # whether no argument of the model takes part
    parameter: tuple[int, ...]  # the parameter's own shape
    boolean: bool = False  # whether the parameter is true or false

    def arg(self, name: str, default: Any = None) -> Any:
        return self.given.get(name, default)

    def dim(self, name: str = "dim", default: int = 0) -> int:
        at: int = self.arg(name, default)
        return at % max(len(self.labels), 1)

    @property
    def long(self) -> int:
        """Axes of the parameter that are longer than 1."""
        return sum(size > 1 for size in self.parameter)


Moves = Callable[[Use], "Labels | list[Labels]"]
Decides = Callable[[Use], Role | None]


@dataclass(frozen=True)
class Rule:
    moves: Moves | None = None
    decides: Decides | None = None
