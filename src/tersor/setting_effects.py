"""Setting effects: which settings depend on which, and a refusal of settings that would do nothing.

only = {"percentile": {"range": ("percentile",)}, "lr": {"epochs": Above(0)}, "keep": {"pattern": LEFT_OUT}}
A step's class may have such a table. It maps a setting to the values of other settings at which it has an
effect. All of these conditions must hold, and those in the tables of the base classes too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tersor.errors import SettingError


@dataclass(frozen=True)
class Above:
    """Numbers larger than this one."""

    number: float

    def __contains__(self, value: float) -> bool:
        return value > self.number


class Given:
    """Any value except None and the empty text."""

    def __contains__(self, value: Any) -> bool:
        return value not in (None, "")


Wanted = tuple[Any, ...] | Above | Given
Only = Mapping[str, Mapping[str, Wanted]]
LEFT_OUT = (None,)
GIVEN = Given()


def only(kind: type) -> dict[str, dict[str, Wanted]]:
    """The conditions that a step's class and its base classes declare."""
    found: dict[str, dict[str, Wanted]] = {}
    for base in reversed(kind.__mro__):
        for key, needs in vars(base).get("only", {}).items():
            found[key] = {**found.get(key, {}), **needs}
    return found


def condition(key: str, wanted: Wanted) -> str:
    """A condition in words: "range=percentile", "epochs above 0", "no pattern", "features"."""
    if isinstance(wanted, Above):
        return f"{key} above {wanted.number:g}"
    if isinstance(wanted, Given):
        return key
    if wanted == LEFT_OUT:
        return f"no {key}"
    *words, last = (str(value).lower() for value in wanted)
    return f"{key}={', '.join(words)} or {last}" if words else f"{key}={last}"


def check_effect(step: Any) -> None:
    """Refuse a setting that has no effect, given the others. Call it last in a step's __post_init__."""
    usual = {f.name: f.default for f in dataclasses.fields(step)}
    for key, needs in only(type(step)).items():
        if (given := getattr(step, key)) == usual[key]:
            continue
        for other, wanted in needs.items():
            if (value := getattr(step, other)) not in wanted:
                way_out = (
                    "leave out one of the two" if wanted == LEFT_OUT else f"give that, or leave out {key}"
                )
                raise SettingError(
                    f"{step.name}: {key}={given!r} has no effect if {other}={value!r}. It needs "
                    f"{condition(other, wanted)}: {way_out}"
                )
