"""Changes: what can happen to a module besides its tensors' values. The core's events are made of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Set:
    """This module's integer becomes that."""

    module: str  # its name in the given model, or in the model as replaced so far
    attribute: str  # "groups", "num_heads", "normalized_shape.0" (a place in a tuple)
    value: int


@dataclass(frozen=True)
class Replace:
    """This module becomes a stock one."""

    module: str
    stock: str  # a word of the closed table of stock replacements
    settings: Mapping[str, Any] = field(default_factory=dict)  # integers and texts
