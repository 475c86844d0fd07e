"""Steps table: the steps and their settings for `tersor steps`, as the steps declare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.errors import SettingError, did_you_mean
from tersor.report.console import setting as word
from tersor.setting_effects import condition, only
from tersor.settings import plain
from tersor.steps import STEPS
from tersor.steps.retrain import Retrain

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]


def described(step: str | None = None) -> dict[str, Any]:
    """All steps, or one with its settings. SettingError for an unknown one."""
    if step is not None and step not in STEPS:
        raise SettingError(f"steps: {step!r}; {did_you_mean(step, STEPS)}")
    found = [
        {
            "step": name,
            "what": (kind.__doc__ or "").splitlines()[0],
            "settings": {field.name: setting(kind, field) for field in own_first(kind)},
        }
        for name, kind in STEPS.items()
        if step in {None, name}
    ]
    return {"steps": found, "one": step is not None}


def own_first(kind: type) -> list[dataclasses.Field[Any]]:
    """The settings of a step, those of training behind its own."""
    training = {field.name for field in dataclasses.fields(Retrain)}
    return sorted(dataclasses.fields(kind), key=lambda field: field.name in training)


def setting(kind: type, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """A setting's default, and the other settings that it has an effect with."""
    needs = only(kind).get(field.name, {})
    return {
        "default": plain(field.default),
        "with": [condition(key, wanted) for key, wanted in needs.items()],
    }


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts as tables for people."""
    from rich.table import Table

    if not facts["one"]:
        table = Table("step", "what it does", box=None)
        for step in facts["steps"]:
            table.add_row(step["step"], step["what"])
        yield table
        yield "Settings: tersor steps STEP"
        return
    (step,) = facts["steps"]
    yield f"{step['step']}: {step['what']}"
    table = Table("setting", "default", "has an effect with", box=None)
    for name, found in step["settings"].items():
        table.add_row(name, word(found["default"]), ", ".join(found["with"]))
    yield table
