"""Settings: frozen dataclasses from text and back, checked when they are made.

A step that exists is valid: unknown keys, words that are not allowed, numbers out of range and (by
setting_effects.py) settings without an effect are refused, and the message says what is allowed. YAML, the
command line and Python all use these checks.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from tersor.dtypes import in_bytes
from tersor.errors import SettingError, did_you_mean

# Words of earlier versions: docs/format-changes.md. Recipes that have them are refused with the new word.
RENAMED = {
    "share": "teacher_weight", "clip": "max_grad_norm", "start": "init", "row": "channel", "column": "input",
}  # fmt: skip


def settings_of(step: Any) -> dict[str, Any]:
    """All settings of a step as JSON values. An int in a float setting becomes a float, as in YAML and words:
    a recipe has the same digest in Python, YAML and words."""
    hints = typing.get_type_hints(type(step))
    settings = {f.name: plain(getattr(step, f.name)) for f in dataclasses.fields(step)}
    for name, value in settings.items():
        meant = typing.get_args(hints[name]) or (hints[name],)
        if type(value) is int and float in meant and int not in meant:
            settings[name] = float(value)
    return settings


def plain(value: Any) -> Any:
    if isinstance(value, nn.Module):  # a teacher: a text that changes when the weights change
        crc = 0
        for name, tensor in value.state_dict().items():
            raw = in_bytes(tensor.cpu()).numpy().data
            crc = zlib.crc32(raw, zlib.crc32(name.encode(), crc))
        return f"{type(value).__name__} {crc:08x}"
    return list(value) if isinstance(value, tuple) else value


def make(kind: Any, settings: Mapping[str, Any]) -> Any:
    """A step from its class and settings, as read from YAML or the command line. SettingError for settings
    that are unknown or of a wrong type."""
    hints = typing.get_type_hints(kind)
    allowed = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in settings.items():
        if key not in allowed:
            raise SettingError(f"{kind.name}: no setting {key!r}; {now_called(key, allowed)}")
        values[key] = convert(value, hints[key], f"{kind.name}: {key}")
    return kind(**values)


def convert(value: Any, hint: Any, who: str) -> Any:
    """`value` as the hinted type. If the hint asks for it, text becomes a number, an int a float, and a list
    a tuple."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if Any in options:
        return value
    if type(None) in options and str(value).lower() in ("none", "null", ""):
        return None
    if isinstance(value, (list, tuple)):
        texts = all(isinstance(item, str) for item in value)
        if texts and any(typing.get_origin(option) is tuple for option in options):
            return tuple(value)
    elif bool in options:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return str(value).lower() in ("true", "yes", "on", "1")
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        for option in (int, float, str):
            if option in options:
                try:
                    number = option(value)
                except (TypeError, ValueError, OverflowError):
                    continue
                if option is not int or isinstance(value, str) or number == value:
                    return number
    raise misfit(value, options, who)


def misfit(value: Any, options: Iterable[Any], who: str) -> SettingError:
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    return SettingError(f"{who}={value!r}, but it must be {names.replace('NoneType', 'none')}")


def check_settings(step: Any) -> None:
    """The checks of every step: each setting has its declared type, and `where` is not empty. Call it first
    in __post_init__.

    Text is not converted to numbers here, since Python has numbers. Numbers of numpy become Python's and
    lists become tuples, because files and digests hold only these.
    """
    hints = typing.get_type_hints(type(step))
    for name in (f.name for f in dataclasses.fields(step)):
        value, who = getattr(step, name), f"{step.name}: {name}"
        given = value.item() if isinstance(value, np.generic) else value
        meant = convert(given, hints[name], who)
        if isinstance(given, str) != isinstance(meant, str):
            raise misfit(value, typing.get_args(hints[name]) or (hints[name],), who)
        # An int in a float setting stays as it was written, for messages; settings_of converts it.
        object.__setattr__(step, name, given if isinstance(meant, float) else meant)
    if not step.where:
        raise SettingError(f"{step.name}: where={step.where!r}, but it is a glob such as '*' or 'blocks.*'")


def check(fine: bool, step: Any, key: str, allowed: str) -> None:
    """Refuse a setting that is out of range: check(0 < self.keep <= 1, self, "keep", "0 < keep <= 1")."""
    if not fine:
        raise SettingError(f"{step.name}: {key}={getattr(step, key)!r}, but {allowed}")


def now_called(word: str, allowed: Iterable[str]) -> str:
    """The new name of a setting or word that was renamed, else the nearest one that is allowed."""
    allowed = list(allowed)
    return (
        f"it is now called {RENAMED[word]!r}" if RENAMED.get(word) in allowed else did_you_mean(word, allowed)
    )


def check_word(step: Any, key: str, allowed: Iterable[str]) -> None:
    """Refuse a word that is not in the list, and name the nearest one."""
    if getattr(step, key) not in allowed:
        raise SettingError(
            f"{step.name}: {key}={getattr(step, key)!r}; {now_called(getattr(step, key), allowed)}"
        )
