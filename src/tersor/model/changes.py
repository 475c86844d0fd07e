"""Changes: what can happen to a module besides its tensors' values.

Set        one of its integers becomes another     heads that are left, groups that are left
Replace    it becomes a stock one                  a product of layers, an identity: the table in stock.py
Both name modules as they are called when the change comes: a Replace may give birth to names that later
changes use. They are JSON, so that a file can say them, and the same changes to a fresh model give the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.errors import SettingError


@dataclass(frozen=True)
class Set:
    """This module's integer becomes that."""

    module: str  # "" is the model itself
    attribute: str  # "groups", "num_heads", or a place in a tuple or list: "normalized_shape.0"
    value: int

    def __post_init__(self) -> None:
        if type(self.value) is not int:
            raise SettingError(
                f"{self.module}.{self.attribute} cannot be set to {self.value!r}: only integers are set"
            )


@dataclass(frozen=True)
class Replace:
    """This module becomes a stock one."""

    module: str
    stock: str  # a word of stock.STOCK
    settings: Mapping[str, int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in self.settings.items():
            if type(key) is not str or type(value) not in (int, str):
                raise SettingError(
                    f"{self.module}: setting {key!r} of {self.stock!r} is {value!r}, not an integer or a text"
                )


Change = Set | Replace
