"""Changes: edits to a module other than new tensor values.

Set        gives one of its integers a new value   number of heads or groups after a cut
Replace    replaces it by a stock module           a product of layers, an identity: the table in stock.py
Both use the module names at the time of the change: a Replace may create names that later changes use.
Changes are JSON, so a file can store them. The same changes to a fresh model give the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.errors import SettingError


@dataclass(frozen=True)
class Set:
    """Set an integer attribute of a module."""

    module: str  # "" is the model itself
    attribute: str  # "groups", "num_heads", or an element of a tuple or list: "normalized_shape.0"
    value: int

    def __post_init__(self) -> None:
        if type(self.value) is not int:
            raise SettingError(
                f"{self.module}.{self.attribute} cannot be set to {self.value!r}: only integers are allowed"
            )


@dataclass(frozen=True)
class Replace:
    """Replace a module by a stock module."""

    module: str
    stock: str  # a key of stock.STOCK
    settings: Mapping[str, int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in self.settings.items():
            if type(key) is not str or type(value) not in (int, str):
                raise SettingError(
                    f"{self.module}: setting {key!r} of {self.stock!r} is {value!r}, "
                    "but it must be an integer or a string"
                )


Change = Set | Replace
