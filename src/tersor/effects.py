"""Effects: which settings go with which, and a refusal of those that would do nothing.

only = {"percentile": {"range": ("percentile",)}, "lr": {"epochs": Above(0)}, "keep": {"pattern": LEFT_OUT}}
A step's class may have such a table: a setting, and the values of others at which it has an effect. All of
them must hold, and the tables of its bases hold too.
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
    """Whatever is not left out."""

    def __contains__(self, value: Any) -> bool:
        return value not in (None, "")


Wanted = tuple[Any, ...] | Above | Given
Only = Mapping[str, Mapping[str, Wanted]]
LEFT_OUT = (None,)
GIVEN = Given()


def only(kind: type) -> dict[str, dict[str, Wanted]]:
    """What a step's class and its bases declare."""
    found: dict[str, dict[str, Wanted]] = {}
    for one in reversed(kind.__mro__):
        for key, needs in vars(one).get("only", {}).items():
            found[key] = {**found.get(key, {}), **needs}
    return found


def said(key: str, wanted: Wanted) -> str:
    """A condition in words: "range=percentile", "epochs above 0", "no pattern", "features"."""
    if isinstance(wanted, Above):
        return f"{key} above {wanted.number:g}"
    if isinstance(wanted, Given):
        return key
    return f"no {key}" if wanted == LEFT_OUT else " or ".join(f"{key}={str(v).lower()}" for v in wanted)


def check_effect(step: Any) -> None:
    """Refuse a setting that does nothing beside the others; last in a step's __post_init__."""
    usual = {f.name: f.default for f in dataclasses.fields(step)}
    for key, needs in only(type(step)).items():
        if (given := getattr(step, key)) == usual[key]:
            continue
        for other, wanted in needs.items():
            if (there := getattr(step, other)) not in wanted:
                way = "leave out one of the two" if wanted == LEFT_OUT else f"give that, or leave out {key}"
                raise SettingError(
                    f"{step.name}: {key}={given!r} has no effect where {other}={there!r}. It needs "
                    f"{said(other, wanted)}: {way}"
                )
