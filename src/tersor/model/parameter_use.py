"""Parameter use: the classes Use (an operator that takes a parameter), Role and Rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from tersor.model.axis_origins import Labels


@dataclass(frozen=True)
class Role:
    """What a parameter is for."""

    word: str  # listed in the header of roles.py
    axis: int = 0  # of outputs, or of a table's rows
    contracted: int | None = None  # the axis that is summed over; None if there is none or it is unknown
    groups: int = 1  # of a convolution
    why: str = ""  # the operators that determined the role, or that no rule covers


@dataclass(frozen=True)
class Use:
    """One operator that takes a parameter, or a value computed from it, as an argument."""

    name: str  # of the operator: "linear"
    node: fx.Node
    slot: str  # the name of that argument: "weight"
    labels: Labels  # of that argument
    given: Mapping[str, Any]  # all arguments by name
    shape: tuple[int, ...]  # of the operator's result (of the first one, if there are several)
    constant: bool  # whether the result does not depend on the model's inputs
    parameter: tuple[int, ...]  # the parameter's own shape
    boolean: bool = False  # whether the parameter is of dtype bool

    def arg(self, name: str, default: Any = None) -> Any:
        return self.given.get(name, default)

    def dim(self, name: str = "dim", default: int = 0) -> int:
        at: int = self.arg(name, default)
        return at % max(len(self.labels), 1)

    @property
    def long(self) -> int:
        """The number of the parameter's axes that are longer than 1."""
        return sum(size > 1 for size in self.parameter)


Moves = Callable[[Use], "Labels | list[Labels]"]
Decides = Callable[[Use], Role | None]


@dataclass(frozen=True)
class Rule:
    moves: Moves | None = None
    decides: Decides | None = None
